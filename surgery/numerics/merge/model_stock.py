"""Model Stock: the average of several models, drawn to their base by the angle between them."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, cast

from surgery.graph import Span
from surgery.numerics.dtypes import torch_dtype
from surgery.numerics.merge.kernel import UNIT, MergeKernel, unit_of_sums, working_dtype
from surgery.types import TensorType

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["ModelStock"]

_SMALLEST = 1e-6  # of products of norms, and of the denominator of t


@dataclass(frozen=True, slots=True)
class ModelStock(MergeKernel):
    """t mean(x_i) + (1 - t) base, t = N c / (1 + (N - 1) c), c the mean cosine of the models' deltas.

    Inputs: the base, then two models or more. c is that of the whole tensor, or, where `filter_wise`,
    of each row along the last dimension of `shape`.
    Source: arXiv 2403.19522; mergekit `model_stock`, whose bits these are; of whole tensors of more
    than WHOLE elements, c is summed in float64.
    """

    num_models: int
    filter_wise: bool
    shape: tuple[int, ...]

    @property
    def num_inputs(self) -> int:
        """The base and the models."""
        return 1 + self.num_models

    def infer(self, *inputs: TensorType) -> tuple[TensorType, ...]:
        """Raises ValueError also if there are fewer than two models."""
        if self.num_models < 2:
            raise ValueError("model stock takes a base and two models or more")
        return MergeKernel.infer(self, *inputs)

    @property
    def reductions(self) -> int:
        """One, for the cosines."""
        return 1

    @property
    def _width(self) -> int:
        return max(1, self.shape[-1] if self.filter_wise and self.shape else math.prod(self.shape))

    @property
    def _by_rows(self) -> bool:
        return self._width < math.prod(self.shape)

    def unit(self, *inputs: TensorType) -> int | None:
        """Whole rows."""
        return max(1, UNIT // self._width) * self._width if self._by_rows else unit_of_sums(*inputs)

    def state_bytes(self, *inputs: TensorType) -> int:
        """What is known of each row, with `filter_wise`."""
        return 32 * (inputs[0].num_elements // max(1, self.shape[-1] if self.shape else 1)) if self.filter_wise else 0

    @property
    def scratch(self) -> int:
        """All deltas, and a product."""
        return 4 * (self.num_models + 3)

    def partial(self, state: object, span: Span, *tiles: Tensor) -> object:
        """(Cosines [pairs, rows] of the span, Gram matrix of the deltas); either only where it may be needed."""
        import torch

        from surgery.numerics.merge.vectors import gram

        work = self.work(*tiles)
        tiles = tuple(tile.cpu() for tile in tiles)
        base = tiles[0].to(work)
        deltas = [tile.to(work) - base for tile in tiles[1:]]
        if self._by_rows:
            return _cosines([delta.view(-1, self._width) for delta in deltas]), torch.zeros(0)
        products = gram(deltas) if base.numel() <= UNIT else torch.zeros(0)
        return _cosines([delta.view(1, -1) for delta in deltas]) if span[0] == 0 else None, products

    def combine(self, state: object, partials: Iterable[object], *inputs: TensorType) -> object:
        """t of each row, or of all, in the working dtype."""
        import torch

        from surgery.numerics.merge.vectors import added

        parts = cast("list[tuple[Tensor | None, Tensor]]", list(partials))
        if not parts:
            return None
        if self._by_rows or len(parts) == 1:
            return self._share(torch.cat([cast("Tensor", cosines) for cosines, _ in parts], dim=1).mean(dim=0))
        work = torch_dtype(working_dtype(self.compute, *inputs))
        return self._share(_cosine_of_gram(added(products for _, products in parts)).to(work).view(1))

    def _share(self, cosine: Tensor) -> Tensor:
        import torch

        denominator = 1 + (self.num_models - 1) * cosine
        is_singular = denominator.abs() < _SMALLEST
        share = (self.num_models * cosine) / torch.where(is_singular, 1, denominator)
        return torch.where(is_singular, 0, share)

    def tile(self, state: object, partial: object, span: Span, *tiles: Tensor) -> tuple[Tensor | None, ...]:
        """One tile."""
        import torch

        from surgery.numerics.merge.pieces import load, pieces, store
        from surgery.numerics.merge.vectors import per_row
        from surgery.numerics.scratch import scratch

        work = self.work(*tiles)
        device = tiles[0].device
        out = torch.empty(tiles[0].numel(), dtype=torch_dtype(self.dtype), device=device)
        share = torch.empty(0) if state is None else cast("Tensor", state).to(device)
        for piece in pieces(out.numel()):
            size = piece.stop - piece.start
            t = per_row(share, self._width, span[0] + piece.start, size) if self._by_rows else share
            average = torch.add(load(tiles[1][piece], work, "x"), 0, out=scratch("average", work, size, device))
            for tile in tiles[2:]:
                average.add_(load(tile[piece], work, "x"))
            average.div_(self.num_models).mul_(t)
            store(out, piece, average.add_((1 - t) * load(tiles[0][piece], work, "base")))
        return (out,)


def _cosines(deltas: list[Tensor]) -> Tensor:
    """Of each pair of [rows, width]: [pairs, rows]."""
    import torch

    from surgery.numerics.merge.vectors import norms

    sizes = [norms(delta).squeeze(-1) for delta in deltas]
    cosines = [
        ((a * b).sum(dim=-1) / (sizes[i] * sizes[j]).clamp(min=_SMALLEST)).clamp(-1, 1)
        for i, a in enumerate(deltas)
        for j, b in enumerate(deltas)
        if i < j
    ]
    return torch.stack(cosines)


def _cosine_of_gram(products: Tensor) -> Tensor:
    norms = products.diagonal().sqrt()
    cosines = (products / (norms.view(-1, 1) * norms).clamp(min=_SMALLEST)).clamp(-1, 1)
    upper = cosines.triu(1)
    pairs = norms.numel() * (norms.numel() - 1) // 2
    return upper.sum() / pairs
