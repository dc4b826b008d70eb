"""What a run may use."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from surgery.cost import IN_FLIGHT_SHARE, LARGEST_TILE, SMALLEST_TILE, WINDOW_BYTES, Cost
from surgery.errors import OutputError, Problem
from surgery.sizes import format_binary

__all__ = ["Resources"]

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
        for workers in range(self.workers, 0, -1):
            for tile in TILES:
                if tile * cost.tile_width > WINDOW_BYTES // 4 and tile > SMALLEST_TILE:
                    continue  # too few would pass at once to keep all workers busy
                if cost.memory(workers, tile, 3 * cost.passing(tile)) <= self.memory:
                    return Resources(self.memory, workers, self.device, tile)
        return Resources(self.memory, 1, self.device)

    def _too_little(self, cost: Cost) -> Problem:
        what = f"--memory {format_binary(self.memory)} is too little: this plan needs {format_binary(cost.min_memory)}"
        if cost.largest_whole:
            what += f" ({format_binary(cost.largest_whole)} for what is needed whole)"
        return Problem(what, fix=f"give --memory {-(-cost.min_memory // (1 << 20))}MiB or more")

    def in_flight(self, cost: Cost) -> int:
        """Bytes for what is read and not yet written, held tensors included."""
        return int((self.memory - cost.fixed - cost.working(self.workers, self.tile)) * IN_FLIGHT_SHARE)

    def window(self, cost: Cost) -> int:
        """Bytes of it for what only passes through."""
        return min(self.in_flight(cost), WINDOW_BYTES)
