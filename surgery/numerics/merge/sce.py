"""SCE: the elements that vary most between the models, weighted by energy, elected by sign."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, cast

from surgery.graph import Span
from surgery.numerics.dtypes import torch_dtype
from surgery.numerics.merge.kernel import BLOCK, UNIT, MergeKernel, unit_of_sums, working_dtype
from surgery.types import DType, TensorType

if TYPE_CHECKING:
    from collections.abc import Callable

    import torch
    from torch import Tensor

    from surgery.numerics.merge.selection import Selection

__all__ = ["Sce"]

_NO_ENERGY = 1e-6  # mean squares that add up to less weigh all models alike
_SMALLEST_DIVISOR = 1e-6


@dataclass(frozen=True, slots=True)
class _State:
    selection: Selection | None = None
    weights: Tensor | None = None  # of the models, in the working dtype: known after the last pass


@dataclass(frozen=True, slots=True)
class Sce(MergeKernel):
    """base + sum(w_i d_i) / sum(w_i) over the models whose delta has the sign of sum(d_i).

    Inputs: the base, then the models. First, of the elements whose variance over the models is not 0,
    all are zeroed but int(select_topk * their number) with the largest; of equal ones the lowest
    index stays (mergekit: whichever). Then w_i is the mean of d_i^2, over the sum of all.
    Source: arXiv 2408.07990; mergekit `sce`, whose bits these are otherwise up to WHOLE elements;
    beyond, the means are summed in float64. Sums are taken on the CPU.
    """

    num_models: int
    select_topk: float

    @property
    def num_inputs(self) -> int:
        """The base and the models."""
        return 1 + self.num_models

    @property
    def _num_selecting(self) -> int:
        if not 0 < self.select_topk < 1:
            return 0
        return 2 if self.compute in (DType.BF16, DType.F16) else 3

    @property
    def align(self) -> int:
        """Blocks in which elements at the threshold are counted."""
        return BLOCK

    @property
    def reductions(self) -> int:
        """To select, and for the weights."""
        return self._num_selecting + 1

    def unit(self, *inputs: TensorType) -> int | None:
        """The weights depend on the spans."""
        return unit_of_sums(*inputs)

    @property
    def scratch(self) -> int:
        """The bits to be counted, or the squares of all deltas."""
        return 12 + 4 * self.num_models

    def partial(self, state: object, span: Span, *tiles: Tensor) -> object:
        """Counts of variances, then [(mean as of a whole tensor, sum)] of each model's squares."""
        import torch

        from surgery.numerics.merge import selection
        from surgery.numerics.merge.pieces import pieces

        known = cast("_State | None", state) or _State()
        work = self.work(*tiles)
        if self._selecting(known):

            def variances(source: int, piece: slice) -> Tensor:
                del source
                return _variance(self._deltas(work, piece, *tiles))

            return selection.count(known.selection, span, (0,), variances)
        tiles = tuple(tile.cpu() for tile in tiles)
        select = self._selector(known, work)
        wholes = [torch.empty(span[1] - span[0], dtype=work) for _ in range(self.num_models)]
        for piece in pieces(span[1] - span[0]):
            deltas = select(self._deltas(work, piece, *tiles), span[0] + piece.start)
            for whole, delta in zip(wholes, deltas, strict=True):
                torch.square(delta, out=whole[piece])
        return [_energy(whole) for whole in wholes]

    def _selecting(self, known: _State) -> bool:
        return (known.selection.passes if known.selection else 0) < self._num_selecting

    def combine(self, state: object, partials: Iterable[object], *inputs: TensorType) -> object:
        """The threshold, then the weights."""
        import torch

        from surgery.numerics.merge import selection

        known = cast("_State | None", state) or _State()
        work = torch_dtype(working_dtype(self.compute, *inputs))
        if not inputs[0].num_elements:
            return None
        if self._selecting(known):

            def targets(nonzeros: object) -> list[tuple[int, int]]:
                k = int(torch.tensor(cast("dict[int, int]", nonzeros)[0]) * self.select_topk)
                return [(0, k)] if k else []

            return _State(selection.advance(known.selection, partials, work, (0,), targets))
        spans = cast("list[list[tuple[Tensor, float]]]", list(partials))
        means = [_mean([span[i] for span in spans], inputs[0].num_elements) for i in range(self.num_models)]
        energies = torch.cat(means)
        total = float(torch.sum(energies))
        weights = torch.ones_like(energies) / self.num_models if abs(total) < _NO_ENERGY else energies / total
        return _State(known.selection, weights)

    def _deltas(self, work: torch.dtype, piece: slice, *tiles: Tensor) -> list[Tensor]:
        from surgery.numerics.merge.pieces import delta, load

        base = load(tiles[0][piece], work, "base")
        return [delta(tile[piece], base, f"delta {i}") for i, tile in enumerate(tiles[1:])]

    def _selector(self, known: _State, work: torch.dtype) -> _Selector:
        """(deltas of a piece, its first element) → those of the elements selected, in place; pieces in order."""
        from surgery.numerics.merge.selection import Keeper

        if self.select_topk >= 1:
            return lambda deltas, start: deltas
        cuts = known.selection.cuts if known.selection else ()
        keeper = Keeper(cuts[0], work) if cuts else None

        def select(deltas: list[Tensor], start: int) -> list[Tensor]:
            mask = keeper(_variance(deltas), start).gt_(0) if keeper else 0
            return [delta.mul_(mask) for delta in deltas]

        return select

    def tile(self, state: object, partial: object, span: Span, *tiles: Tensor) -> tuple[Tensor | None, ...]:
        """One tile."""
        import torch

        from surgery.numerics.merge.pieces import load, pieces, store
        from surgery.numerics.merge.vectors import each

        work, device = self.work(*tiles), tiles[0].device
        out = torch.empty(tiles[0].numel(), dtype=torch_dtype(self.dtype), device=device)
        known = cast("_State | None", state) or _State()
        select = self._selector(known, work)
        weights = [] if known.weights is None else each(known.weights.to(device))
        for piece in pieces(out.numel()):
            deltas = select(self._deltas(work, piece, *tiles), span[0] + piece.start)
            store(out, piece, _elected_mean(deltas, weights).add_(load(tiles[0][piece], work, "base")))
        return (out,)


