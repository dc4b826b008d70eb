"""Task vectors pruned by chance: DARE, and DELLA, where larger magnitudes are likelier to stay.

The masks have mergekit's distribution but not its draws, which depend on the order of its work:
here they are a function of the seed, the tensor's name, the model and the element.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, cast

from surgery.graph import Span
from surgery.numerics.dtypes import torch_dtype
from surgery.numerics.merge.kernel import BLOCK, UNIT, is_whole, unit_of_sums, working_dtype
from surgery.numerics.merge.task_arithmetic import TaskArithmetic, unpruned
from surgery.types import TensorType

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from surgery.numerics.merge.masks import Draws
    from surgery.numerics.merge.rescale import Scales
    from surgery.numerics.merge.task_arithmetic import Pruner

__all__ = ["Dare", "Della"]


@dataclass(frozen=True, slots=True)
class _Dropped(TaskArithmetic):
    densities: tuple[float, ...]
    rescale: bool
    seed: int
    name: str
    streams: tuple[str, ...]

    @abstractmethod
    def masker(self, span: Span, *tiles: Tensor) -> Pruner:
        """(model, delta, first element) → its mask, 1 or 0, for the pieces of one tile in order."""

    @property
    def dropped_models(self) -> tuple[int, ...]:
        """The models with a mask."""
        return tuple(i for i, density in enumerate(self.densities) if density < 1)

    @property
    def reductions(self) -> int:
        """One, for the sums that `rescale` matches."""
        return int(self.rescale and bool(self.dropped_models))

    def unit(self, *inputs: TensorType) -> int | None:
        """The sums depend on the spans."""
        return unit_of_sums(*inputs)

    @property
    def scratch(self) -> int:
        """The values that `rescale` sums."""
        return 16

    def partial(self, state: object, span: Span, *tiles: Tensor) -> object:
        """The sums of one span, on the CPU."""
        from surgery.numerics.merge import rescale

        tiles = tuple(tile.cpu() for tile in tiles)
        work = self.work(*tiles)
        prune = self.pruner(None, span, *tiles)
        return rescale.l1_sums(span[0], self.dropped_models, prune, work, mask_dtype(work), *tiles)

    def combine(self, state: object, partials: Iterable[object], *inputs: TensorType) -> object:
        """The scales."""
        from surgery.numerics.merge import rescale

        work = torch_dtype(working_dtype(self.compute, *inputs))
        return rescale.scales(partials, mask_dtype(work), len(self.weights))

    def pruner(self, state: object, span: Span, *tiles: Tensor) -> Pruner:
        """By masks, rescaled where scales are known."""
        from surgery.numerics.merge.pieces import load

        if not self.dropped_models:
            return unpruned
        masker = self.masker(span, *tiles)
        scales = cast("Scales | None", state) or (None,) * len(self.weights)
        wide = mask_dtype(self.work(*tiles))

        def prune(index: int, delta: Tensor, start: int) -> Tensor:
            if self.densities[index] >= 1:
                return delta
            x = load(delta, wide, "wide")
            x.mul_(load(masker(index, delta, start), wide, "mask"))
            scale = scales[index]
            if scale is not None:
                x.mul_(scale)
            return x if x is delta else delta.copy_(x)

        return prune


def mask_dtype(work: torch.dtype) -> torch.dtype:
    """Where masks are applied: float16 is widened for it, as mergekit does on a CPU."""
    import torch

    return torch.float32 if work == torch.float16 else work


@dataclass(frozen=True, slots=True)
class Dare(_Dropped):
    """Each element of a task vector stays with probability `density`, rounded to the working dtype.

    `rescale` multiplies what stays so that its L1 norm is that of the whole vector.
    Source: arXiv 2311.03099; mergekit `dare_linear` and `dare_ties`.
    """

    @property
    def align(self) -> int:
        """Blocks of draws."""
        return BLOCK

    def masker(self, span: Span, *tiles: Tensor) -> Pruner:
        """Draws below the density."""
        import torch

        from surgery.numerics.merge.masks import Draws

        draws = Draws(self.seed, self.name, self.streams, tiles[0].device)
        wide = mask_dtype(self.work(*tiles))
        probabilities = [float(p) for p in torch.tensor(self.densities, dtype=wide)]

        def mask(index: int, delta: Tensor, start: int) -> Tensor:
            return draws.below(probabilities[index], index, start, delta.numel())

        return mask


@dataclass(frozen=True, slots=True)
class Della(_Dropped):
    """Elements of a task vector stay with a probability that grows with their rank in their row.

    From density - epsilon for the smallest magnitude to density + epsilon for the largest. A row runs
    along the second dimension of `shape`, as mergekit's; a vector is one row; a row of one element
    has the density itself. Of equal magnitudes, those with the lowest index rank lower. Ranks and
    probabilities are of the working dtype, in which bf16 tells few ranks apart.

    Ranks need whole rows, so that tiles are whole rows too.
    Source: DELLA-Merging, arXiv 2406.11617; mergekit `della` and `della_linear`.
    """

    epsilons: tuple[float, ...]
    shape: tuple[int, ...]

    def infer(self, *inputs: TensorType) -> tuple[TensorType, ...]:
        """Raises ValueError also if density +- epsilon is not in (0, 1)."""
        for density, epsilon in zip(self.densities, self.epsilons, strict=True):
            if 0 < density < 1 and not (density - epsilon > 0 and density + epsilon < 1):
                raise ValueError(f"density {density} +- epsilon {epsilon} is not within (0, 1)")
        return TaskArithmetic.infer(self, *inputs)

    @property
    def _plane(self) -> int:
        """Elements within which ranks are taken: all but the first dimension."""
        return max(1, math.prod(self.shape[1:] if len(self.shape) > 1 else self.shape))

    @property
    def align(self) -> int:
        """Whole rows."""
        return self._plane if self.dropped_models else 1

    @property
    def tile_align(self) -> int:
        """Whole rows too: nothing is rounded here, and draws can begin anywhere."""
        return self.align

    def unit(self, *inputs: TensorType) -> int | None:
        """Whole rows."""
        return unit_of_sums(*inputs) if is_whole(*inputs) else max(1, UNIT // self._plane) * self._plane

    @property
    def scratch(self) -> int:
        """Sorting, for which a long row is taken at once."""
        return 64

    def masker(self, span: Span, *tiles: Tensor) -> Pruner:
        """Draws below each element's probability."""
        from surgery.numerics.merge.masks import Draws

        draws = Draws(self.seed, self.name, self.streams, tiles[0].device)
        masks = {i: self._mask(i, span, draws, *tiles) for i in self.dropped_models}

        def mask(index: int, delta: Tensor, start: int) -> Tensor:
            return masks[index][start - span[0] :][: delta.numel()]

        return mask

    def _mask(self, index: int, span: Span, draws: Draws, *tiles: Tensor) -> Tensor:
        """bool, of all elements of the span."""
        import torch

        if self.densities[index] <= 0:
            return torch.zeros(span[1] - span[0], dtype=torch.bool, device=tiles[0].device)
        work = self.work(*tiles)
        step = max(1, UNIT // self._plane) * self._plane
        parts: list[Tensor] = []
        for start in range(0, span[1] - span[0], step):
            base, x = (tile[start : start + step].to(work) for tile in (tiles[0], tiles[1 + index]))
            ahead = self._probabilities(index, x.sub(base).abs_())
            at = span[0] + start
            parts.append(draws.uniform(index, (at, at + x.numel())) < ahead.float())
        return torch.cat(parts)

    def _probabilities(self, index: int, magnitudes: Tensor) -> Tensor:
        """Of whole rows, flat."""
        import torch

        density, epsilon = self.densities[index], self.epsilons[index]
        rows = self.shape[1] if len(self.shape) > 1 else self._plane
        x_PRI = magnitudes.view(-1, rows, self._plane // max(1, rows))
        order = x_PRI.sort(dim=1, stable=True).indices
        places = torch.arange(rows, device=order.device).view(1, -1, 1).expand_as(order)
        ranks = torch.empty_like(order).scatter_(1, order, places).to(mask_dtype(magnitudes.dtype)).add_(1)
        first, last = ranks.amin(dim=1, keepdim=True), ranks.amax(dim=1, keepdim=True)
        share = ((ranks - first) / (last - first)).clamp(0, 1)
        return ((density - epsilon) + share * 2 * epsilon).nan_to_num_(density).view(-1)
