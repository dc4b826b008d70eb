"""Task vectors to one: weighted, elected by sign where asked, normalised, scaled, added to the base."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from surgery.numerics.merge.pieces import total
from surgery.numerics.scratch import scratch

__all__ = ["Mixer", "signs"]

_SIGN_BIT = {2: (torch.int16, -(1 << 15)), 4: (torch.int32, -(1 << 31))}
_NO_SUM = 1e-8  # weights whose sum is smaller are not divided by


class Mixer:
    """base + lambda * mix of weighted deltas, rounded to the working dtype after every step, as mergekit rounds.

    With `consensus` an element of a delta counts where its sign is that of the sum of all; a sum of
    zero elects the positive ones.
    """

    def __init__(
        self, weights: Sequence[float], dtype: torch.dtype, device: torch.device, consensus: bool,
        normalize: bool, lambda_: float,
    ) -> None:  # fmt: skip
        rounded = torch.tensor(weights, dtype=dtype)
        self._weights = [float(weight) for weight in rounded]
        self._consensus = consensus
        self._normalize = normalize
        self._lambda = lambda_
        sum_of_weights = rounded.sum(dim=0, keepdim=True)
        sum_of_weights[sum_of_weights.abs() < _NO_SUM] = 1
        self._divisor = sum_of_weights.to(device)
        self._smallest = min(self._weights)

    def merge(self, base: Tensor, deltas: Sequence[Tensor]) -> Tensor:
        """The merged piece, in scratch; `deltas` are overwritten."""
        for delta, weight in zip(deltas, self._weights, strict=True):
            if weight != 1.0:
                delta.mul_(weight)
        mix = self._elected(deltas) if self._consensus else self._summed(deltas)
        if self._lambda != 1:
            mix.mul_(self._lambda)
        return mix.add_(base)

    def _summed(self, deltas: Sequence[Tensor]) -> Tensor:
        mix = total(deltas, "mix")
        return mix.div_(self._divisor) if self._normalize else mix

    def _elected(self, deltas: Sequence[Tensor]) -> Tensor:
        majority = signs(total(deltas, "vote"))
        for delta in deltas:  # positive now means: of the elected sign
            delta.view(majority.dtype).bitwise_xor_(majority)
            delta.clamp_min_(0)
        mix = total(deltas, "mix")
        if self._normalize:
            mix.div_(self._sum_of_elected(deltas))
        mix.view(majority.dtype).bitwise_xor_(majority)
        return mix.add_(0.0)  # -0, of elements where nothing was elected, to 0

    def _sum_of_elected(self, deltas: Sequence[Tensor]) -> Tensor:
        """Of each element, the weights of the deltas that count; not 0. Overwrites `deltas`."""
        for delta, weight in zip(deltas, self._weights, strict=True):
            delta.gt_(0)
            if weight != 1.0:
                delta.mul_(weight)
        divisor = total(deltas, "divisor")
        if self._smallest > 0:  # then a sum of 0 means that there is nothing to divide
            return divisor.clamp_min_(self._smallest)
        none = scratch("none", divisor.dtype, divisor.numel(), divisor.device).copy_(divisor).eq_(0)
        return divisor.add_(none)


def signs(x: Tensor) -> Tensor:
    """The sign bits of `x`, which is overwritten: as integers, all other bits 0."""
    dtype, bit = _SIGN_BIT[x.element_size()]
    return x.view(dtype).bitwise_and_(bit)
