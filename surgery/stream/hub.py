"""Reading tensors that lie on the Hub: fetched ahead, and kept on scratch where they will be read once more."""

from __future__ import annotations

import hashlib
import os
import tempfile
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from surgery.checkpoint import Checkpoint, SourceFile
from surgery.checkpoint.remote import RemoteFile, pieces
from surgery.stream.needs import Name, Step, kept_for_later, wanted_of
from surgery.stream.prefetch import FileKey, Prefetch

__all__ = ["Fetching", "HubReader"]

RANGES = 10  # that the bytes in memory are divided into
LARGEST_RANGE = 64 << 20


@dataclass(frozen=True, slots=True)
class Fetching:
    """What reading from the Hub may take: bytes in memory, bytes of scratch, and where scratch files may lie."""

    prefetch: int
    scratch: int
    directory: Path


@dataclass(slots=True)
class _Spill:
    """The first `filled` bytes of a tensor, in a file that has no name."""

    file: BinaryIO
    filled: int = 0


class HubReader:
    """Reads tensors of files on the Hub. Used by one thread; close it when done."""

    def __init__(
        self,
        checkpoints: Mapping[str, Checkpoint],
        files: dict[FileKey, SourceFile],
        hashed: Collection[str],
        fetching: Fetching,
    ) -> None:
        """`files` are those on the Hub; `hashed` the models whose files' sha256 will be asked for."""
        self._checkpoints = checkpoints
        self._files = files
        self._hashed = frozenset(hashed)
        self._fetching = fetching
        num_models = len({model for model, _ in files})
        self._range_bytes = min(fetching.prefetch // max(RANGES, 2 * num_models + 6), LARGEST_RANGE)
        self._prefetch = Prefetch(files, fetching.prefetch, self._range_bytes)
        self._kept: dict[Name, int] = {}
        self._spills: dict[Name, _Spill] = {}

    def expect(self, steps: Sequence[Step]) -> None:
        """What will be read, in order."""
        self._kept = kept_for_later(steps, self._checkpoints, self._fetching.scratch)
        self._prefetch.expect(wanted_of(steps, self._checkpoints, self._range_bytes), self._hashed)

    def read_into(self, buffer: memoryview, model: str, name: str, start: int) -> None:
        """Fill `buffer` with the bytes of a tensor from `start` on. Raises CheckpointError."""
        spill = self._spill((model, name))
        if spill is None:
            self._fetch(buffer, model, name, start)
            return
        num_spilled = max(0, min(spill.filled - start, len(buffer)))
        _pread(spill.file, buffer[:num_spilled], start)
        rest, position = buffer[num_spilled:], start + num_spilled
        if not rest:
            return
        self._fetch(rest, model, name, position)
        if position == spill.filled:
            _pwrite(spill.file, rest, position)
            spill.filled += len(rest)

    def _fetch(self, buffer: memoryview, model: str, name: str, start: int) -> None:
        entry = self._checkpoints[model].tensors[name]
        if buffer:
            self._prefetch.read_into(buffer, (model, entry.file.name), entry.start + start, entry.stop)

    def _spill(self, name: Name) -> _Spill | None:
        if name not in self._kept:
            return None
        if name not in self._spills:
            self._spills[name] = _Spill(tempfile.TemporaryFile(dir=self._fetching.directory, buffering=0))  # noqa: SIM115
        return self._spills[name]

    def passed(self, step: int) -> None:
        """All reads up to this step were made."""
        self._prefetch.passed(step)
        for name in [name for name in self._spills if self._kept[name] <= step]:
            self._spills.pop(name).file.close()

    def finish(self) -> dict[FileKey, str]:
        """The sha256, hex, of the files of the models that are hashed: as the Hub lists it, else of the bytes.

        Raises CheckpointError if a file that was read whole is not the one that the Hub lists.
        """
        found: dict[FileKey, str] = {}
        for key, file in self._files.items():
            sha256 = self._prefetch.finish(key)
            if key[0] in self._hashed:
                found[key] = file.sha256 or sha256 or _sha256(file)
        return found

    def stop(self) -> None:
        """Let nobody wait any more."""
        self._prefetch.stop()

    def close(self) -> None:
        """Stop fetching, and throw scratch away."""
        self._prefetch.close()
        for spill in self._spills.values():
            spill.file.close()
        self._spills = {}


def _sha256(file: SourceFile) -> str:
    """Of a small file that lies in git itself, and was not read whole."""
    assert isinstance(file.place, RemoteFile)
    digest = hashlib.sha256()
    for piece in pieces(file.place):
        digest.update(piece)
    return digest.hexdigest()


def _pread(file: BinaryIO, buffer: memoryview, start: int) -> None:
    filled = 0
    while filled < len(buffer):
        count = os.preadv(file.fileno(), [buffer[filled:]], start + filled)
        if not count:
            raise OSError("scratch is shorter than what was written to it")
        filled += count


def _pwrite(file: BinaryIO, data: memoryview, start: int) -> None:
    written = 0
    while written < len(data):
        written += os.pwrite(file.fileno(), data[written:], start + written)
