"""Reading source extents into reused buffers, hashing files on the way where their hashes are wanted.

A file's sha256 is computed from the very bytes that are used: reads come in file order, and what
nobody asks for (the header, a dropped tensor) is read for the hash alone.
"""

from __future__ import annotations

import hashlib
import mmap
import os
import threading
from collections.abc import Collection, Iterable, Mapping, Sequence

import torch
from torch import Tensor

from surgery.checkpoint import Checkpoint, SourceFile
from surgery.checkpoint.remote import Damaged, RemoteFile
from surgery.errors import CheckpointError, Problem
from surgery.stream.hub import Earlier, Fetching, HubReader
from surgery.stream.needs import Name, Step
from surgery.stream.ranges import FileKey
from surgery.stream.whole import Begun

__all__ = ["BufferPool", "FileKey", "SourceReader"]

CATCH_UP_BYTES = 1 << 20
SMALLEST_KEPT = 1 << 18  # smaller buffers come cheap from the allocator
MOST_KEPT = 48 << 20  # of buffers that nobody uses: an embedding's are not worth keeping for the next one


class BufferPool:
    """u8 buffers, kept for reuse by exact size: a stream needs only a few sizes over and over.

    What is in use and what is kept stay within `limit` together, as long as what is in use does.
    Large buffers are mapped one by one, so that dropping one gives its memory back to the system:
    the allocator would keep it in the arena of whichever thread was last to use it.
    """

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._free: dict[int, list[Tensor]] = {}
        self._free_bytes = 0
        self._held_bytes = 0  # in use or kept
        self._lock = threading.Lock()

    def take(self, num_bytes: int) -> Tensor:
        """A buffer of exactly `num_bytes`, its content undefined."""
        if num_bytes < SMALLEST_KEPT:
            return torch.empty(num_bytes, dtype=torch.uint8)
        with self._lock:
            if self._free.get(num_bytes):
                self._free_bytes -= num_bytes
                return self._free[num_bytes].pop()
            self._make_room(num_bytes)
            self._held_bytes += num_bytes
        return torch.frombuffer(mmap.mmap(-1, num_bytes), dtype=torch.uint8)

    def _make_room(self, num_bytes: int) -> None:
        for size, buffers in self._free.items():
            while buffers and self._held_bytes + num_bytes > self._limit:
                buffers.pop()
                self._held_bytes -= size
                self._free_bytes -= size

    def give_back(self, buffers: Iterable[Tensor]) -> None:
        """Let `buffers` be reused. The caller must hold no view of them."""
        with self._lock:
            for buffer in buffers:
                size = buffer.numel()
                if size >= SMALLEST_KEPT and self._free_bytes + size <= MOST_KEPT:
                    self._free.setdefault(size, []).append(buffer)
                    self._free_bytes += size
                elif size >= SMALLEST_KEPT:
                    self._held_bytes -= size


class _OpenFile:
    """A source file that is read from."""

    def __init__(self, file: SourceFile) -> None:
        self.file = file
        self.fd = os.open(str(file.place), os.O_RDONLY | os.O_NONBLOCK)  # a pipe that took its place is not waited for
        os.posix_fadvise(self.fd, 0, 0, os.POSIX_FADV_SEQUENTIAL)  # twice the read-ahead, where the cache is cold

    def read_into(self, buffer: memoryview, start: int) -> None:
        filled = 0
        while filled < len(buffer):
            count = os.preadv(self.fd, [buffer[filled:]], start + filled)
            if count == 0:
                raise self.changed("is shorter than its header says")
            filled += count

    def check_unchanged(self) -> None:
        stat = os.fstat(self.fd)
        if stat.st_size != self.file.header.file_bytes or stat.st_ctime_ns != self.file.changed_ns:
            raise self.changed("has changed since it was planned")

    def changed(self, what: str) -> CheckpointError:
        return CheckpointError(Problem(what, str(self.file.place), "plan and apply again, and let nothing write to it"))


