"""What applying a plan costs: bytes read, bytes written, memory. Facts of the types alone."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from math import lcm

from surgery.graph import ERROR_UNIT, Kernel, Node, Source, TiledKernel, toposort

__all__ = ["DEFAULT_MEMORY", "LARGEST_TILE", "SMALLEST_TILE", "Cost", "cost_of", "tile_elements"]

DEFAULT_MEMORY = 2 << 30
SMALLEST_TILE = ERROR_UNIT  # elements: a tile of f32 and what is computed from it stay in a core's cache
LARGEST_TILE = 8 * ERROR_UNIT  # fewer, longer steps in torch: threads wait less for the interpreter's lock
SCRATCH_PER_ELEMENT = 40  # bytes of temporaries of the hungriest kernel, for each element of a tile
RUNTIME_BYTES = 24 << 20  # queues, tables, and the code pages of kernels that importing torch does not touch
TENSOR_BYTES = 2600  # what one output tensor takes in the plan, in the evidence and in the manifest
IN_FLIGHT_SHARE = 0.7  # of what is left; the rest is what buffer pool and allocator keep back
WINDOW_BYTES = 32 << 20  # read and not yet written: more of it makes nothing faster
WORKERS_COUNTED = 4  # by `peak_memory`; each further one adds a tile


@dataclass(frozen=True, slots=True)
class Cost:
    """Bytes. `min_memory` is what cannot be done without."""

    bytes_read: int
    bytes_written: int
    num_tensors: int  # in the output
    num_tile_elements: int  # of the smallest tiles that all kernels can work on
    largest_whole: int  # the largest set of matrices that a kernel needs whole at once
    largest_input: int  # the largest input of a reduction, held between its passes if there is room

    @property
    def min_memory(self) -> int:
        """The smallest memory with which one worker can apply the plan."""
        return self.memory(1, self.num_tile_elements, self.tile_bytes(self.num_tile_elements))

    @property
    def fixed(self) -> int:
        """What is held from the first byte to the last."""
        return RUNTIME_BYTES + TENSOR_BYTES * self.num_tensors

    def memory(self, workers: int, tile: int, in_flight: int) -> int:
        """What `workers` with tiles of `tile` elements and `in_flight` bytes besides whole matrices take."""
        kept_back = int((in_flight + self.largest_whole) / IN_FLIGHT_SHARE)
        return self.fixed + workers * self.tile_bytes(tile) + kept_back

    def tile_bytes(self, tile: int) -> int:
        """A tile of at least `tile` elements with its temporaries."""
        return max(tile, self.num_tile_elements) * SCRATCH_PER_ELEMENT

    @property
    def peak_memory(self) -> int:
        """What `apply` uses beyond its imports, at most, with the default memory."""
        streamed = self.min_memory + self.bytes_read + self.bytes_written
        bound = self.memory(WORKERS_COUNTED, LARGEST_TILE, WINDOW_BYTES + 2 * self.largest_input)
        return max(self.min_memory, min(DEFAULT_MEMORY, bound, streamed))


def tile_elements(kernel: Kernel, inputs: Sequence[Node], wanted: int = SMALLEST_TILE) -> int:
    """Elements of the domain in one tile of `kernel(*inputs)`: `wanted`, as near as the blocks of all below allow."""
    kernels = {kernel, *(node.kernel for node in toposort(inputs))}
    align = lcm(ERROR_UNIT, *(below.align for below in kernels if isinstance(below, TiledKernel)))
    return max(1, wanted // align) * align


def cost_of(roots: Collection[Node], bytes_read: int, bytes_written: int) -> Cost:
    """The cost of evaluating `roots` once each."""
    nodes = [node for node in toposort(roots) if not isinstance(node.kernel, Source)]
    calls = {node.call for node in nodes}
    return Cost(
        bytes_read=bytes_read,
        bytes_written=bytes_written,
        num_tensors=len(roots),
        num_tile_elements=max((tile_elements(*call) for call in calls), default=0),
        largest_whole=max((whole_bytes(node) for node in nodes), default=0),
        largest_input=max((_held_bytes(node) for node in nodes), default=0),
    )


def _held_bytes(node: Node) -> int:
    reduces = isinstance(node.kernel, TiledKernel) and node.kernel.reduces
    return sum(child.type.num_bytes for child in node.inputs) if reduces else 0


def whole_bytes(node: Node) -> int:
    """Bytes that evaluating `node` holds at once because its kernel has no tiles."""
    if isinstance(node.kernel, TiledKernel | Source):
        return 0
    inputs = sum(child.type.num_bytes for child in node.inputs)
    return inputs + sum(whole_bytes(child) for child in node.inputs) + node.type.num_bytes
