"""What applying a plan costs: bytes read, bytes written, memory. Facts of the types alone."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from math import lcm

from surgery.graph import Kernel, Node, Source, TiledKernel, toposort

__all__ = ["DEFAULT_MEMORY", "TILE_ELEMENTS", "Cost", "cost_of", "tile_elements"]

DEFAULT_MEMORY = 2 << 30
TILE_ELEMENTS = 1 << 18  # a tile of f32 and what is computed from it stay in a core's cache
SCRATCH_PER_ELEMENT = 40  # bytes of temporaries of the hungriest kernel, for each element of a tile
RUNTIME_BYTES = 28 << 20  # headers, queues, tables, and the code pages of kernels that importing torch does not touch
IN_FLIGHT_SHARE = 0.7  # of what is left; the rest is what buffer pool and allocator keep back


@dataclass(frozen=True, slots=True)
class Cost:
    """Bytes. `min_memory` is what one worker cannot do without."""

    bytes_read: int
    bytes_written: int
    min_memory: int
    tile_bytes: int  # the largest tile with its temporaries: what each further worker adds
    largest_whole: int  # the largest set of matrices that a kernel needs whole at once

    @property
    def peak_memory(self) -> int:
        """What `apply` uses beyond its imports, at most, with the default budget."""
        return min(DEFAULT_MEMORY, self.min_memory + self.bytes_read + self.bytes_written)


def tile_elements(kernel: Kernel) -> int:
    """Elements of the domain in one tile of this kernel's evaluation."""
    align = kernel.align if isinstance(kernel, TiledKernel) else 1
    step = lcm(align, 2)
    return max(1, TILE_ELEMENTS // step) * step


def cost_of(roots: Iterable[Node], bytes_read: int, bytes_written: int) -> Cost:
    """The cost of evaluating `roots` once each."""
    nodes = list(toposort(roots))
    tile_bytes = max((tile_elements(node.kernel) * SCRATCH_PER_ELEMENT for node in nodes), default=0)
    whole = max((whole_bytes(node) for node in nodes), default=0)
    min_memory = RUNTIME_BYTES + tile_bytes + int((tile_bytes + whole) / IN_FLIGHT_SHARE)
    return Cost(bytes_read, bytes_written, min_memory, tile_bytes, whole)


def whole_bytes(node: Node) -> int:
    """Bytes that evaluating `node` holds at once because its kernel has no tiles."""
    if isinstance(node.kernel, TiledKernel | Source):
        return 0
    inputs = sum(child.type.num_bytes for child in node.inputs)
    return inputs + sum(whole_bytes(child) for child in node.inputs) + node.type.num_bytes