class _Hash:
    """The sha256 of the first `position` bytes of a file."""

    def __init__(self, file: _OpenFile) -> None:
        self._file = file
        self._sha256 = hashlib.sha256()
        self._position = 0
        self._scratch = bytearray(0)

    def hash_read(self, buffer: memoryview, start: int) -> None:
        """Take bytes that were just read into account, first those before them that nobody read."""
        self._catch_up(start)
        if start == self._position:
            self._sha256.update(buffer)
            self._position += len(buffer)

    def finish(self) -> str:
        """Of the whole file, hex."""
        self._catch_up(self._file.file.header.file_bytes)
        return self._sha256.hexdigest()

    def _catch_up(self, stop: int) -> None:
        """Hash what lies before `stop` and is not hashed yet."""
        while self._position < stop:
            if not self._scratch:
                self._scratch = bytearray(CATCH_UP_BYTES)
            piece = memoryview(self._scratch)[: min(CATCH_UP_BYTES, stop - self._position)]
            self._file.read_into(piece, self._position)
            self._sha256.update(piece)
            self._position += len(piece)


class SourceReader:
    """Reads extents of the tensors of a plan's checkpoints. Used by one thread; close it when done."""

    def __init__(
        self,
        checkpoints: Mapping[str, Checkpoint],
        hashed: Collection[str],
        fetching: Fetching,
        earlier: Earlier,
    ) -> None:
        """`hashed`: those of the checkpoints whose files are to be hashed; `earlier`: what runs before have seen."""
        self._checkpoints = checkpoints
        self._files: dict[FileKey, _OpenFile] = {}
        remote: dict[FileKey, SourceFile] = {}
        for model, checkpoint in checkpoints.items():
            for file in checkpoint.files:
                if isinstance(file.place, RemoteFile):
                    remote[model, file.name] = file
                else:
                    self._files[model, file.name] = _open(file)
        self._hub = HubReader(checkpoints, remote, hashed, fetching, earlier) if remote else None
        self._hashes = {key: _Hash(file) for key, file in self._files.items() if key[0] in hashed}

    def read_into(self, buffer: Tensor, model: str, name: str, start: int) -> None:
        """Fill `buffer` with the bytes of tensor `name` from `start` on. Raises CheckpointError."""
        entry = self._checkpoints[model].tensors[name]
        key = (model, entry.file.name)
        view = buffer.numpy().data
        if key not in self._files:
            assert self._hub
            self._hub.read_into(view, model, name, start)
            return
        file = self._files[key]
        try:
            file.read_into(view, entry.start + start)
        except OSError as error:
            raise file.changed(f"cannot be read: {error.strerror}") from error
        if key in self._hashes:
            self._hashes[key].hash_read(view, entry.start + start)

    def finish(self) -> Mapping[FileKey, str]:
        """The sha256, hex, of every file that is hashed, after reading what is left of it.

        Raises CheckpointError if any file changed, hashed or not.
        """
        hashes = {key: file_hash.finish() for key, file_hash in self._hashes.items()}
        for key, file in self._files.items():
            file.check_unchanged()
            if file.file.sha256 and hashes.get(key, file.file.sha256) != file.file.sha256:
                what = f"is damaged: its sha256 is {hashes[key]}, the Hub lists {file.file.sha256}"
                raise Damaged(Problem(what, str(file.file.place), "remove it from the cache, and download it again"))
        return {**hashes, **(self._hub.finish() if self._hub else {})}

    @property
    def unchecked(self) -> Sequence[SourceFile]:
        """Once finished: files that are needed whole, and were not held against the sha256 that the Hub lists."""
        return self._hub.unchecked if self._hub else ()

    def newly_checked(self) -> list[str]:
        """Files that were held against what the Hub lists since this was asked last."""
        return self._hub.newly_checked() if self._hub else []

    def newly_hashed(self) -> list[tuple[str, Begun]]:
        """How far files on the Hub were hashed, step by step since this was asked last."""
        return self._hub.newly_hashed() if self._hub else []

    def expect(self, steps: Sequence[Step], needed: Collection[Name]) -> None:
        """What will be read, in order, so that what is on the Hub can be fetched ahead.

        `needed` is that and what runs before this one have read.
        """
        if self._hub:
            self._hub.expect(steps, needed)

    def passed(self, step: int) -> None:
        """All reads up to this step were made."""
        if self._hub:
            self._hub.passed(step)

    def stop(self) -> None:
        """Let nobody wait for the Hub any more."""
        if self._hub:
            self._hub.stop()

    def close(self) -> None:
        """Close all files."""
        if self._hub:
            self._hub.close()
        files, self._files = self._files, {}
        for file in files.values():
            os.close(file.fd)


def _open(file: SourceFile) -> _OpenFile:
    try:
        opened = _OpenFile(file)
    except OSError as error:
        raise CheckpointError(Problem(f"cannot be opened: {error.strerror}", str(file.place))) from error
    opened.check_unchanged()
    return opened
