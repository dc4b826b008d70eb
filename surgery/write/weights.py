"""Writing one weight file at planned offsets, hashing it on the way."""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from surgery.evidence import FileRecord, TensorRecord
from surgery.graph import TileError
from surgery.layout import OutputFile, Placed
from surgery.write.target import Target

if TYPE_CHECKING:
    from surgery.stream import Chunk, TensorHashes

__all__ = ["WeightWriter"]

READ_BACK_BYTES = 1 << 20


@dataclass(slots=True)
class _Progress:
    """One tensor while it is written."""

    num_bytes: int = 0
    errors: list[TileError] = field(default_factory=list[TileError])


class WeightWriter:
    """Writes the chunks of one file. Bytes that come out of file order are read back for its hash."""

    def __init__(self, file: OutputFile, directory: Path, hashes: TensorHashes) -> None:
        """`hashes` are those of the chunks that were written."""
        self._file = file
        self._hashes = hashes
        self._target = Target(directory / file.name, file.num_bytes)
        self._progress = {placed.name: _Progress() for placed in file.tensors}
        self._sha256 = hashlib.sha256()
        self._hashed = 0
        self._num_whole = 0  # tensors from the first on that are written
        self._write(memoryview(file.header), 0)

    def write(self, chunk: Chunk) -> None:
        """Write a chunk; those of one tensor come in order."""
        progress = self._progress[chunk.placed.name]
        if chunk.start != progress.num_bytes or chunk.start + len(chunk.data) > _num_bytes(chunk.placed):
            raise AssertionError(f"chunk of {chunk.placed.name} at {chunk.start}, expected {progress.num_bytes}")
        progress.num_bytes += len(chunk.data)
        progress.errors += chunk.errors
        self._write(chunk.data, len(self._file.header) + chunk.placed.start + chunk.start)
        if progress.num_bytes == _num_bytes(chunk.placed):
            self._follow()

    def _write(self, data: memoryview, position: int) -> None:
        if position == self._hashed:
            self._sha256.update(data)
            self._hashed += len(data)
            self._target.append(data, position)
        else:
            self._target.put(data, position)

    def finish(self) -> FileRecord:
        """Sync the file to disk and return its evidence. Every byte that was planned must be written."""
        for placed in self._file.tensors:
            if self._progress[placed.name].num_bytes != _num_bytes(placed):
                raise AssertionError(f"{placed.name} is not whole")
        self._read_back(self._file.num_bytes)
        self._target.sync()
        self.close()
        tensors = tuple(self._record(name, progress) for name, progress in self._progress.items())
        return FileRecord(self._file.name, self._file.num_bytes, self._sha256.hexdigest(), tensors)

    def _record(self, name: str, progress: _Progress) -> TensorRecord:
        digest = self._hashes.pop((self._file.name, name), hashlib.sha256()).hexdigest()
        if not progress.errors:
            return TensorRecord(name, digest, None, None)
        num_elements = sum(error.num_elements for error in progress.errors)
        mean_square = math.fsum(value for error in progress.errors for value in error.sums_of_squares) / num_elements
        return TensorRecord(name, digest, max(error.max_abs for error in progress.errors), math.sqrt(mean_square))

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
            data = self._target.read(min(READ_BACK_BYTES, stop - self._hashed), self._hashed)
            self._sha256.update(data)
            self._hashed += len(data)

    def close(self) -> None:
        """Close the file, finished or not."""
        self._target.close()


def _num_bytes(placed: Placed) -> int:
    return placed.stop - placed.start
