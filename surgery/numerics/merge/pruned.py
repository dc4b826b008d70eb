"""Task vectors pruned by magnitude: TIES and Breadcrumbs.

Of equal magnitudes at a threshold, those with the lowest index count as the larger. mergekit leaves
that to an unstable sort, which is the only difference between its results and these.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, cast

from surgery.graph import Span
from surgery.numerics.dtypes import torch_dtype
from surgery.numerics.merge.kernel import BLOCK, unit_of_sums, working_dtype
from surgery.numerics.merge.task_arithmetic import TaskArithmetic, unpruned
from surgery.types import DType, TensorType

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from surgery.numerics.merge.rescale import Scales
    from surgery.numerics.merge.selection import Selection
    from surgery.numerics.merge.task_arithmetic import Pruner

__all__ = ["Breadcrumbs", "Ties"]

Band = tuple[int, int]
"""Of a model (most, fewest): its `most` largest magnitudes are kept, but for its `fewest` largest."""


@dataclass(frozen=True, slots=True)
class _State:
    num_elements: int
    selection: Selection
    scales: Scales = ()  # known after the last pass of `rescale`


@dataclass(frozen=True, slots=True)
class _Pruned(TaskArithmetic):
    densities: tuple[float, ...]
    rescale: bool

    @abstractmethod
    def band(self, index: int, num_elements: int) -> Band:
        """What model `index` keeps; (num_elements, 0): all."""

    @property
    def _pruned_models(self) -> tuple[int, ...]:
        return tuple(i for i, density in enumerate(self.densities) if density < 1)

    @property
    def _num_selecting(self) -> int:
        """Passes that find the thresholds: a dtype known to have 16 bits needs one less."""
        return 2 if self.compute in (DType.BF16, DType.F16) else 3

    @property
    def reductions(self) -> int:
        """To find the thresholds, and one more for the sums that `rescale` matches."""
        return self._num_selecting + self.rescale if self._pruned_models else 0

    @property
    def align(self) -> int:
        """Blocks in which elements at a threshold are counted."""
        return BLOCK

    def unit(self, *inputs: TensorType) -> int | None:
        """Only the sums of `rescale` depend on the spans."""
        return unit_of_sums(*inputs) if self.rescale and self._pruned_models else None

    @property
    def scratch(self) -> int:
        """Pieces and tables of counts, of a size that hardly depends on the tile's; the values that `rescale` sums."""
        return 64 if self.rescale else 48

    def partial(self, state: object, span: Span, *tiles: Tensor) -> object:
        """Counts of magnitudes, then of ties, then sums."""
        from surgery.numerics.merge import rescale, selection
        from surgery.numerics.merge.pieces import magnitudes

        known = cast("_State | None", state)
        work = self.work(*tiles)
        if known is None or known.selection.passes < self._num_selecting:
            found = known and known.selection
            return selection.count(found, span, self._pruned_models, magnitudes(work, *tiles))
        tiles = tuple(tile.cpu() for tile in tiles)
        prune = self.pruner(state, span, *tiles)
        return rescale.l1_sums(span[0], self._pruned_models, prune, work, work, *tiles)

    def combine(self, state: object, partials: Iterable[object], *inputs: TensorType) -> object:
        """The thresholds, then the scales."""
        from surgery.numerics.merge import rescale, selection

        known = cast("_State | None", state)
        work = torch_dtype(working_dtype(self.compute, *inputs))
        num_elements = inputs[0].num_elements
        if not num_elements:
            return None
        if known is None or known.selection.passes < self._num_selecting:
            targets = self._targets(num_elements)
            found = known and known.selection
            found = selection.advance(found, partials, work, self._pruned_models, lambda _: targets)
            return _State(num_elements, found)
        return _State(num_elements, known.selection, rescale.scales(partials, work, len(self.weights)))

    def _targets(self, num_elements: int) -> list[tuple[int, int]]:
        bands = [(i, self.band(i, num_elements)) for i in self._pruned_models]
        return [(i, k) for i, band in bands for k in band if 0 < k < num_elements]

    def pruner(self, state: object, span: Span, *tiles: Tensor) -> Pruner:
        """By the thresholds found, rescaled once the scales are known."""
        if state is None:
            return unpruned
        known = cast(_State, state)
        work = self.work(*tiles)
        keepers = {i: _band_keeper(self.band(i, known.num_elements), i, known, work) for i in self._pruned_models}

        def prune(index: int, delta: Tensor, start: int) -> Tensor:
            if index in keepers:
                delta = keepers[index](delta, start)
                scale = known.scales[index] if known.scales else None
                if scale is not None:
                    delta.mul_(scale)
            return delta

        return prune


def _band_keeper(band: Band, index: int, known: _State, work: torch.dtype) -> Callable[[Tensor, int], Tensor]:
    from surgery.numerics.merge.selection import Keeper
    from surgery.numerics.scratch import scratch

    most, fewest = band
    cuts = dict(zip(known.selection.targets, known.selection.cuts, strict=True))
    if most <= fewest:
        return _nothing
    largest = Keeper(cuts[index, fewest], work) if fewest else None
    kept = Keeper(cuts[index, most], work) if most < known.num_elements else None

    def keep(delta: Tensor, start: int) -> Tensor:
        if largest is None:
            return delta if kept is None else kept(delta, start)
        outliers = largest(scratch("outliers", delta.dtype, delta.numel(), delta.device).copy_(delta), start)
        return (delta if kept is None else kept(delta, start)).sub_(outliers)

    return keep


def _nothing(delta: Tensor, start: int) -> Tensor:
    del start
    return delta.zero_()


@dataclass(frozen=True, slots=True)
class Ties(_Pruned):
    """Of each task vector its largest magnitudes, then the election of signs.

    Model i keeps max(1, int(density_i * size)) elements; all at a density of 1, none at 0.
    Source: TIES-Merging, arXiv 2306.01708; mergekit `ties`.
    """

    def band(self, index: int, num_elements: int) -> Band:
        """The largest, all of them."""
        density = self.densities[index]
        if density <= 0:
            return (0, 0)
        return (num_elements if density >= 1 else max(1, int(density * num_elements)), 0)


@dataclass(frozen=True, slots=True)
class Breadcrumbs(_Pruned):
    """Of each task vector neither the gamma largest magnitudes nor the smallest: density is what remains.

    Where gamma + density > 1, fewer of the largest go. A density of 1 keeps all.
    Source: Model Breadcrumbs, arXiv 2312.06795; mergekit `breadcrumbs` and `breadcrumbs_ties`.
    """

    gammas: tuple[float, ...]

    def band(self, index: int, num_elements: int) -> Band:
        """What is left between the smallest and the largest."""
        density = self.densities[index]
        if density >= 1:
            return (num_elements, 0)
        kept = int(density * num_elements)
        smallest = max(0, num_elements - kept - int(self.gammas[index] * num_elements))
        return (num_elements - smallest, num_elements - smallest - kept)
