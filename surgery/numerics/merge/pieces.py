"""Tiles cut into pieces that stay in a core's cache while a chain of elementwise steps runs on them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from surgery.graph import BadValue
from surgery.numerics.scratch import scratch

__all__ = ["PIECE", "delta", "load", "magnitudes", "pieces", "store", "total"]

PIECE = 1 << 18  # elements; divides every block, so that only the tensor's last piece is shorter

_IN_SEQUENCE = 4  # rows up to which torch.sum(dim=0) adds one row after the other, in every column


def pieces(num_elements: int) -> Iterator[slice]:
    """The pieces of a tile, in order."""
    for start in range(0, num_elements, PIECE):
        yield slice(start, min(start + PIECE, num_elements))


def load(x: Tensor, dtype: torch.dtype, use: str) -> Tensor:
    """`x` in `dtype`: itself where it is so already (do not overwrite it), else in scratch."""
    return x if x.dtype == dtype else scratch(use, dtype, x.numel(), x.device).copy_(x)


def delta(x: Tensor, base: Tensor, use: str) -> Tensor:
    """x - base, rounded to the dtype of `base`, in scratch."""
    return torch.sub(load(x, base.dtype, use), base, out=scratch(use, base.dtype, x.numel(), x.device))


def magnitudes(work: torch.dtype, *tiles: Tensor) -> Callable[[int, slice], Tensor]:
    """(model, slice) → |x - base| in `work`, in scratch; the first tile is the base."""

    def magnitude(index: int, piece: slice) -> Tensor:
        difference = delta(tiles[1 + index][piece], load(tiles[0][piece], work, "base"), "delta")
        return difference.abs_()

    return magnitude


def store(out: Tensor, piece: slice, x: Tensor) -> None:
    """Rounds `x` into a piece of `out`. Raises BadValue where a finite value is too large for float16."""
    rounded = out[piece].copy_(x)
    if out.dtype == torch.float16 != x.dtype and bool(rounded.isinf().any()):
        lost = (rounded.isinf() & x.isfinite()).nonzero().view(-1)
        if lost.numel():
            raise BadValue(piece.start + int(lost[0]), "is too large for float16 after the merge")


def total(rows: Sequence[Tensor], use: str) -> Tensor:
    """torch.stack(rows).sum(dim=0), in scratch: added in float32, rounded once, and never -0."""
    first = rows[0]
    out = scratch(use, first.dtype, first.numel(), first.device)
    if len(rows) == 1:
        return torch.add(first, 0.0, out=out)
    if len(rows) > _IN_SEQUENCE:  # torch adds the last columns in another order than the others
        return torch.sum(torch.stack(list(rows)), dim=0, out=out)
    if len(rows) == 2 or first.dtype == torch.float32:
        torch.add(first, rows[1], out=out)
        for row in rows[2:]:
            out.add_(row)
        return out.add_(0.0)
    wide = scratch(f"{use} sum", torch.float32, first.numel(), first.device).copy_(first)
    row_f32 = scratch(f"{use} row", torch.float32, first.numel(), first.device)
    for row in rows[1:]:
        wide.add_(row_f32.copy_(row))
    return out.copy_(wide.add_(0.0))
