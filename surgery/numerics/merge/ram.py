"""Reinforced agent merging: what one model alone has changed is kept whole, what several have is averaged."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, cast

from surgery.graph import Span
from surgery.numerics.dtypes import torch_dtype
from surgery.numerics.merge.kernel import MergeKernel
from surgery.types import TensorType

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["Ram", "RamPlus"]


@dataclass(frozen=True, slots=True)
class Ram(MergeKernel):
    """base + sum of the deltas whose magnitude is above epsilon, over their number. Inputs: the base, the models.

    Source: arXiv 2601.13572; mergekit `ram`, whose bits these are.
    """

    num_models: int
    epsilon: float

    @property
    def num_inputs(self) -> int:
        """The base and the models."""
        return 1 + self.num_models

    def tile(self, state: object, partial: object, span: Span, *tiles: Tensor) -> tuple[Tensor | None, ...]:
        """One tile."""
        import torch

        from surgery.numerics.merge.pieces import load, pieces, store, total

        work = self.work(*tiles)
        out = torch.empty(tiles[0].numel(), dtype=torch_dtype(self.dtype), device=tiles[0].device)
        for piece in pieces(out.numel()):
            base = load(tiles[0][piece], work, "base")
            deltas, _, count = self.contributions(base, *(tile[piece] for tile in tiles[1:]))
            merged = total(self.scaled(state, deltas, count), "merged")
            store(out, piece, merged + base)
        return (out,)

    def contributions(self, base: Tensor, *models: Tensor) -> tuple[list[Tensor], list[Tensor], Tensor]:
        """The deltas, 0 below epsilon; which are not, as 1 and 0; how many are not. In scratch."""
        import torch

        from surgery.numerics.merge.pieces import delta
        from surgery.numerics.scratch import scratch

        deltas = [delta(x, base, f"delta {i}") for i, x in enumerate(models)]
        present: list[Tensor] = []
        count = scratch("count", base.dtype, base.numel(), base.device).zero_()
        for i, difference in enumerate(deltas):
            size = torch.abs(difference, out=scratch(f"present {i}", base.dtype, base.numel(), base.device))
            present.append(size.gt_(self.epsilon))
            difference.mul_(size)
            count.add_(size)
        return deltas, present, count

    def scaled(self, state: object, deltas: Sequence[Tensor], count: Tensor) -> list[Tensor]:
        """The deltas, overwritten, each divided by how many share its element."""
        del state
        divisor = count.clamp(min=1)
        return [delta.div_(divisor) for delta in deltas]


@dataclass(frozen=True, slots=True)
class RamPlus(Ram):
    """`Ram`, where what a model alone has changed is scaled by lambda = 1 + r clip(rho, 0, alpha).

    rho is, for each model and this tensor, the number of shared elements over that of its own. The
    scaled deltas are float32 whatever the working dtype, and the result is rounded once.
    Source: arXiv 2601.13572; mergekit `ramplus_tl`, whose bits these are.
    """

    r: float
    alpha: float

    @property
    def reductions(self) -> int:
        """One, to count."""
        return 1

    def partial(self, state: object, span: Span, *tiles: Tensor) -> object:
        """[(shared, alone)] of each model."""
        import torch

        from surgery.numerics.merge.pieces import load, pieces

        work = self.work(*tiles)
        counts = torch.zeros(self.num_models, 2, dtype=torch.float64, device=tiles[0].device)
        for piece in pieces(tiles[0].numel()):
            base = load(tiles[0][piece], work, "base")
            _, present, count = self.contributions(base, *(tile[piece] for tile in tiles[1:]))
            alone = (count == 1).to(work)
            for i, there in enumerate(present):
                num_present = there.sum(dtype=torch.float32)
                num_alone = there.mul_(alone).sum(dtype=torch.float32)
                counts[i] += torch.stack([num_present - num_alone, num_alone])
        return counts.cpu()

    def combine(self, state: object, partials: Iterable[object], *inputs: TensorType) -> object:
        """lambda of each model, f32."""
        import torch

        counts = torch.zeros(self.num_models, 2, dtype=torch.float64)
        for partial in partials:
            counts += cast("Tensor", partial)
        shared, alone = counts.to(torch.int64).unbind(1)
        rho = shared / alone.clamp(min=self.epsilon)
        return 1 + self.r * rho.clamp(min=0, max=self.alpha)

    def scaled(self, state: object, deltas: Sequence[Tensor], count: Tensor) -> list[Tensor]:
        """Ram's, times lambda where a model is alone, f32."""
        import torch

        lambdas = cast("Tensor", state).to(count.device)
        alone = count == 1
        parts = Ram.scaled(self, state, deltas, count)
        return [part.float() * torch.where(alone, lambdas[i], 1.0) for i, part in enumerate(parts)]
