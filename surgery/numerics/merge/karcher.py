"""The Karcher mean: the point of the sphere whose squared angles to all tensors add up to the least."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, cast

from surgery.graph import Span
from surgery.numerics.dtypes import torch_dtype
from surgery.numerics.merge.kernel import UNIT, MergeKernel, unit_of_sums
from surgery.types import TensorType

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["Karcher"]


@dataclass(frozen=True, slots=True)
class Karcher(MergeKernel):
    """The mean direction of the tensors, all of equal weight, times the mean of their norms.

    At most `max_iter` steps, until one is shorter than `tol`. Up to WHOLE elements the bits are
    mergekit's, and the result is kept between the passes. A larger tensor is never seen whole: every
    point that the iteration visits is a combination of the tensors, so that it runs on their Gram
    matrix in float64, and the combination is taken in float32 and rounded once.
    Source: arXiv 2603.04972; mergekit `karcher`.
    """

    num_models: int
    max_iter: int
    tol: float

    @property
    def num_inputs(self) -> int:
        """The models."""
        return self.num_models

    @property
    def reductions(self) -> int:
        """One, for all angles."""
        return int(self.num_models > 1)

    def unit(self, *inputs: TensorType) -> int | None:
        """The angles depend on the spans."""
        return unit_of_sums(*inputs)

    @property
    def scratch(self) -> int:
        """The unit vectors, the mean, its tangent, and terms of it."""
        return 4 * (self.num_models + 6)

    def partial(self, state: object, span: Span, *tiles: Tensor) -> object:
        """(The result, as of a whole tensor; the Gram matrix); either only where it may be needed."""
        import torch

        from surgery.numerics.merge.vectors import gram

        work = self.work(*tiles)
        models = [tile.cpu().to(work) for tile in tiles]
        products = gram(models) if models[0].numel() <= UNIT else torch.zeros(0)
        return self._mean(models) if span[0] == 0 else None, products

    def combine(self, state: object, partials: Iterable[object], *inputs: TensorType) -> object:
        """The result, or the coefficients of the models."""
        from surgery.numerics.merge.vectors import added

        parts = cast("list[tuple[Tensor | None, Tensor]]", list(partials))
        if len(parts) <= 1:
            return parts[0][0] if parts else None
        products = cast("list[list[float]]", added(products for _, products in parts).tolist())  # pyright: ignore
        return self._coefficients(products)

    def tile(self, state: object, partial: object, span: Span, *tiles: Tensor) -> tuple[Tensor | None, ...]:
        """One tile."""
        import torch

        from surgery.numerics.merge.pieces import load, pieces, store
        from surgery.numerics.scratch import scratch

        work, device = self.work(*tiles), tiles[0].device
        out = torch.empty(tiles[0].numel(), dtype=torch_dtype(self.dtype), device=device)
        for piece in pieces(out.numel()):
            if isinstance(state, torch.Tensor):
                merged = state[span[0] + piece.start : span[0] + piece.stop].to(device)
            elif state is None:
                merged = load(tiles[0][piece], work, "x")
            else:
                merged = scratch("merged", torch.float32, piece.stop - piece.start, device).zero_()
                for tile, coefficient in zip(tiles, cast("list[float]", state), strict=True):
                    x = load(load(tile[piece], work, "cast"), torch.float32, "x")
                    merged.add_(torch.mul(x, coefficient, out=scratch("scaled", torch.float32, x.numel(), device)))
                merged = load(merged, work, "result")
            store(out, piece, merged)
        return (out,)

    def _mean(self, models: Sequence[Tensor]) -> Tensor:
        """Of whole flat tensors in the working dtype, step by step as mergekit."""
        import torch

        norms = [_norm(model) for model in models]
        units = [
            torch.zeros_like(model) if float(norm) == 0 else model / norm
            for model, norm in zip(models, norms, strict=True)
        ]
        units = [unit for unit, norm in zip(units, norms, strict=True) if float(norm) > self.tol]
        if not units:
            return torch.zeros_like(models[0])
        share = 1 / self.num_models
        alphas = [share / sum([share] * len(units))] * len(units)
        mean = torch.zeros_like(units[0])
        for alpha, unit in zip(alphas, units, strict=True):
            mean += alpha * unit
        mean_norm = _norm(mean)
        mean = units[0].clone() if float(mean_norm) < self.tol else mean / mean_norm
        for _ in range(self.max_iter):
            tangent = self._tangent(mean, units, alphas)
            length = _norm(tangent)
            if float(length) < self.tol:
                break
            mean = (torch.cos(length) * mean + torch.sin(length) * (tangent / length)).to(mean.dtype)
            mean_norm = _norm(mean)
            if float(mean_norm) > self.tol:
                mean = mean / mean_norm
        return cast("Tensor", sum(share * norm for norm in norms)) * mean

    def _tangent(self, mean: Tensor, units: Sequence[Tensor], alphas: Sequence[float]) -> Tensor:
        import torch

        tangent = torch.zeros_like(mean)
        for alpha, unit in zip(alphas, units, strict=True):
            dot = torch.dot(mean, unit).clamp(-1.0, 1.0)
            angle = torch.arccos(dot)
            if float(angle) >= self.tol:
                tangent += alpha * (angle / torch.sin(angle)) * (unit - dot * mean)
        return tangent

    def _coefficients(self, products: list[list[float]]) -> list[float]:
        """What each model is multiplied by; the same steps on coefficients of the unit vectors."""
        norms = [math.sqrt(row[i]) for i, row in enumerate(products)]
        valid = [i for i, norm in enumerate(norms) if norm > self.tol]
        if not valid:
            return [0.0] * len(norms)
        cosines = [[products[i][j] / norms[i] / norms[j] for j in valid] for i in valid]
        mean = _unit([1 / len(valid)] * len(valid), cosines, self.tol)
        for _ in range(self.max_iter):
            tangent = self._tangent_coefficients(mean, cosines)
            length = math.sqrt(max(0.0, _dot(tangent, tangent, cosines)))
            if length < self.tol:
                break
            ahead = math.sin(length) / length
            mean = _unit(
                [math.cos(length) * m + ahead * t for m, t in zip(mean, tangent, strict=True)], cosines, self.tol
            )
        size = math.fsum(norms) / len(norms)
        by_model = dict(zip(valid, mean, strict=True))
        return [size * by_model[i] / norm if i in by_model else 0.0 for i, norm in enumerate(norms)]

    def _tangent_coefficients(self, mean: list[float], cosines: list[list[float]]) -> list[float]:
        tangent = [0.0] * len(mean)
        for k, row in enumerate(cosines):
            dot = min(1.0, max(-1.0, math.fsum(m * c for m, c in zip(mean, row, strict=True))))
            angle = math.acos(dot)
            if angle >= self.tol:
                pull = angle / math.sin(angle) / len(mean)
                tangent = [t - pull * dot * m for t, m in zip(tangent, mean, strict=True)]
                tangent[k] += pull
        return tangent


def _norm(x: Tensor) -> Tensor:
    import torch

    from surgery.numerics.merge.vectors import euclidean

    return euclidean(x.to(torch.float32))


def _dot(a: list[float], b: list[float], cosines: list[list[float]]) -> float:
    return math.fsum(x * y * cosines[i][j] for i, x in enumerate(a) for j, y in enumerate(b))


def _unit(mean: list[float], cosines: list[list[float]], tol: float) -> list[float]:
    """With norm 1; the first vector where the mean has none."""
    norm = math.sqrt(max(0.0, _dot(mean, mean, cosines)))
    return [m / norm for m in mean] if norm >= tol else [1.0] + [0.0] * (len(mean) - 1)
