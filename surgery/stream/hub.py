"""Reading tensors that lie on the Hub: fetched ahead, and kept on scratch where they will be read once more."""

from __future__ import annotations

import resource
import shutil
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from surgery.checkpoint import Checkpoint, SourceFile
from surgery.stream.needs import Name, Step, kept_for_later, wanted_of
from surgery.stream.prefetch import Prefetch
from surgery.stream.ranges import FileKey
from surgery.stream.scratch import ScratchFile
from surgery.stream.whole import Begun

__all__ = ["Earlier", "Fetching", "HubReader"]

RANGES = 10  # that the bytes in memory are divided into
OTHER_FILES = 1 << 19  # bytes that are left free for index, config and manifest
MOST_SCRATCH_FILES = 2000
OTHER_OPEN_FILES = 256
LARGEST_RANGE = 64 << 20


@dataclass(frozen=True, slots=True)
class Fetching:
    """What reading from the Hub may take: bytes in memory, bytes of scratch, and where scratch files may lie."""

    prefetch: int
    scratch: int
    directory: Path


@dataclass(frozen=True, slots=True)
class Earlier:
    """What runs before this one have seen of files on the Hub: those that are what it lists, and how far others are."""

    checked: Collection[str] = ()
    begun: Mapping[str, Begun] = field(default_factory=dict[str, Begun])


@dataclass(slots=True)
class _Spill:
    """The first `filled` bytes of a tensor, in a file that has no name."""

    file: ScratchFile
    filled: int = 0


class HubReader:
    """Reads tensors of files on the Hub. Used by one thread; close it when done."""

    def __init__(
        self,
        checkpoints: Mapping[str, Checkpoint],
        files: dict[FileKey, SourceFile],
        hashed: Collection[str],
        fetching: Fetching,
        earlier: Earlier,
    ) -> None:
        """`files` are those on the Hub; `hashed` the models whose files' sha256 will be asked for.

        `earlier`: what runs before this one have seen of them.
        """
        self._checkpoints = checkpoints
        self._files = files
        self._hashed = frozenset(hashed)
        self._fetching = fetching
        num_models = len({model for model, _ in files})
        self._range_bytes = min(fetching.prefetch // max(RANGES, 2 * num_models + 6), LARGEST_RANGE)
        self._prefetch = Prefetch(files, fetching.prefetch, self._range_bytes, fetching.directory)
        self._kept: dict[Name, int] = {}
        self._spills: dict[Name, _Spill] = {}
        self._checked = {key: file.sha256 for key, file in files.items() if str(file.place) in earlier.checked}
        self._begun = earlier.begun
        self._num_told = 0
        self._to_check: set[FileKey] = set()  # files that are needed whole
        self.unchecked: list[SourceFile] = []

    def expect(self, steps: Sequence[Step], needed: Collection[Name]) -> None:
        """What will be read, in order; `needed` is that and what runs before this one have read."""
        room = self._room_for_scratch(steps)
        self._kept = kept_for_later(steps, self._checkpoints, room, self._most_scratch_files())
        room -= sum(self._checkpoints[model].tensors[name].type.num_bytes for model, name in self._kept)
        wanted = wanted_of(steps, self._checkpoints, self._range_bytes)
        lacking = {
            (model, entry.file.name)
            for model, checkpoint in self._checkpoints.items()
            for name, entry in checkpoint.tensors.items()
            if (model, name) not in needed
        }
        self._to_check = {item.key for item in wanted} - lacking
        self._prefetch.expect(wanted, self._hashed, max(0, room), self._begun)

    def _room_for_scratch(self, steps: Sequence[Step]) -> int:
        """Bytes besides what is still to be written, which the disk may not have."""
        free = shutil.disk_usage(self._fetching.directory).free - sum(step.num_written for step in steps)
        return max(0, min(self._fetching.scratch, free - OTHER_FILES))

    def _most_scratch_files(self) -> int:
        """Of those that the process may have open at once, besides the checkpoints' own."""
        limit = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
        others = OTHER_OPEN_FILES + sum(len(checkpoint.files) for checkpoint in self._checkpoints.values())
        if limit == resource.RLIM_INFINITY:
            return MOST_SCRATCH_FILES
        return max(0, min(limit - others, MOST_SCRATCH_FILES))

    def read_into(self, buffer: memoryview, model: str, name: str, start: int) -> None:
        """Fill `buffer` with the bytes of a tensor from `start` on. Raises CheckpointError."""
        spill = self._spill((model, name))
        if spill is None:
            self._fetch(buffer, model, name, start)
            return
        num_spilled = max(0, min(spill.filled - start, len(buffer)))
        spill.file.read_into(buffer[:num_spilled], start)
        rest, position = buffer[num_spilled:], start + num_spilled
        if not rest:
            return
        self._fetch(rest, model, name, position)
        if position == spill.filled:
            spill.file.write(rest, position)
            spill.filled += len(rest)

    def _fetch(self, buffer: memoryview, model: str, name: str, start: int) -> None:
        entry = self._checkpoints[model].tensors[name]
        if buffer:
            self._prefetch.read_into(buffer, (model, entry.file.name), entry.start + start, entry.stop)

    def _spill(self, name: Name) -> _Spill | None:
        if name not in self._kept:
            return None
        if name not in self._spills:
            self._spills[name] = _Spill(ScratchFile(self._fetching.directory))
        return self._spills[name]

    def passed(self, step: int) -> None:
        """All reads up to this step were made."""
        self._prefetch.passed(step)
        for name in [name for name in self._spills if self._kept[name] <= step]:
            self._spills.pop(name).file.close()

    def finish(self) -> dict[FileKey, str]:
        """The sha256, hex, of the files of the models that are hashed, after fetching what is left of them.

        Raises CheckpointError if a file that was read whole is not the one that the Hub lists.
        """
        found = {key: self._prefetch.finish(key) or self._checked.get(key, "") for key in self._files}
        unhashed = {key: self._files[key] for key in found if key[0] in self._hashed and not found[key]}
        if unhashed:
            found |= self._hashes_of(unhashed)
        unchecked = [self._files[key] for key in found if key in self._to_check and not found[key]]
        self.unchecked = [file for file in unchecked if file.sha256]
        return {key: sha256 for key, sha256 in found.items() if key[0] in self._hashed}

    def _hashes_of(self, files: dict[FileKey, SourceFile]) -> dict[FileKey, str]:
        """Of files that were not read in their order, and are fetched once more."""
        self._prefetch.close()
        self._prefetch = Prefetch(files, self._fetching.prefetch, self._range_bytes)
        self._prefetch.expect([], self._hashed)
        return {key: self._prefetch.finish(key) for key in files}

    def newly_checked(self) -> list[str]:
        """Files that were held against what the Hub lists since this was asked last."""
        new = self._prefetch.checked[self._num_told :]
        self._num_told += len(new)
        return [str(file) for file in new]

    def newly_hashed(self) -> list[tuple[str, Begun]]:
        """How far files were hashed, step by step since this was asked last."""
        return self._prefetch.newly_hashed()

    def stop(self) -> None:
        """Let nobody wait any more."""
        self._prefetch.stop()

    def close(self) -> None:
        """Stop fetching, and throw scratch away."""
        self._prefetch.close()
        for spill in self._spills.values():
            spill.file.close()
        self._spills = {}
