"""The arithmetic of Multi-SLERP: elementwise steps, and the scalars between them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from surgery.numerics.merge.pieces import delta, load, total
from surgery.numerics.merge.vectors import each, filled, norms
from surgery.numerics.scratch import scratch

__all__ = ["Scalars", "Tangents", "scalars_of_gram", "scalars_of_whole"]


@dataclass(frozen=True, slots=True)
class Scalars:
    """Of one tensor, [1] or [models, 1] each, in the working dtype; those not yet known are empty."""

    weights: Tensor
    padded: Tensor  # norms of the models, + eps
    mean_norm: Tensor
    dots: Tensor  # of each unit vector with the mean of norm 1
    tangent_norm: Tensor  # + eps
    average_norm: Tensor
    averages: bool  # the mean is 0: two models are averaged instead
    is_undefined: bool  # the mean of more than two is 0


class Tangents:
    """A piece of the tensors on its way through the steps."""

    def __init__(self, scalars: Scalars, base: Tensor | None, models: Sequence[Tensor], work: torch.dtype) -> None:
        self._scalars = scalars
        self._base = base
        self._models = [
            load(x, work, f"x {i}") if base is None else delta(x, base, f"x {i}") for i, x in enumerate(models)
        ]
        self._weights = each(scalars.weights.to(models[0].device))

    def _new(self, use: str) -> Tensor:
        x = self._models[0]
        return scratch(use, x.dtype, x.numel(), x.device)

    def units(self) -> list[Tensor]:
        """x / (norm + eps)."""
        padded = each(self._scalars.padded.to(self._models[0].device))
        return [torch.div(x, padded[i], out=self._new(f"unit {i}")) for i, x in enumerate(self._models)]

    def mean(self, units: Sequence[Tensor]) -> Tensor:
        """The weighted sum of the unit vectors."""
        return total(self._weighted(units), "mean")

    def _weighted(self, vectors: Sequence[Tensor]) -> list[Tensor]:
        return [torch.mul(x, self._weights[i], out=self._new(f"weighted {i}")) for i, x in enumerate(vectors)]

    def tangent(self, units: Sequence[Tensor], mean: Tensor) -> Tensor:
        """The weighted sum of the unit vectors less their parts along `mean`; overwrites `units`."""
        dots = each(self._scalars.dots.to(mean.device))
        for unit, dot in zip(units, dots, strict=True):
            unit.sub_(torch.mul(mean, dot, out=self._new("along")))
        return total(self._weighted(units), "tangent")

    def normed_mean(self, units: Sequence[Tensor]) -> Tensor:
        """The mean, of norm 1."""
        mean = self.mean(units)
        return mean.div_(self._scalars.mean_norm.to(mean.device).view(1))

    def merged(self) -> Tensor:
        """The result. Raises ValueError where it is undefined."""
        scalars = self._scalars
        if scalars.is_undefined:
            what = "has a weighted mean of 0 on the sphere: choose other weights"
            raise ValueError(f"{what}, or leave it out of `tensors` if no model changed it")
        merged = total(self._weighted(self._models), "mean") if scalars.averages else self._projected()
        return merged if self._base is None else merged.add_(self._base)

    def _projected(self) -> Tensor:
        """Back from the tangent space, with the average norm."""
        norm = self._scalars.tangent_norm
        units = self.units()
        mean = self.normed_mean(units)
        tangent = self.tangent(units, mean)
        cosine, slope = torch.cos(norm).to(mean.device).view(1), (torch.sin(norm) / norm).to(mean.device).view(1)
        mean.mul_(cosine).add_(tangent.mul_(slope))
        return mean.mul_(self._scalars.average_norm.to(mean.device).view(1))


def _start(weights: Tensor, sizes: Tensor, eps: float) -> Scalars:
    empty = torch.empty(0, dtype=weights.dtype)
    average = (sizes.squeeze(-1) * weights).sum()
    return Scalars(weights, sizes + eps, empty, empty, empty, average, averages=False, is_undefined=False)


def _with_mean(scalars: Scalars, mean_norm: Tensor, eps: float) -> Scalars:
    is_zero = bool(mean_norm < eps)
    pair = scalars.weights.numel() == 2
    return replace(scalars, mean_norm=mean_norm, averages=is_zero and pair, is_undefined=is_zero and not pair)


def scalars_of_whole(base: Tensor | None, models: Sequence[Tensor], weights: Tensor, eps: float) -> Scalars:
    """With the sums that mergekit takes; whole flat tensors on the CPU, `base` in the working dtype."""
    num_elements, work = models[0].numel(), weights.dtype

    def at(scalars: Scalars, piece: slice) -> Tangents:
        origin = None if base is None else base[piece]
        return Tangents(scalars, origin, [x[piece] for x in models], work)

    sizes = [norms(x.to(work) if base is None else x.to(work) - base) for x in models]
    scalars = _start(weights, torch.stack(sizes), eps)

    def raw_mean(piece: slice) -> Tensor:
        tangents = at(scalars, piece)
        return tangents.mean(tangents.units())

    mean = filled(num_elements, work, raw_mean)
    scalars = _with_mean(scalars, norms(mean), eps)
    if scalars.averages or scalars.is_undefined:
        return scalars
    mean.div_(scalars.mean_norm)
    dots = [
        filled(num_elements, work, lambda piece, i=i: at(scalars, piece).units()[i].mul_(mean[piece])).sum(-1)
        for i in range(len(models))
    ]
    scalars = replace(scalars, dots=torch.stack(dots).view(-1, 1))

    def tangent(piece: slice) -> Tensor:
        tangents = at(scalars, piece)
        return tangents.tangent(tangents.units(), mean[piece])

    return replace(scalars, tangent_norm=norms(filled(num_elements, work, tangent)) + eps)


def scalars_of_gram(products: Tensor, weights: Tensor, eps: float) -> Scalars:
    """The same from the dot products of the models, f64."""
    work, w = weights.dtype, weights.double()
    sizes = products.diagonal().sqrt()
    padded = sizes + eps
    units = products / padded.view(-1, 1) / padded.view(1, -1)
    mean_norm = (w @ units @ w).clamp(min=0).sqrt()
    scalars = _with_mean(_start(weights, sizes.view(-1, 1).to(work), eps), mean_norm.to(work), eps)
    if scalars.averages or scalars.is_undefined:
        return scalars
    dots = units @ w / mean_norm
    along = w - (w @ dots) / mean_norm * w  # the tangent, as a combination of the unit vectors
    tangent_norm = (along @ units @ along).clamp(min=0).sqrt() + eps
    return replace(scalars, dots=dots.view(-1, 1).to(work), tangent_norm=tangent_norm.to(work))
