"""What applying a plan costs: bytes read, bytes written, memory. Facts of the types alone."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass

from surgery.graph import ERROR_UNIT, Call, Node, Source, TiledKernel, calls_below

__all__ = ["DEFAULT_MEMORY", "LARGEST_TILE", "SMALLEST_TILE", "Cost", "cost_of", "tile_elements"]

DEFAULT_MEMORY = 2 << 30
SMALLEST_TILE = ERROR_UNIT  # elements: a tile of f32 and what is computed from it stay in a core's cache
LARGEST_TILE = 8 * ERROR_UNIT  # fewer, longer steps in torch: threads wait less for the interpreter's lock
VALUE_BYTES = 4  # of an element between two kernels
RUNTIME_BYTES = 24 << 20  # queues, tables, and the code pages of kernels that importing torch does not touch
TENSOR_BYTES = 2600  # what one output tensor takes in the plan, in the evidence and in the manifest
FURTHER_BYTES = 1700  # what one tensor of a further model takes in the plan
IN_FLIGHT_SHARE = 0.7  # of what is left; the rest is what buffer pool and allocator keep back
WINDOW_BYTES = 32 << 20  # read and not yet written: more of it makes nothing faster
LEAST_RANGE = 1 << 19  # of a file on the Hub
CONNECTION_BYTES = 8 << 20  # what the client and its connections take
MOST_PREFETCH = 256 << 20
WORKERS_COUNTED = 4  # by `peak_memory`; each further one adds a tile


@dataclass(frozen=True, slots=True)
class Cost:
    """Bytes. `min_memory` is what cannot be done without."""

    bytes_read: int
    bytes_written: int
    num_tensors: int  # in the output
    num_further: int  # tensors of further models
    num_tile_elements: int  # of the smallest tiles that all kernels can work on
    scratch: int  # temporaries of the hungriest kernel, for each element of a tile
    tile_width: int  # bytes that one element of a tile is read and written as, at most
    largest_span: int  # temporaries of a reduction that sees its tensor at once
    cut_span: int  # of one of the spans of fixed size that a reduction is cut into; every worker may have one
    largest_whole: int  # the largest set of tensors that are needed whole at once
    largest_input: int  # the largest input of a reduction, held between its passes if there is room
    num_remote: int  # models whose weights are read from the Hub

    @property
    def min_memory(self) -> int:
        """The smallest memory with which one worker can apply the plan."""
        return self.memory(1, self.num_tile_elements, self.passing(self.num_tile_elements))

    @property
    def fixed(self) -> int:
        """What is held from the first byte to the last."""
        tables = TENSOR_BYTES * self.num_tensors + FURTHER_BYTES * self.num_further
        hub = CONNECTION_BYTES + self.least_prefetch if self.num_remote else 0
        return RUNTIME_BYTES + tables + hub

    @property
    def least_prefetch(self) -> int:
        """Of what is read from the Hub: two small ranges of each model, and a few more."""
        return LEAST_RANGE * (2 * self.num_remote + 6) if self.num_remote else 0

    @property
    def most_prefetch(self) -> int:
        """More of what is read from the Hub makes nothing faster."""
        return max(self.least_prefetch, MOST_PREFETCH) if self.num_remote else 0

    def memory(self, workers: int, tile: int, in_flight: int) -> int:
        """What `workers` with tiles of `tile` elements and `in_flight` bytes besides whole tensors take."""
        kept_back = int((in_flight + self.largest_whole) / IN_FLIGHT_SHARE)
        return self.fixed + self.working(workers, tile) + kept_back

    def working(self, workers: int, tile: int) -> int:
        """Temporaries of all workers."""
        return max(workers * max(self.tile_bytes(tile), self.cut_span), self.largest_span)

    def tile_bytes(self, tile: int) -> int:
        """A tile of at least `tile` elements with its temporaries."""
        return max(tile, self.num_tile_elements) * self.scratch

    def passing(self, tile: int) -> int:
        """In flight, at least: a tile as it is read and written."""
        return max(tile, self.num_tile_elements) * max(self.scratch, self.tile_width)

    @property
    def peak_memory(self) -> int:
        """What `apply` uses beyond its imports, at most, with the default memory."""
        streamed = self.min_memory + self.bytes_read + self.bytes_written
        ahead = min(self.most_prefetch, self.bytes_read)
        bound = self.memory(WORKERS_COUNTED, LARGEST_TILE, WINDOW_BYTES + 2 * self.largest_input) + ahead
        return max(self.min_memory, min(DEFAULT_MEMORY, bound, streamed))


def tile_elements(kernel: TiledKernel, inputs: Sequence[Node], wanted: int = SMALLEST_TILE) -> int:
    """Elements of the domain in one tile of `kernel(*inputs)`: `wanted`, as near as its blocks allow."""
    types = [node.type for node in inputs]
    whole = -(-kernel.domain(*types) // kernel.align) * kernel.align
    return min(max(1, wanted // kernel.tile_align) * kernel.tile_align, max(whole, kernel.align))


def cost_of(roots: Collection[Node], bytes_read: int, bytes_written: int, num_further: int, num_remote: int) -> Cost:
    """The cost of evaluating `roots` once each."""
    calls = dict.fromkeys(root.call for root in roots if not isinstance(root.kernel, Source))
    groups = [_Group(call) for call in {_alike(call): call for call in calls}.values()]
    return Cost(
        bytes_read=bytes_read,
        bytes_written=bytes_written,
        num_tensors=len(roots),
        num_further=num_further,
        num_tile_elements=max((group.tile for group in groups), default=0),
        scratch=max((group.scratch for group in groups), default=0),
        tile_width=max((group.width for group in groups), default=0),
        largest_span=max((group.span for group in groups), default=0),
        cut_span=max((group.cut_span for group in groups), default=0),
        largest_whole=max((group.whole for group in groups), default=0),
        largest_input=max((group.held for group in groups), default=0),
        num_remote=num_remote,
    )


def _alike(call: Call) -> object:
    """The same for calls that take the same: of a kernel on other tensors of the same types."""
    kernel, inputs = call
    is_plain = all(isinstance(node.kernel, Source) for node in inputs) and len(set(inputs)) == len(inputs)
    return (kernel, tuple(node.type for node in inputs)) if is_plain else call


class _Group:
    """What evaluating one call takes, with all below it."""

    def __init__(self, root: Call) -> None:
        calls = calls_below(root)
        sources = {node for _, inputs in calls for node in inputs if isinstance(node.kernel, Source)}
        tiled = [(kernel, inputs) for kernel, inputs in calls if isinstance(kernel, TiledKernel)]
        self.tile = max((tile_elements(kernel, inputs) for kernel, inputs in tiled), default=0)
        between = VALUE_BYTES * (len(tiled) - 1)  # what one kernel hands to the next
        self.scratch = max((kernel.scratch + between for kernel, _ in tiled), default=0)
        spans = [_span(kernel, inputs) for kernel, inputs in tiled]
        self.span = max((num_bytes for num_bytes, is_cut in spans if not is_cut), default=0)
        self.cut_span = max((num_bytes for num_bytes, is_cut in spans if is_cut), default=0)
        needed_whole = {
            node
            for kernel, inputs in tiled
            for node, step in zip(inputs, kernel.input_steps(), strict=True)
            if step is None
        }
        states = sum(kernel.state_bytes(*(node.type for node in inputs)) for kernel, inputs in tiled)
        untiled = max(map(_untiled_bytes, calls), default=0)
        self.whole = sum(node.type.num_bytes for node in needed_whole) + untiled + states
        domain = max((kernel.domain(*(node.type for node in inputs)) for kernel, inputs in tiled), default=0)
        read = sum(node.type.num_bytes for node in sources - needed_whole)
        written = sum(type_.num_bytes for type_ in root[0].infer(*(node.type for node in root[1])))
        self.width = -(-(read + written) // domain) if domain else 0
        reduces = any(kernel.reductions for kernel, _ in tiled)
        self.held = sum(node.type.num_bytes for node in sources) if reduces else 0


def _span(kernel: TiledKernel, inputs: Sequence[Node]) -> tuple[int, bool]:
    """Temporaries of one span of a reduction whose spans are fixed, and whether there are several."""
    types = [node.type for node in inputs]
    unit = kernel.unit(*types) if kernel.reductions else None
    if not unit:
        return 0, False
    domain = kernel.domain(*types)
    return min(unit, domain) * (kernel.scratch + 2 * VALUE_BYTES), unit < domain


def _untiled_bytes(call: Call) -> int:
    """Bytes that a kernel without tiles holds at once, with those below it."""
    kernel, inputs = call
    if isinstance(kernel, TiledKernel | Source):
        return 0
    types = [node.type for node in inputs]
    outputs = sum(type_.num_bytes for type_ in kernel.infer(*types))
    below = sum(_untiled_bytes(node.call) for node in inputs)
    return sum(type_.num_bytes for type_ in types) + below + outputs + kernel.workspace(*types)
