"""Reading what tiles need, within the budget.

What several passes need is held: read once, piece by piece as the first pass comes to it, and
looked at again by those after it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Protocol, cast

import torch
from torch import Tensor

from surgery.graph import Node, Source
from surgery.stream.budget import Budget
from surgery.stream.evaluate import Need
from surgery.stream.read import BufferPool, SourceReader

__all__ = ["Intake", "Loaded", "Reading", "Supply", "num_bytes_of"]


HELD_SHARE = 1 / 3  # of the budget: what fits is kept between the passes, so that it is read once


@dataclass(slots=True)
class Reading:
    """Source elements for one tile; `owned` are the buffers that only this tile uses."""

    values: dict[Node, tuple[int, Tensor]]  # as `Evaluation` takes them
    owned: list[Tensor]

    @property
    def num_bytes(self) -> int:
        """Bytes of the budget that this tile takes by itself."""
        return sum(buffer.numel() for buffer in self.owned)


@dataclass(slots=True)
class _Held:
    """A source tensor in memory: its first `filled` bytes are read."""

    buffer: Tensor
    filled: int = 0


def num_bytes_of(needs: Iterable[Need]) -> int:
    """Bytes on disk of what is needed."""
    return sum((stop - start) * node.type.dtype.bits // 8 for node, start, stop in needs)


class Supply(Protocol):
    """Where the passes over an output get source elements from."""

    @property
    def room(self) -> int:
        """Bytes that may be held."""
        ...

    def charge(self, num_bytes: int) -> None:
        """Wait until there is room for that much."""
        ...

    def release(self, num_bytes: int) -> None:
        """Give it back."""
        ...

    def hold(self, nodes: Iterable[Node]) -> None:
        """Make room for source tensors that are to be read only once."""
        ...

    def read(self, needs: Iterable[Need]) -> Reading:
        """What is needed, once there is room for it."""
        ...

    def read_whole(self, node: Node) -> Tensor:
        """All bytes of a source tensor, u8, not counted: the caller has done so."""
        ...

    def give_back(self, buffers: Iterable[Tensor], num_bytes: int) -> None:
        """Buffers and their bytes back."""
        ...


class Loaded:
    """A supply of sources that are in memory already, whole, as u8."""

    room = 0

    def __init__(self, sources: Mapping[Node, Tensor]) -> None:
        self._sources = sources

    def charge(self, num_bytes: int) -> None:
        """Nothing: whoever loaded them has counted it."""

    def release(self, num_bytes: int) -> None:
        """Nothing."""

    def hold(self, nodes: Iterable[Node]) -> None:
        """Nothing: they are."""

    def read(self, needs: Iterable[Need]) -> Reading:
        """Views of what is there."""
        return Reading({node: (0, self._sources[node]) for node, _, _ in needs}, [])

    def read_whole(self, node: Node) -> Tensor:
        """The bytes as they are."""
        return self._sources[node]

    def give_back(self, buffers: Iterable[Tensor], num_bytes: int) -> None:
        """Nothing."""


class Intake:
    """Source elements in, buffers and budget back. Used by one thread, but for `give_back`."""

    def __init__(self, reader: SourceReader, pool: BufferPool, budget: Budget, reserved: int) -> None:
        """`reserved` bytes of the budget are for what is needed whole, and for one tile."""
        self.budget = budget
        self._reader = reader
        self._pool = pool
        self._held: dict[Node, _Held] = {}
        self._holding = Budget(max(0, min(int(budget.total * HELD_SHARE), budget.total - reserved)))

    @property
    def room(self) -> int:
        """Bytes that may be held."""
        return self._holding.total

    def charge(self, num_bytes: int) -> None:
        """Wait until the budget has room."""
        self.budget.acquire(num_bytes)

    def release(self, num_bytes: int) -> None:
        """Bytes back to the budget."""
        self.budget.release(num_bytes)

    def hold(self, nodes: Iterable[Node]) -> None:
        """Make room for source tensors that are to be read only once, until `let_go`."""
        for node in nodes:
            self._holding.acquire(node.type.num_bytes)
            self.budget.acquire(node.type.num_bytes)
            self._held[node] = _Held(self._pool.take(node.type.num_bytes))

    def let_go(self) -> Callable[[], None]:
        """Forget what is held. Call what is returned when no tile looks at it any more."""
        held, self._held = self._held, {}
        buffers = [entry.buffer for entry in held.values()]

        def give_back() -> None:
            num_bytes = sum(buffer.numel() for buffer in buffers)
            self._holding.release(num_bytes)
            self.give_back(buffers, num_bytes)

        return give_back

    def stop(self) -> None:
        """Let nobody wait for room any more."""
        self._holding.stop()
        self.budget.stop()

    def unheld(self, needs: Iterable[Need]) -> int:
        """Bytes that reading `needs` takes of the budget."""
        return num_bytes_of(need for need in needs if need[0] not in self._held)

    def read(self, needs: Iterable[Need], written: int = 0) -> Reading:
        """What is needed, once there is room for it and for what will be `written` from it."""
        wanted = list(needs)
        self.budget.acquire(self.unheld(wanted) + written)
        reading = Reading({}, [])
        for node, start, stop in wanted:
            bits = node.type.dtype.bits
            extent = (start * bits // 8, stop * bits // 8)
            buffer = self._held_bytes(node, *extent) if node in self._held else self._read(node, *extent)
            reading.values[node] = (start, buffer)
            reading.owned += [] if node in self._held else [buffer]
        return reading

    def _held_bytes(self, node: Node, start: int, stop: int) -> Tensor:
        held = self._held[node]
        if stop > held.filled:
            kernel = cast(Source, node.kernel)
            self._reader.read_into(held.buffer[held.filled : stop], kernel.model, kernel.name, held.filled)
            held.filled = stop
        return held.buffer[start:stop]

    def _read(self, node: Node, start: int, stop: int) -> Tensor:
        kernel = cast(Source, node.kernel)
        buffer = self._pool.take(stop - start)
        self._reader.read_into(buffer, kernel.model, kernel.name, start)
        return buffer

    def read_whole(self, node: Node) -> Tensor:
        """All bytes of a source tensor, u8, not counted: the caller has done so."""
        kernel = cast(Source, node.kernel)
        buffer = torch.empty(node.type.num_bytes, dtype=torch.uint8)
        self._reader.read_into(buffer, kernel.model, kernel.name, 0)
        return buffer

    def read_bytes(self, node: Node, start: int, stop: int) -> Tensor:
        """Bytes of a source tensor, once there is room for them."""
        self.budget.acquire(stop - start)
        return self._read(node, start, stop)

    def give_back(self, buffers: Iterable[Tensor], num_bytes: int) -> None:
        """Buffers to the pool, bytes to the budget."""
        self._pool.give_back(buffers)
        self.budget.release(num_bytes)
