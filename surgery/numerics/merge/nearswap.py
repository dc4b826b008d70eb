"""Interpolation that is stronger where two models are nearer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from surgery.graph import Span
from surgery.numerics.dtypes import torch_dtype
from surgery.numerics.merge.kernel import MergeKernel

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["NearSwap"]

_SMALLEST_DIFFERENCE = 1e-6


@dataclass(frozen=True, slots=True)
class NearSwap(MergeKernel):
    """w b + (1 - w) a with w = t / |a - b|, at most 1. Inputs: the base a, the model b.

    Source: mergekit `nearswap`, whose bits these are.
    """

    t: float

    @property
    def num_inputs(self) -> int:
        """Two."""
        return 2

    def tile(self, state: object, partial: object, span: Span, *tiles: Tensor) -> tuple[Tensor | None, ...]:
        """One tile."""
        import torch

        from surgery.numerics.merge.pieces import delta, load, pieces, store
        from surgery.numerics.scratch import scratch

        work = self.work(*tiles)
        out = torch.empty(tiles[0].numel(), dtype=torch_dtype(self.dtype), device=tiles[0].device)
        for piece in pieces(out.numel()):
            a, b = load(tiles[0][piece], work, "a"), load(tiles[1][piece], work, "b")
            weight = delta(b, a, "weight").abs_().clamp_(min=_SMALLEST_DIFFERENCE)
            weight.reciprocal_().mul_(self.t).clamp_(0, 1)
            merged = torch.mul(weight, b, out=scratch("merged", work, a.numel(), a.device))
            store(out, piece, merged.add_(weight.neg_().add_(1).mul_(a)))
        return (out,)
