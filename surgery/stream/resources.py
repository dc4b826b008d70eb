"""What a run may use."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from surgery.cost import IN_FLIGHT_SHARE, RUNTIME_BYTES, Cost
from surgery.errors import OutputError, Problem
from surgery.sizes import format_binary

__all__ = ["Resources"]


@dataclass(frozen=True, slots=True)
class Resources:
    """What a run may use: bytes beyond the imports, compute threads, and the device of the kernels."""

    memory: int
    workers: int
    device: torch.device

    def fitted(self, cost: Cost) -> Resources:
        """The same with as many workers as the memory feeds. Raises OutputError if it feeds none."""
        if self.memory < cost.min_memory:
            what = (
                f"--memory {format_binary(self.memory)} is too little: this plan needs {format_binary(cost.min_memory)}"
            )
            if cost.largest_whole:
                what += f" ({format_binary(cost.largest_whole)} for a matrix that is needed whole)"
            raise OutputError(Problem(what, fix=f"give --memory {-(-cost.min_memory // (1 << 20))}MiB or more"))
        room = self.memory - cost.min_memory
        affordable = 1 + room // (3 * cost.tile_bytes) if cost.tile_bytes else self.workers
        return Resources(self.memory, max(1, min(self.workers, affordable)), self.device)

    def in_flight(self, cost: Cost) -> int:
        """Bytes for what is read and not yet written."""
        return int((self.memory - RUNTIME_BYTES - self.workers * cost.tile_bytes) * IN_FLIGHT_SHARE)
