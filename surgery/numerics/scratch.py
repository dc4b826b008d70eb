"""Buffers that each thread keeps for its temporaries: faulting fresh pages in costs more than the arithmetic."""

from __future__ import annotations

import threading

import torch
from torch import Tensor

__all__ = ["scratch"]


class _Buffers(threading.local):
    def __init__(self) -> None:
        self.by_use: dict[tuple[str, torch.dtype, torch.device], Tensor] = {}


_BUFFERS = _Buffers()


def scratch(use: str, dtype: torch.dtype, num_elements: int, device: torch.device) -> Tensor:
    """Uninitialised [num_elements], valid until this thread asks for the same use again."""
    key = (use, dtype, device)
    buffer = _BUFFERS.by_use.get(key)
    if buffer is None or buffer.numel() < num_elements:
        buffer = _BUFFERS.by_use[key] = torch.empty(num_elements, dtype=dtype, device=device)
    return buffer[:num_elements]
