"""The sparse sums that PEFT calls combination types, over tensors of one shape.

Source: PEFT 0.21.2, `utils/merge_utils.py`, whose bits these have for up to 15 tensors: torch adds that few
one after the other, which saves stacking them. Where magnitudes tie at the threshold, the lowest index
is kept, while torch.topk's choice depends on its build; random masks are a function of a text, not of
torch's global generator.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from surgery.numerics.lowrank.factors import generator
from surgery.numerics.lowrank.recipe import Recipe

__all__ = ["merged", "pruned_at_random", "pruned_by_magnitude"]


def merged(recipe: Recipe, tensors: Iterable[Tensor]) -> Tensor:
    """The tensors pruned and added up as `recipe` says."""
    if not recipe.elects_sign:
        return _weighted_sum(_pruned(recipe, tensors), recipe.weights)
    pruned = list(_pruned(recipe, tensors))
    majority = torch.where(_sign_mass(pruned, recipe.majority) >= 0, 1, -1)
    return _disjoint_mean(pruned, majority, recipe.weights)


def _pruned(recipe: Recipe, tensors: Iterable[Tensor]) -> Iterable[Tensor]:
    for index, tensor in enumerate(tensors):
        if recipe.pruning == "none" or recipe.densities[index] >= 1:
            yield tensor
        elif recipe.pruning == "magnitude":
            yield pruned_by_magnitude(tensor, recipe.densities[index])
        else:
            yield pruned_at_random(tensor, recipe.densities[index], recipe.draws[index])


def pruned_by_magnitude(x: Tensor, density: float) -> Tensor:
    """`x` with its int(density · n) largest |elements| kept; of equal ones, those of the lowest index."""
    magnitudes = x.abs().reshape(-1)
    num_kept = int(density * x.numel())
    if num_kept == 0:
        return x * 0
    threshold = magnitudes.kthvalue(x.numel() - num_kept + 1).values
    mask = magnitudes > threshold
    ties = (magnitudes == threshold).nonzero()[: num_kept - int(mask.sum()), 0]
    mask[ties] = True
    return x * mask.reshape(x.shape)


def pruned_at_random(x: Tensor, density: float, draw: str) -> Tensor:
    """`x` with each element kept with probability `density`, and divided by it."""
    mask = torch.rand(x.shape, generator=generator(draw)) < density
    return x * mask / density


def _weighted_sum(tensors: Iterable[Tensor], weights: Sequence[float]) -> Tensor:
    total: Tensor | None = None
    for tensor, weight in zip(tensors, weights, strict=True):
        total = tensor * weight + 0.0 if total is None else total.add_(tensor * weight)
    assert total is not None
    return total


def _sign_mass(tensors: Sequence[Tensor], majority: str) -> Tensor:
    signed = tensors if majority == "total" else [tensor.sign() for tensor in tensors]
    return _weighted_sum(signed, [1.0] * len(tensors))


def _disjoint_mean(tensors: Sequence[Tensor], majority: Tensor, weights: Sequence[float]) -> Tensor:
    """The weighted sum of what agrees with the majority's sign, over the number that does."""
    total = torch.zeros_like(tensors[0])
    count = torch.zeros_like(tensors[0])
    for tensor, weight in zip(tensors, weights, strict=True):
        agrees = tensor.sign() == majority
        total += tensor * weight * agrees
        count += agrees
    return total / count.clamp(min=1.0)