if TYPE_CHECKING:
    _Selector = Callable[[list[Tensor], int], list[Tensor]]


def _variance(deltas: list[Tensor]) -> Tensor:
    """torch.var over the models, unbiased=False, in scratch: Welford's recurrence in float64, vectorised."""
    import torch

    from surgery.numerics.scratch import scratch

    first = deltas[0]

    def new(use: str) -> Tensor:
        return scratch(use, torch.float64, first.numel(), first.device)

    mean, squares = new("mean").copy_(first), new("squares").zero_()
    for count, delta in enumerate(deltas[1:], 2):
        x = new("x").copy_(delta)
        off = torch.sub(x, mean, out=new("off"))
        mean.add_(torch.div(off, count, out=new("step")))
        squares.add_(off.mul_(x.sub_(mean)))
    out = scratch("variance", first.dtype, first.numel(), first.device)
    return out.copy_(squares.div_(len(deltas)))


def _energy(squares: Tensor) -> tuple[Tensor, float]:
    """The mean as mergekit takes it; the sum in float64, where the span may be one of several."""
    import torch

    several = squares.numel() <= UNIT
    return squares.view(1, -1).mean(dim=1), float(squares.sum(dtype=torch.float64)) if several else math.nan


def _mean(spans: list[tuple[Tensor, float]], num_elements: int) -> Tensor:
    import torch

    if len(spans) == 1:
        return spans[0][0]
    return torch.tensor([math.fsum(total for _, total in spans) / num_elements], dtype=spans[0][0].dtype)


def _elected_mean(deltas: list[Tensor], weights: Sequence[Tensor]) -> Tensor:
    """The weighted mean of the deltas with the sign of their sum, which are overwritten."""
    from surgery.numerics.merge.mixing import signs
    from surgery.numerics.merge.pieces import total

    majority = signs(total(deltas, "vote"))
    counted: list[Tensor] = []
    for delta, weight in zip(deltas, weights, strict=True):  # positive now means: of the elected sign
        delta.view(majority.dtype).bitwise_xor_(majority)
        delta.clamp_min_(0)
        counted.append(delta.gt(0).to(delta.dtype).mul_(weight))
        delta.mul_(weight)
    merged = total(deltas, "mix")
    merged.view(majority.dtype).bitwise_xor_(majority)
    return merged.add_(0.0).div_(total(counted, "divisor").clamp_(min=_SMALLEST_DIVISOR))
