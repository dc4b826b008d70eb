"""Writing one weight file at planned offsets, hashing it on the way."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping
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

    def __init__(
        self, file: OutputFile, directory: Path, hashes: TensorHashes, kept: Mapping[str, TensorRecord]
    ) -> None:
        """`hashes` are those of the chunks that were written; `kept` the tensors that the file holds already."""
        self.file = file
        self._hashes = hashes
        self._evaluations = file.by_call()
        self._num_left = {
            call: sum(placed.name not in kept and _num_bytes(placed) > 0 for placed in outputs)
            for call, outputs in self._evaluations.items()
        }
        self._records = dict(kept)
        self._progress: dict[str, _Progress] = {}  # of tensors that are begun
        self._target = Target(directory / file.name, file.num_bytes)
        self._sha256 = hashlib.sha256()
        self._hashed = 0
        self._num_whole = 0  # tensors from the first on that are written
        self._write(memoryview(file.header), 0)
        self._follow()

    def write(self, chunk: Chunk) -> list[TensorRecord]:
        """Write a chunk; those of one tensor come in order. With the last one of an evaluation, the evidence of it."""
        placed = chunk.placed
        progress = self._progress.setdefault(placed.name, _Progress())
        if chunk.start != progress.num_bytes or chunk.start + len(chunk.data) > _num_bytes(placed):
            raise AssertionError(f"chunk of {placed.name} at {chunk.start}, expected {progress.num_bytes}")
        progress.num_bytes += len(chunk.data)
        progress.errors += chunk.errors
        self._write(chunk.data, len(self.file.header) + placed.start + chunk.start)
        if progress.num_bytes < _num_bytes(placed) or not chunk.data:
            return []
        self._num_left[placed.node.call] -= 1
        if self._num_left[placed.node.call]:
            return []
        records = [self._record(output.name) for output in self._evaluations[placed.node.call]]
        self._records |= {record.name: record for record in records}
        self._follow()
        return records

    def _write(self, data: memoryview, position: int) -> None:
        if position == self._hashed:
            self._sha256.update(data)
            self._hashed += len(data)
            self._target.append(data, position)
        else:
            self._target.put(data, position)

    def finish(self) -> FileRecord:
        """Sync the file to disk and return its evidence. Every byte that was planned must be written."""
        for placed in self.file.tensors:
            if placed.name not in self._records and _num_bytes(placed):
                raise AssertionError(f"{placed.name} is not whole")
        self._read_back(self.file.num_bytes)
        self._target.sync()
        self.close()
        tensors = tuple(self._records.get(placed.name) or self._record(placed.name) for placed in self.file.tensors)
        return FileRecord(self.file.name, self.file.num_bytes, self._sha256.hexdigest(), tensors)

    def _record(self, name: str) -> TensorRecord:
        digest = self._hashes.pop((self.file.name, name), hashlib.sha256()).hexdigest()
        errors = self._progress.pop(name, _Progress()).errors
        if not errors:
            return TensorRecord(name, digest, None, None)
        num_elements = sum(error.num_elements for error in errors)
        mean_square = math.fsum(value for error in errors for value in error.sums_of_squares) / num_elements
        return TensorRecord(name, digest, max(error.max_abs for error in errors), math.sqrt(mean_square))

    def _follow(self) -> None:
        """Hash what is whole from the file's start on, so that little is left to read back at the end."""
        tensors = self.file.tensors
        while self._num_whole < len(tensors):
            placed = tensors[self._num_whole]
            if placed.name not in self._records and _num_bytes(placed):
                break
            self._num_whole += 1
            self._read_back(len(self.file.header) + placed.stop)

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
