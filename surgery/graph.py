"""Checkpoints as graphs: a `Node` is a kernel applied to inputs, typed when it is made.

Why: when every tensor that will be written is a typed expression over the tensors that are
read, names, sizes, offsets and memory are facts that need no weights, and streaming is
nothing but evaluating expressions tile by tile.

A kernel works on the flattened tensors, over a *domain* of elements (usually the elements of
the weight). `input_steps` and `port_steps` say how many elements of the domain one element of
each input or output stands for; None says that the whole tensor is needed, or that it is
known as soon as the reduction is. A kernel without steps needs all its inputs whole.

A reduction runs before the first tile, in as many passes as the kernel asks for: `partial` of
every span, then `combine`. Where the bits of a reduction depend on how it is cut, `unit` fixes the
spans, so that neither the memory nor the number of workers shows in the output.
"""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from math import lcm
from typing import TYPE_CHECKING

from surgery.types import TensorType

if TYPE_CHECKING:
    from torch import Tensor

__all__ = [
    "ERROR_UNIT",
    "BadValue",
    "Call",
    "Digests",
    "Graph",
    "Kernel",
    "Node",
    "Rule",
    "Source",
    "Span",
    "TileError",
    "TiledKernel",
    "bits_per_element",
    "calls_below",
    "rewrite",
    "toposort",
]


Span = tuple[int, int]
"""Elements [start, stop) of a kernel's domain."""


