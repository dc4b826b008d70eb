"""Multi-SLERP: the weighted mean of several tensors on their sphere, in the tangent space of its first guess."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, cast

from surgery.graph import Span
from surgery.numerics.dtypes import torch_dtype
from surgery.numerics.merge.kernel import UNIT, MergeKernel, unit_of_sums, working_dtype
from surgery.types import TensorType

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from surgery.numerics.merge.tangents import Scalars

__all__ = ["MultiSlerp"]


@dataclass(frozen=True, slots=True)
class MultiSlerp(MergeKernel):
    """Inputs: the base where `has_base` (the origin of the sphere), then the models, in the order of `weights`.

    One model alone is the result. Where the weighted mean of two unit vectors is 0, they are averaged;
    of more, that is an error.
    Source: mergekit `multislerp`, whose bits these are up to WHOLE elements; beyond, the norms and
    dot products come from a Gram matrix in float64, rounded to the working dtype.
    """

    weights: tuple[float, ...]
    has_base: bool
    normalize_weights: bool
    eps: float

    @property
    def num_inputs(self) -> int:
        """The models, and a base."""
        return len(self.weights) + self.has_base

    @property
    def reductions(self) -> int:
        """One, unless there is nothing to interpolate."""
        return int(len(self.weights) > 1)

    def unit(self, *inputs: TensorType) -> int | None:
        """The scalars depend on the spans."""
        return unit_of_sums(*inputs)

    @property
    def scratch(self) -> int:
        """The base, one delta, the mean, and a product or the tangent, of whole tensors."""
        return 24

    def partial(self, state: object, span: Span, *tiles: Tensor) -> object:
        """(The scalars as of a whole tensor, the Gram matrix); either only where it may be needed."""
        import torch

        from surgery.numerics.merge.tangents import scalars_of_whole
        from surgery.numerics.merge.vectors import gram

        work = self.work(*tiles)
        tiles = tuple(tile.cpu() for tile in tiles)
        base, models = (tiles[0].to(work), tiles[1:]) if self.has_base else (None, tiles)
        whole = scalars_of_whole(base, models, self._weights(work), self.eps) if span[0] == 0 else None
        if tiles[0].numel() > UNIT:
            return whole, torch.zeros(0)
        return whole, gram([x.to(work) if base is None else x.to(work) - base for x in models])

    def _weights(self, work: torch.dtype) -> Tensor:
        import torch

        weights = torch.tensor(self.weights, dtype=work)
        return weights / weights.sum() if self.normalize_weights else weights

    def combine(self, state: object, partials: Iterable[object], *inputs: TensorType) -> object:
        """The scalars of every step."""
        from surgery.numerics.merge.tangents import scalars_of_gram
        from surgery.numerics.merge.vectors import added

        parts = cast("list[tuple[Scalars | None, Tensor]]", list(partials))
        if len(parts) <= 1:
            return parts[0][0] if parts else None
        work = torch_dtype(working_dtype(self.compute, *inputs))
        return scalars_of_gram(added(part for _, part in parts), self._weights(work), self.eps)

    def tile(self, state: object, partial: object, span: Span, *tiles: Tensor) -> tuple[Tensor | None, ...]:
        """One tile. Raises ValueError where the weighted mean is 0."""
        import torch

        from surgery.numerics.merge.pieces import load, pieces, store
        from surgery.numerics.merge.tangents import Tangents

        work = self.work(*tiles)
        base, models = (tiles[0], tiles[1:]) if self.has_base else (None, tiles)
        out = torch.empty(tiles[0].numel(), dtype=torch_dtype(self.dtype), device=tiles[0].device)
        for piece in pieces(out.numel()):
            parts = [model[piece] for model in models]
            if state is None:
                store(out, piece, load(parts[0], work, "x"))
                continue
            origin = None if base is None else load(base[piece], work, "base")
            tangents = Tangents(cast("Scalars", state), origin, parts, work)
            store(out, piece, tangents.merged())
        return (out,)
