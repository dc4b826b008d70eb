"""Matrix products into buffers that each thread keeps."""

from __future__ import annotations

import torch
from torch import Tensor

from surgery.numerics.scratch import scratch

__all__ = ["product"]


def product(use: str, left: Tensor, right: Tensor) -> Tensor:
    """left @ right in f32 on the CPU, valid until this thread asks for the same `use` again."""
    rows, cols = left.shape[0], right.shape[1]
    out = scratch(use, torch.float32, rows * cols, torch.device("cpu")).view(rows, cols)
    return torch.mm(left, right, out=out)
