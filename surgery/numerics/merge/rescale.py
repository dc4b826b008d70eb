"""`rescale`: pruned task vectors scaled to the L1 norm that they had before.

Why on the CPU: the bits of a sum are its order, and a device's is its own. A tensor that is one span
is summed at once, by the call and in the dtype that mergekit uses; a larger one span by span in
float64, so that its last bits may differ from mergekit's.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor

from surgery.numerics.merge.kernel import UNIT
from surgery.numerics.merge.pieces import delta, load, pieces

__all__ = ["Scales", "l1_sums", "scales"]

Scales = tuple[float | None, ...]
"""For each model what its pruned delta is multiplied by; None: it stays as it is."""

_TOO_SMALL = 1e-7  # an L1 norm below it is not matched


@dataclass(frozen=True, slots=True)
class _Sum:
    rounded: Tensor  # as mergekit sums
    exact: float  # in float64, where the span may be one of several

    @classmethod
    def of(cls, x: Tensor) -> _Sum:
        """The sum of |x|, which is overwritten."""
        rounded = x.abs_().sum()
        return cls(rounded, float(x.sum(dtype=torch.float64)) if x.numel() <= UNIT else math.nan)


def l1_sums(
    start: int, which: Iterable[int], prune: Callable[[int, Tensor, int], Tensor], work: torch.dtype,
    wide: torch.dtype, *tiles: Tensor,
) -> dict[int, tuple[_Sum, _Sum]]:  # fmt: skip
    """Of each model in `which` the sums of |delta| and |pruned delta| over a span that starts at element `start`.

    Deltas are of `work`, summed as `wide`; tiles lie on the CPU.
    """
    return {i: _model_sums(start, i, prune, work, wide, tiles[0], tiles[1 + i]) for i in which}


def _model_sums(
    start: int, index: int, prune: Callable[[int, Tensor, int], Tensor], work: torch.dtype, wide: torch.dtype,
    base: Tensor, x: Tensor,
) -> tuple[_Sum, _Sum]:  # fmt: skip
    before = torch.empty(x.numel(), dtype=wide)
    after = torch.empty(x.numel(), dtype=wide)
    for piece in pieces(x.numel()):
        difference = delta(x[piece], load(base[piece], work, "base"), "delta")
        before[piece].copy_(difference)
        after[piece].copy_(prune(index, difference, start + piece.start))
    return _Sum.of(before), _Sum.of(after)


def scales(partials: Iterable[object], wide: torch.dtype, num_models: int) -> Scales:
    """From the sums of all spans."""
    spans = [cast(dict[int, tuple[_Sum, _Sum]], partial) for partial in partials]
    return tuple(_scale([sums[i] for sums in spans if i in sums], wide) for i in range(num_models))


def _scale(spans: list[tuple[_Sum, _Sum]], wide: torch.dtype) -> float | None:
    if not spans:
        return None
    before, after = (_added([sums[k] for sums in spans], wide) for k in (0, 1))
    if bool(before < _TOO_SMALL) or bool(after < _TOO_SMALL):
        return None
    return float(before / after)


def _added(sums: list[_Sum], wide: torch.dtype) -> Tensor:
    if len(sums) == 1:
        return sums[0].rounded
    return torch.tensor(math.fsum(one.exact for one in sums), dtype=wide)
