"""Weighted averages."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from surgery.graph import Span
from surgery.numerics.dtypes import torch_dtype
from surgery.numerics.merge.kernel import MergeKernel

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["Linear"]


@dataclass(frozen=True, slots=True)
class Linear(MergeKernel):
    """sum(w_i x_i), over sum(w_i) where `normalize`. Inputs: the models, in the order of `weights`.

    Always accumulated in float32, one fused multiply-add a model, whatever the working dtype.
    Source: Model soups, arXiv 2203.05482; mergekit `linear`, whose bits these are.
    """

    weights: tuple[float, ...]
    normalize: bool

    @property
    def num_inputs(self) -> int:
        """One for each weight."""
        return len(self.weights)

    def tile(self, state: object, partial: object, span: Span, *tiles: Tensor) -> tuple[Tensor | None, ...]:
        """One tile."""
        import torch

        from surgery.numerics.merge.pieces import PIECE, load, pieces, store
        from surgery.numerics.merge.vectors import each
        from surgery.numerics.scratch import scratch

        first = tiles[0]
        work = self.work(*tiles)
        weights = torch.tensor(self.weights, dtype=torch.float32)
        divisor = weights.sum().to(first.device).view(1)
        divides = self.normalize and float(divisor) != 1.0
        factors = each(weights.to(first.device))
        out = torch.empty(first.numel(), dtype=torch_dtype(self.dtype), device=first.device)
        zeros = scratch("zeros", torch.float32, min(PIECE, first.numel()), first.device).zero_()
        for piece in pieces(first.numel()):
            acc = scratch("acc", torch.float32, piece.stop - piece.start, first.device)
            before = zeros[: acc.numel()]
            for tile, weight in zip(tiles, factors, strict=True):
                x = load(load(tile[piece], work, "cast"), torch.float32, "x")
                before = torch.addcmul(before, x, weight, out=acc)
            if divides:
                acc.div_(divisor)
            store(out, piece, load(acc, work, "result"))
        return (out,)
