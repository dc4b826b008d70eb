"""Reading what tiles need, within the budget."""

from __future__ import annotations

from collections.abc import Iterable
from typing import cast

from torch import Tensor

from surgery.graph import Source
from surgery.stream.budget import Budget
from surgery.stream.evaluate import Call, Evaluation, Need, Span
from surgery.stream.read import BufferPool, SourceReader

__all__ = ["Intake", "Read", "num_bytes_of"]

Read = dict[Need, Tensor]


class Intake:
    """Source elements in, buffers and budget back."""

    def __init__(self, reader: SourceReader, pool: BufferPool, budget: Budget) -> None:
        self.budget = budget
        self._reader = reader
        self._pool = pool

    def needs(self, evaluation: Evaluation, call: Call, span: Span) -> int:
        """Bytes that `span` of the call's domain reads."""
        return sum((stop - start) * node.type.dtype.bits // 8 for node, start, stop in evaluation.needed(call, span))

    def read(self, evaluation: Evaluation, call: Call, span: Span) -> Read:
        """What `span` needs, once there is room for it."""
        self.budget.acquire(self.needs(evaluation, call, span))
        return {need: self._read_need(need) for need in evaluation.needed(call, span)}

    def _read_need(self, need: Need) -> Tensor:
        node, start, stop = need
        bits = node.type.dtype.bits
        return self._reader.read(cast(Source, node.kernel).name, start * bits // 8, stop * bits // 8)

    def read_bytes(self, name: str, start: int, stop: int) -> Tensor:
        """Bytes of a source tensor, once there is room for them."""
        self.budget.acquire(stop - start)
        return self._reader.read(name, start, stop)

    def give_back(self, buffers: Iterable[Tensor], num_bytes: int) -> None:
        """Buffers to the pool, bytes to the budget."""
        self._pool.give_back(buffers)
        self.budget.release(num_bytes)


def num_bytes_of(read: Read) -> int:
    """Bytes that were read."""
    return sum(buffer.numel() for buffer in read.values())
