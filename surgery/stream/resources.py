"""What a run may use."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from surgery.cost import IN_FLIGHT_SHARE, LARGEST_TILE, SMALLEST_TILE, WINDOW_BYTES, Cost
from surgery.errors import OutputError, Problem
from surgery.sizes import format_binary

__all__ = ["Resources"]

KEPT_SHARE = 1 / 16  # of the memory: freed and at hand for all threads together
MOST_KEPT = 16 << 20  # by a thread: results of a few tiles

TILES = (LARGEST_TILE, LARGEST_TILE // 2, LARGEST_TILE // 4, SMALLEST_TILE)


@dataclass(frozen=True, slots=True)
class Resources:
    """Bytes beyond the imports, compute threads, the device of the kernels, and elements of a tile."""

    memory: int
    workers: int
    device: torch.device
    tile: int = SMALLEST_TILE

    def fitted(self, cost: Cost) -> Resources:
        """The same with the largest tiles and as many workers as the memory feeds.

        Raises OutputError if it feeds none.
        """
        if self.memory < cost.min_memory:
            raise OutputError(self._too_little(cost))
        memory = self.memory - self.prefetch(cost) + cost.least_prefetch
        for workers in range(self.workers, 0, -1):
            for tile in TILES:
                if tile * cost.tile_width > WINDOW_BYTES // 4 and tile > SMALLEST_TILE:
                    continue  # too few would pass at once to keep all workers busy
                if cost.memory(workers, tile, 3 * cost.passing(tile)) <= memory:
                    return Resources(self.memory, workers, self.device, tile)
        return Resources(self.memory, 1, self.device)

    def _too_little(self, cost: Cost) -> Problem:
        what = f"--memory {format_binary(self.memory)} is too little: this plan needs {format_binary(cost.min_memory)}"
        if cost.largest_whole:
            what += f" ({format_binary(cost.largest_whole)} for what is needed whole)"
        return Problem(what, fix=f"give --memory {-(-cost.min_memory // (1 << 20))}MiB or more")

    def in_flight(self, cost: Cost) -> int:
        """Bytes for what is read and not yet written, held tensors included."""
        free = self.memory - self.prefetch(cost) + cost.least_prefetch - cost.fixed
        return int((free - cost.working(self.workers, self.tile)) * IN_FLIGHT_SHARE)

    def prefetch(self, cost: Cost) -> int:
        """Bytes for what is fetched ahead from the Hub."""
        spare = max(0, self.memory - cost.min_memory) // 2
        return min(cost.most_prefetch, cost.least_prefetch + min(spare, self.memory // 4))

    def window(self, cost: Cost) -> int:
        """Bytes of it for what only passes through."""
        return min(self.in_flight(cost), WINDOW_BYTES)

    @property
    def kept_by_a_thread(self) -> int:
        """Bytes that are free and need not be given back to the system, for each worker."""
        return min(MOST_KEPT, int(self.memory * KEPT_SHARE) // self.workers)
