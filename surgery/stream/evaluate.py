"""Evaluating a node over a tile of its domain.

Two walks over the same expression: `needed` finds which elements of which sources a tile takes,
so that one thread can read them in order; `Evaluation.tile` computes with what was read. What is
needed whole (a transposed matrix, an adapter's factors) or reduced first (a mean, a threshold) is
known before either.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from surgery.cost import tile_elements
from surgery.errors import OpError, Problem, SurgeryError
from surgery.graph import BadValue, Call, Kernel, Node, Source, Span, TiledKernel, TileError
from surgery.numerics.dtypes import torch_dtype
from surgery.numerics.rounding import rounding_error
from surgery.numerics.transpose import Transpose

__all__ = ["Evaluation", "Need", "Ports", "Read"]

Need = tuple[Node, int, int]  # a source node and the elements [start, stop) of it
Read = Mapping[Node, tuple[int, Tensor]]  # the first element that was read, and the bytes
Ports = tuple[Tensor | None, ...]


@dataclass(slots=True)
class _Tile:
    """What one tile is computed from: what was read for it, and what is computed already."""

    read: Read
    done: dict[tuple[Call, Span], Ports] = field(default_factory=dict[tuple[Call, Span], Ports])


@dataclass(slots=True)
class Evaluation:
    """What is known about a group of outputs while it is streamed: states and whole values by call."""

    device: torch.device
    num_tile_elements: int
    states: dict[Call, object] = field(default_factory=dict[Call, object])
    wholes: dict[Node, Tensor] = field(default_factory=dict[Node, Tensor])  # flat, of sources and tiled kernels
    ports: dict[Call, tuple[Tensor, ...]] = field(default_factory=dict[Call, tuple[Tensor, ...]])  # of untiled ones
    charged: int = 0  # bytes of the budget that whole values take
    errors: list[TileError] = field(default_factory=list[TileError])  # of tiles that became a whole value

    def spans(self, call: Call) -> Iterator[Span]:
        """The tiles of the call's domain, in order."""
        kernel, inputs = call
        return _cut(call, tile_elements(_tiled(kernel), inputs, self.num_tile_elements))

    def first_spans(self, call: Call) -> Iterator[Span]:
        """The spans of a reduction, in order."""
        kernel, inputs = call
        unit = _tiled(kernel).unit(*(node.type for node in inputs))
        return _cut(call, unit) if unit else self.spans(call)

    def whole(self, node: Node) -> Tensor | None:
        """The value of `node`, flat, where it is known whole."""
        if node in self.wholes:
            return self.wholes[node]
        return self.ports[node.call][node.port].reshape(-1) if node.call in self.ports else None

    def needed(self, call: Call, span: Span) -> list[Need]:
        """The source elements that `span` of the call's domain takes: one range for each source."""
        ranges: dict[Node, Span] = {}
        for node, start, stop in self._needed(call, span):
            known = ranges.get(node, (start, stop))
            ranges[node] = (min(known[0], start), max(known[1], stop))
        return [(node, start, stop) for node, (start, stop) in ranges.items()]

    def _needed(self, call: Call, span: Span) -> Iterator[Need]:
        for node, start, stop in _input_ranges(call, span):
            if self.whole(node) is not None:
                continue
            if isinstance(node.kernel, Source):
                yield (node, start, stop)
            elif _tiled(node.kernel).port_steps()[node.port] is not None:
                yield from self._needed(node.call, _covering_span(node, start, stop))

    def tile(self, call: Call, span: Span, read: Read, partial: object = None) -> Ports:
        """All ports of `call` over `span`, flat, on the device. Raises OpError for a weight it cannot take."""
        return self._tile(call, span, _Tile(read), partial)

    def _tile(self, call: Call, span: Span, tile: _Tile, partial: object = None) -> Ports:
        if (call, span) not in tile.done:
            inputs = self._inputs(call, span, tile)
            try:
                tile.done[call, span] = _tiled(call[0]).tile(self.states.get(call), partial, span, *inputs)
            except (BadValue, ValueError) as problem:
                raise _located(problem, call, span) from None
        return tile.done[call, span]

    def measured(self, call: Call, span: Span, read: Read, partial: object = None) -> tuple[Ports, TileError | None]:
        """`tile`, and how far what a loader makes of it is from what it stands for, where anything is rounded."""
        tile = _Tile(read)
        ports = self._tile(call, span, tile, partial)
        exact = self._exact(call, span, tile) if _rounds(call) else None
        if exact is None:
            return ports, None
        kernel, inputs = call
        types = [node.type for node in inputs]
        restored = _tiled(kernel).restore(self.states.get(call), span[1] - span[0], ports, *types)
        return ports, rounding_error(exact, restored)

    def _exact(self, call: Call, span: Span, tile: _Tile) -> Tensor | None:
        """The elements that `span` stands for; None where they are not element for element."""
        kernel, (node, *_) = call
        step = _tiled(kernel).input_steps()[0]
        if self.whole(node) is None and isinstance(node.kernel, TiledKernel) and node.kernel.keeps_value:
            same_domain = node.kernel.port_steps()[node.port] == step
            return self._exact(node.call, span, tile) if same_domain else None
        return self._elements(node, *span, tile) if step == 1 and node.type.dtype.is_float else None

    def run(self, call: Call, values: Sequence[Tensor]) -> tuple[tuple[Tensor, ...], TileError | None]:
        """All ports of a kernel without tiles, and what was lost in them. Raises OpError."""
        kernel, _ = call
        try:
            ports = kernel.run(*values)
        except (BadValue, ValueError) as problem:
            raise _located(problem, call, (0, 0)) from None
        return ports, kernel.measure(values, ports)

    def combine(self, call: Call, partials: Iterator[object]) -> None:
        """The next state of `call`. Raises OpError."""
        kernel, inputs = call
        types = [node.type for node in inputs]
        try:
            self.states[call] = _tiled(kernel).combine(self.states.get(call), partials, *types)
        except SurgeryError:  # of reading, or of a partial result, which says where already
            raise
        except (BadValue, ValueError) as problem:
            raise _located(problem, call, (0, 0)) from None

    def partial(self, call: Call, span: Span, read: Read) -> object:
        """What `span` adds to the state of `call`."""
        inputs = self._inputs(call, span, _Tile(read))
        try:
            return _tiled(call[0]).partial(self.states.get(call), span, *inputs)
        except (BadValue, ValueError) as problem:
            raise _located(problem, call, span) from None

    def _inputs(self, call: Call, span: Span, tile: _Tile) -> list[Tensor]:
        return [self._elements(node, start, stop, tile) for node, start, stop in _input_ranges(call, span)]

    def _elements(self, node: Node, start: int, stop: int, tile: _Tile) -> Tensor:
        whole = self.whole(node)
        if whole is not None:
            return whole[start:stop]
        if isinstance(node.kernel, Source):
            first, raw = tile.read[node]
            return raw.view(torch_dtype(node.type.dtype))[start - first : stop - first].to(self.device)
        kernel = _tiled(node.kernel)
        step = kernel.port_steps()[node.port]
        if step is None:
            return self.whole_port(node)
        span = _covering_span(node, start, stop)
        value = self._tile(node.call, span, tile)[node.port]
        assert value is not None
        first = span[0] // step
        return value[start - first : stop - first]

    def whole_port(self, node: Node) -> Tensor:
        """The value, flat, of a port that comes from the state alone."""
        types = [child.type for child in node.inputs]
        return _tiled(node.kernel).whole_ports(self.states.get(node.call), *types)[node.port].to(self.device)


