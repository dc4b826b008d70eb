"""Reading source extents into reused buffers, hashing every file on the way.

Each file's sha256 is computed from the very bytes that are used: reads come in file order, and
what nobody asks for (the header, a dropped tensor) is read for the hash alone.
"""

from __future__ import annotations

import hashlib
import mmap
import os
import threading
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from surgery.checkpoint import Checkpoint, SourceFile
from surgery.errors import CheckpointError, Problem

__all__ = ["BufferPool", "FileKey", "SourceReader"]

FileKey = tuple[str, str]  # the model, and the file in it

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


class _HashedFile:
    """An open source file and the sha256 of its first `position` bytes."""

    def __init__(self, file: SourceFile) -> None:
        self.file = file
        self.fd = os.open(file.path, os.O_RDONLY)
        self.sha256 = hashlib.sha256()
        self.position = 0
        self._scratch = bytearray(0)

    def read_into(self, buffer: memoryview, start: int) -> None:
        filled = 0
        while filled < len(buffer):
            count = os.preadv(self.fd, [buffer[filled:]], start + filled)
            if count == 0:
                raise self.changed("is shorter than its header says")
            filled += count

    def hash_read(self, buffer: memoryview, start: int) -> None:
        """Take bytes that were just read into account, first those before them that nobody read."""
        self.catch_up(start)
        if start == self.position:
            self.sha256.update(buffer)
            self.position += len(buffer)

    def catch_up(self, stop: int) -> None:
        """Hash what lies before `stop` and is not hashed yet."""
        while self.position < stop:
            if not self._scratch:
                self._scratch = bytearray(CATCH_UP_BYTES)
            piece = memoryview(self._scratch)[: min(CATCH_UP_BYTES, stop - self.position)]
            self.read_into(piece, self.position)
            self.sha256.update(piece)
            self.position += len(piece)

    def check_unchanged(self) -> None:
        stat = os.fstat(self.fd)
        if stat.st_size != self.file.header.file_bytes or stat.st_mtime_ns != self.file.mtime_ns:
            raise self.changed("has changed since it was planned")

    def changed(self, what: str) -> CheckpointError:
        return CheckpointError(Problem(what, str(self.file.path), "plan and apply again, and let nothing write to it"))


class SourceReader:
    """Reads extents of the tensors of a plan's checkpoints. Used by one thread; close it when done."""

    def __init__(self, checkpoints: Mapping[str, Checkpoint]) -> None:
        self._checkpoints = checkpoints
        self._files: dict[FileKey, _HashedFile] = {}
        for model, checkpoint in checkpoints.items():
            for file in checkpoint.files:
                self._files[model, file.name] = _open(file)

    def read_into(self, buffer: Tensor, model: str, name: str, start: int) -> None:
        """Fill `buffer` with the bytes of tensor `name` from `start` on. Raises CheckpointError."""
        entry = self._checkpoints[model].tensors[name]
        file = self._files[model, entry.file.name]
        view = buffer.numpy().data
        try:
            file.read_into(view, entry.start + start)
        except OSError as error:
            raise file.changed(f"cannot be read: {error.strerror}") from error
        file.hash_read(view, entry.start + start)

    def finish(self) -> Mapping[FileKey, str]:
        """The sha256 of every file of every model, hex, after reading what is left of it.

        Raises CheckpointError if one changed.
        """
        for file in self._files.values():
            file.catch_up(file.file.header.file_bytes)
            file.check_unchanged()
        return {key: file.sha256.hexdigest() for key, file in self._files.items()}

    def close(self) -> None:
        """Close all files."""
        files, self._files = self._files, {}
        for file in files.values():
            os.close(file.fd)


def _open(file: SourceFile) -> _HashedFile:
    try:
        opened = _HashedFile(file)
    except OSError as error:
        raise CheckpointError(Problem(f"cannot be opened: {error.strerror}", str(file.path))) from error
    opened.check_unchanged()
    return opened
