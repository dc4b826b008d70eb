"""Writing one weight file at planned offsets, hashing each tensor and the file on the way."""

from __future__ import annotations

import hashlib
import math
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from surgery.evidence import FileRecord, TensorRecord
from surgery.graph import TileError
from surgery.layout import OutputFile, Placed

if TYPE_CHECKING:
    from surgery.stream import Chunk

__all__ = ["WeightWriter"]

READ_BACK_BYTES = 1 << 20
WRITE_BEHIND_BYTES = 4 << 20
WRITTEN_BEHIND = 4  # times as much is looked at again, to drop what has reached the disk by then


@dataclass(slots=True)
class _Progress:
    """One tensor while it is written."""

    num_bytes: int = 0
    sha256: hashlib._Hash = field(default_factory=hashlib.sha256)  # pyright: ignore[reportPrivateUsage]
    errors: list[TileError] = field(default_factory=list[TileError])


class WeightWriter:
    """Writes the chunks of one file. Bytes that come out of file order are read back for its hash."""

    def __init__(self, file: OutputFile, directory: Path) -> None:
        self._file = file
        self._fd = os.open(directory / file.name, os.O_RDWR | os.O_CREAT | os.O_TRUNC, 0o666)
        self._progress = {placed.name: _Progress() for placed in file.tensors}
        self._sha256 = hashlib.sha256()
        self._hashed = 0
        self._unsynced = 0
        self._num_whole = 0  # tensors from the first on that are written
        self._write(memoryview(file.header), 0)

    def write(self, chunk: Chunk) -> None:
        """Write a chunk; those of one tensor come in order."""
        progress = self._progress[chunk.placed.name]
        if chunk.start != progress.num_bytes or chunk.start + len(chunk.data) > _num_bytes(chunk.placed):
            raise AssertionError(f"chunk of {chunk.placed.name} at {chunk.start}, expected {progress.num_bytes}")
        progress.num_bytes += len(chunk.data)
        progress.sha256.update(chunk.data)
        progress.errors += chunk.errors
        self._write(chunk.data, len(self._file.header) + chunk.placed.start + chunk.start)
        if progress.num_bytes == _num_bytes(chunk.placed):
            self._follow()

    def _write(self, data: memoryview, position: int) -> None:
        if position == self._hashed:
            self._sha256.update(data)
            self._hashed += len(data)
        while len(data):
            count = os.pwrite(self._fd, data, position)
            data, position = data[count:], position + count
            self._unsynced += count
        if self._unsynced > WRITE_BEHIND_BYTES:
            # On Linux this starts writing dirty pages back, without waiting, so that the sync at the end finds little
            # to do, and drops clean ones: memory that the next pages can have is cheaper than fresh memory.
            start = max(0, position - WRITTEN_BEHIND * WRITE_BEHIND_BYTES)
            os.posix_fadvise(self._fd, start, position - start, os.POSIX_FADV_DONTNEED)
            self._unsynced = 0

    def finish(self) -> FileRecord:
        """Sync the file to disk and return its evidence. Every byte that was planned must be written."""
        for placed in self._file.tensors:
            if self._progress[placed.name].num_bytes != _num_bytes(placed):
                raise AssertionError(f"{placed.name} is not whole")
        self._read_back(self._file.num_bytes)
        os.fsync(self._fd)
        self.close()
        tensors = tuple(_record(name, progress) for name, progress in self._progress.items())
        return FileRecord(self._file.name, self._file.num_bytes, self._sha256.hexdigest(), tensors)

    def _follow(self) -> None:
        """Hash what is whole from the file's start on, so that little is left to read back at the end."""
        tensors = self._file.tensors
        while self._num_whole < len(tensors):
            placed = tensors[self._num_whole]
            if self._progress[placed.name].num_bytes < _num_bytes(placed):
                break
            self._num_whole += 1
            self._read_back(len(self._file.header) + placed.stop)

    def _read_back(self, stop: int) -> None:
        while self._hashed < stop:
            data = os.pread(self._fd, min(READ_BACK_BYTES, stop - self._hashed), self._hashed)
            self._sha256.update(data)
            self._hashed += len(data)

    def close(self) -> None:
        """Close the file, finished or not."""
        fd, self._fd = self._fd, -1  # forgotten first: an interrupt in between must not make us close it twice
        if fd >= 0:
            os.close(fd)


def _num_bytes(placed: Placed) -> int:
    return placed.stop - placed.start


def _record(name: str, progress: _Progress) -> TensorRecord:
    digest = progress.sha256.hexdigest()
    if not progress.errors:
        return TensorRecord(name, digest, None, None)
    num_elements = sum(error.num_elements for error in progress.errors)
    mean_square = math.fsum(value for error in progress.errors for value in error.sums_of_squares) / num_elements
    return TensorRecord(name, digest, max(error.max_abs for error in progress.errors), math.sqrt(mean_square))