def _tiled(kernel: Kernel) -> TiledKernel:
    assert isinstance(kernel, TiledKernel), kernel
    return kernel


def _cut(call: Call, step: int) -> Iterator[Span]:
    kernel, inputs = call
    num_elements = _tiled(kernel).domain(*(node.type for node in inputs))
    for start in range(0, num_elements, step):
        yield start, min(start + step, num_elements)


def _rounds(call: Call) -> bool:
    kernel, inputs = call
    if not isinstance(kernel, TiledKernel):
        return False
    return kernel.rounds(*(node.type for node in inputs)) or (kernel.keeps_value and _rounds(inputs[0].call))


def _input_ranges(call: Call, span: Span) -> Iterator[Need]:
    kernel, inputs = call
    for node, step in zip(inputs, _tiled(kernel).input_steps(), strict=True):
        if step is None:
            yield node, 0, node.type.num_elements
        else:
            num_elements = node.type.num_elements  # an input may end before the domain does
            yield node, min(span[0] // step, num_elements), min(-(-span[1] // step), num_elements)


def _covering_span(node: Node, start: int, stop: int) -> Span:
    """The span of the domain, its start and end as the kernel aligns them, that holds elements [start, stop)."""
    kernel = _tiled(node.kernel)
    step, align = kernel.port_steps()[node.port] or 0, kernel.align
    num_elements = kernel.domain(*(child.type for child in node.inputs))
    return start * step // align * align, min(-(-stop * step // align) * align, num_elements)


def _located(problem: BadValue | ValueError, call: Call, span: Span) -> OpError:
    kernel, inputs = call
    node = inputs[0]
    if not isinstance(problem, BadValue):
        return OpError(Problem(f"`{_source_name(node)}` {problem}"))
    (first, *_) = kernel.infer(*(child.type for child in inputs))
    shape = node.type.shape if node.type.dtype.is_float else first.shape
    place = _unravel(span[0] + problem.index, shape)
    if _is_turned(node):
        place = place[::-1]
    what = f"`{_source_name(node)}` holds a value at {list(place)} that {problem.what}"
    return OpError(Problem(what, fix="repair the source, or take the tensor away with `except`"))


def _is_turned(node: Node) -> bool:
    """Whether an odd number of transposes lies between `node` and its source."""
    if isinstance(node.kernel, Source):
        return False
    return isinstance(node.kernel, Transpose) != _is_turned(node.inputs[0])


def _source_name(node: Node) -> str:
    while not isinstance(node.kernel, Source):
        node = node.inputs[0]
    return node.kernel.name


def _unravel(index: int, shape: tuple[int, ...]) -> tuple[int, ...]:
    place: list[int] = []
    for size in reversed(shape):
        index, remainder = divmod(index, size)
        place.append(remainder)
    return tuple(reversed(place))