class Kernel(ABC):
    """What a node does: a frozen dataclass whose fields are all it depends on."""

    __slots__ = ()

    @property
    def label(self) -> str:
        """What a person calls the result, where its type alone does not tell (`nf4`)."""
        return ""

    @abstractmethod
    def infer(self, *inputs: TensorType) -> tuple[TensorType, ...]:
        """Types in, types out; one type for each port. Raises ValueError on a bad input."""

    @abstractmethod
    def run(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        """The reference: whole tensors in, whole tensors out, one for each port."""

    def workspace(self, *inputs: TensorType) -> int:
        """Bytes that `run` takes beside its inputs and outputs."""
        del inputs
        return 0

    def measure(self, inputs: Sequence[Tensor], outputs: Sequence[Tensor]) -> TileError | None:
        """How far what a loader makes of `outputs` is from what `inputs` say; None where nothing is lost."""
        del inputs, outputs
        return None


MOST_DIGESTS = 10_000  # that are remembered for what comes next
ERROR_UNIT = 1 << 18  # elements whose squared errors are summed by themselves; tiles are multiples of it


@dataclass(frozen=True, slots=True)
class TileError:
    """What rounding cost in one tile: max |error|, and the sum of squared errors of each unit."""

    max_abs: float
    sums_of_squares: tuple[float, ...]
    num_elements: int


class BadValue(Exception):
    """Raised by a kernel that met a weight it cannot take: its flat index in the tile, and why."""

    def __init__(self, index: int, what: str) -> None:
        super().__init__(index, what)
        self.index = index
        self.what = what


class TiledKernel(Kernel):
    """A kernel that works on tiles of its domain, after an optional reduction over all tiles."""

    __slots__ = ()

    @abstractmethod
    def domain(self, *inputs: TensorType) -> int:
        """Number of elements to be worked through."""

    @abstractmethod
    def input_steps(self) -> tuple[int | None, ...]:
        """Per input: domain elements for each of its elements; None: needed whole."""

    @abstractmethod
    def port_steps(self) -> tuple[int | None, ...]:
        """Per port: domain elements for each of its elements; None: comes from the state."""

    @property
    def align(self) -> int:
        """A tile starts at a multiple of this many domain elements."""
        return 1

    @property
    def tile_align(self) -> int:
        """A tile of the main pass is a multiple of this: of whole units of error, unless that would make it huge."""
        return lcm(ERROR_UNIT, self.align)

    @property
    def reductions(self) -> int:
        """How many times `partial` and `combine` must see every tile before the first `tile`."""
        return 0

    def unit(self, *inputs: TensorType) -> int | None:
        """Elements that one `partial` takes; None: as many as a tile has, since the bits do not depend on it."""
        del inputs
        return None

    def partial(self, state: object, span: Span, *tiles: Tensor) -> object:
        """What one span adds to the state; `state` is that of the reduction before, None in the first."""
        raise NotImplementedError

    def combine(self, state: object, partials: Iterable[object], *inputs: TensorType) -> object:
        """The next state, from the partial results of all spans, in order of the spans."""
        del state, partials, inputs
        return None

    @property
    def scratch(self) -> int:
        """Bytes of temporaries that `partial` or `tile` takes for each element of its span."""
        return 40

    @abstractmethod
    def tile(self, state: object, partial: object, span: Span, *tiles: Tensor) -> tuple[Tensor | None, ...]:
        """Main pass over `span` of the domain: a flat tensor for each port, None for a whole one.

        `partial` is what the last reduction gave for this very span, where it was kept.
        """

    def state_bytes(self, *inputs: TensorType) -> int:
        """What the state takes that the first passes leave, where that grows with the tensor."""
        del inputs
        return 0

    @property
    def keeps_value(self) -> bool:
        """Whether the output stands for the first input, so that an error is measured against what is below."""
        return False

    def rounds(self, *inputs: TensorType) -> bool:
        """Whether what a loader makes of the result can differ from the first input."""
        del inputs
        return False

    def restore(self, state: object, num_elements: int, ports: Sequence[Tensor | None], *inputs: TensorType) -> Tensor:
        """What a loader makes of a tile's ports: flat floats to be held against the first input."""
        del state, num_elements, inputs
        value = ports[0]
        assert value is not None
        return value

    def whole_ports(self, state: object, *inputs: TensorType) -> dict[int, Tensor]:
        """The ports that come from the state alone."""
        del state, inputs
        return {}


@dataclass(frozen=True, slots=True)
class Source(Kernel):
    """A tensor of a checkpoint, as it lies on disk."""

    model: str
    name: str
    type: TensorType

    def infer(self, *inputs: TensorType) -> tuple[TensorType, ...]:
        """The type in the header."""
        return (self.type,)

    def run(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        """Never called: a source is read, not computed."""
        raise NotImplementedError(self.name)


@dataclass(frozen=True, slots=True, eq=False)
class Node:
    """One tensor: port `port` of `kernel` applied to `inputs`. Made by `Graph.apply` only.

    Nodes are interned, so that equality is identity; nodes with the same `call` are
    outputs of one evaluation.
    """

    kernel: Kernel
    inputs: tuple[Node, ...]
    port: int
    type: TensorType

    @property
    def call(self) -> Call:
        """What must be evaluated to get this node: shared by all ports."""
        return (self.kernel, self.inputs)


Call = tuple[Kernel, tuple[Node, ...]]
"""A kernel and its inputs: one evaluation, all of whose ports come at once."""


class Graph:
    """Makes nodes, each only once."""

    def __init__(self) -> None:
        self._calls: dict[Call, tuple[Node, ...]] = {}
        self._types: dict[TensorType, TensorType] = {}  # millions of tensors have few types

    def apply(self, kernel: Kernel, *inputs: Node) -> tuple[Node, ...]:
        """The ports of `kernel(*inputs)`; raises ValueError if the types do not fit."""
        call = (kernel, inputs)
        if call not in self._calls:
            types = kernel.infer(*(node.type for node in inputs))
            self._calls[call] = tuple(
                Node(kernel, inputs, port, self._types.setdefault(type_, type_)) for port, type_ in enumerate(types)
            )
        return self._calls[call]


class Digests:
    """sha256, hex, of nodes: the same for the same kernels on the same inputs, whatever graph they are in."""

    def __init__(self) -> None:
        self._known: dict[Node, str] = {}  # the latest

    def of(self, node: Node) -> str:
        """The digest of one node."""
        if len(self._known) > MOST_DIGESTS:
            self._known.clear()
        for below in toposort([node]):
            if below not in self._known:
                self._known[below] = self._digest(below)
        return self._known[node]

    def _digest(self, node: Node) -> str:
        kernel = node.kernel
        parts = [type(kernel).__name__, repr(kernel), str(node.port), *(self._known[child] for child in node.inputs)]
        return hashlib.sha256("\0".join(parts).encode()).hexdigest()


def toposort(roots: Iterable[Node]) -> Iterator[Node]:
    """Every node that `roots` need, once each, inputs before what uses them."""
    seen: set[Node] = set()
    stack = [(root, False) for root in reversed(list(roots))]
    while stack:
        node, ready = stack.pop()
        if ready:
            yield node
        elif node not in seen:
            seen.add(node)
            if not node.inputs:
                yield node
                continue
            stack.append((node, True))
            stack.extend((child, False) for child in reversed(node.inputs))


def calls_below(call: Call) -> list[Call]:
    """Every evaluation that `call` needs, once each, inputs before what uses them; itself last."""
    return list(dict.fromkeys([*(node.call for node in toposort(call[1])), call]))


Rule = Callable[[Graph, Node], Node | None]
"""A rewrite: a node to an equal one that is cheaper, or None."""


def rewrite(graph: Graph, roots: Sequence[Node], rules: Sequence[Rule]) -> list[Node]:
    """`roots` with every rule applied bottom-up until none fires."""
    done: dict[Node, Node] = {}
    for node in toposort(roots):
        inputs = tuple(done[child] for child in node.inputs)
        new = node if inputs == node.inputs else graph.apply(node.kernel, *inputs)[node.port]
        done[node] = _rewrite_root(graph, new, rules)
    return [done[root] for root in roots]


def _rewrite_root(graph: Graph, node: Node, rules: Sequence[Rule]) -> Node:
    for rule in rules:
        new = rule(graph, node)
        if new is not None:
            return _rewrite_root(graph, new, rules)
    return node


def bits_per_element(node: Node) -> float:
    """Bits that all ports of a tiled node take for one element of its domain; fixed tables not counted."""
    kernel = node.kernel
    assert isinstance(kernel, TiledKernel)
    types = [child.type for child in node.inputs]
    ports = zip(kernel.infer(*types), kernel.port_steps(), strict=True)
    return 8 * sum(type_.num_bytes for type_, step in ports if step is not None) / kernel.domain(*types)
