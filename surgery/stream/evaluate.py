"""Evaluating a node over a tile of its domain.

Two walks over the same expression: `needed` finds which elements of which sources a tile takes,
so that one thread can read them in order; `Evaluation.tile` computes with what was read. What is
needed whole (a transposed matrix) or reduced first (a mean) is known before either.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from surgery.cost import tile_elements
from surgery.errors import OpError, Problem
from surgery.graph import BadValue, Kernel, Node, Source, TiledKernel, TileError
from surgery.numerics.dtypes import torch_dtype
from surgery.numerics.rounding import rounding_error
from surgery.numerics.transpose import Transpose

__all__ = ["Call", "Evaluation", "Need", "Span"]

Call = tuple[Kernel, tuple[Node, ...]]
Span = tuple[int, int]
Need = tuple[Node, int, int]  # a source node and the elements [start, stop) of it


@dataclass(slots=True)
class Evaluation:
    """What is known about a group of outputs while it is streamed: states and whole values by call."""

    device: torch.device
    num_tile_elements: int
    states: dict[Call, object] = field(default_factory=dict[Call, object])
    wholes: dict[Node, Tensor] = field(default_factory=dict[Node, Tensor])
    errors: list[TileError] = field(default_factory=list[TileError])  # of tiles that became a whole value

    def spans(self, call: Call) -> Iterator[Span]:
        """The tiles of the call's domain, in order."""
        kernel, inputs = call
        assert isinstance(kernel, TiledKernel)
        num_elements = kernel.domain(*(node.type for node in inputs))
        step = tile_elements(kernel, inputs, self.num_tile_elements)
        for start in range(0, num_elements, step):
            yield start, min(start + step, num_elements)

    def needed(self, call: Call, span: Span) -> Iterator[Need]:
        """The source elements that `span` of the call's domain takes."""
        for node, start, stop in _input_ranges(call, span):
            yield from self._needed_by(node, start, stop)

    def _needed_by(self, node: Node, start: int, stop: int) -> Iterator[Need]:
        if isinstance(node.kernel, Source):
            yield (node, start, stop)
        elif node not in self.wholes:
            yield from self.needed(node.call, _domain_span(node, start, stop))

    def tile(
        self, call: Call, span: Span, read: Mapping[Need, Tensor], partial: Tensor | None = None
    ) -> tuple[Tensor | None, ...]:
        """All ports of `call` over `span`, flat, on the device. Raises OpError for a weight it cannot take."""
        kernel, _ = call
        assert isinstance(kernel, TiledKernel) and span[0] % kernel.align == 0
        inputs = self._inputs(call, span, read)
        try:
            return kernel.tile(self.states.get(call), partial, span[1] - span[0], *inputs)
        except (BadValue, ValueError) as problem:
            raise _located(problem, call, span) from None

    def measured(
        self, call: Call, span: Span, read: Mapping[Need, Tensor], partial: Tensor | None = None
    ) -> tuple[tuple[Tensor | None, ...], TileError | None]:
        """`tile`, and how far what a loader makes of it is from the source, where anything is rounded on the way."""
        ports = self.tile(call, span, read, partial)
        exact = self._exact(call, span, read) if _rounds(call) else None
        if exact is None:
            return ports, None
        kernel, inputs = call
        assert isinstance(kernel, TiledKernel)
        types = [node.type for node in inputs]
        return ports, rounding_error(exact, kernel.restore(self.states.get(call), span[1] - span[0], ports, *types))

    def _exact(self, call: Call, span: Span, read: Mapping[Need, Tensor]) -> Tensor | None:
        """The source elements that `span` was made from; None where they are not element for element."""
        node, start, stop = next(_input_ranges(call, span))
        if node in self.wholes or isinstance(node.kernel, Source):
            is_lockstep = stop - start == span[1] - span[0] and node.type.dtype.is_float
            return self._elements(node, start, stop, read) if is_lockstep else None
        return self._exact(node.call, _domain_span(node, start, stop), read)

    def partial(self, call: Call, span: Span, read: Mapping[Need, Tensor]) -> Tensor:
        """What `span` adds to the state of `call`."""
        kernel, _ = call
        assert isinstance(kernel, TiledKernel)
        try:
            return kernel.partial(*self._inputs(call, span, read)).cpu()
        except (BadValue, ValueError) as problem:
            raise _located(problem, call, span) from None

    def _inputs(self, call: Call, span: Span, read: Mapping[Need, Tensor]) -> list[Tensor]:
        return [self._elements(node, start, stop, read) for node, start, stop in _input_ranges(call, span)]

    def _elements(self, node: Node, start: int, stop: int, read: Mapping[Need, Tensor]) -> Tensor:
        if node in self.wholes:
            return self.wholes[node].reshape(-1)[start:stop]
        if isinstance(node.kernel, Source):
            raw = read[node, start, stop]
            return raw.view(torch_dtype(node.type.dtype)).to(self.device)
        return self._port(node, start, stop, read)

    def _port(self, node: Node, start: int, stop: int, read: Mapping[Need, Tensor]) -> Tensor:
        kernel = node.kernel
        assert isinstance(kernel, TiledKernel)
        if kernel.port_steps()[node.port] is None:
            types = [child.type for child in node.inputs]
            return kernel.whole_ports(self.states.get(node.call), *types)[node.port].to(self.device)
        value = self.tile(node.call, _domain_span(node, start, stop), read)[node.port]
        assert value is not None
        return value


def _rounds(call: Call) -> bool:
    kernel, inputs = call
    if not isinstance(kernel, TiledKernel):
        return False
    return kernel.rounds(*(node.type for node in inputs)) or _rounds(inputs[0].call)


def _input_ranges(call: Call, span: Span) -> Iterator[Need]:
    kernel, inputs = call
    assert isinstance(kernel, TiledKernel)
    for node, step in zip(inputs, kernel.input_steps(), strict=True):
        if step is None:
            yield node, 0, node.type.num_elements
        else:
            yield node, span[0] // step, min(-(-span[1] // step), node.type.num_elements)


def _domain_span(node: Node, start: int, stop: int) -> Span:
    kernel = node.kernel
    assert isinstance(kernel, TiledKernel)
    step = kernel.port_steps()[node.port]
    if step is None:
        return (0, 0)
    num_elements = kernel.domain(*(child.type for child in node.inputs))
    return start * step, min(stop * step, num_elements)


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
