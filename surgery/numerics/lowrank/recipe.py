"""`Recipe`: how tensors of several adapters become one. Imports no torch: it is a field of kernels."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

__all__ = ["Majority", "Pruning", "Recipe"]

Pruning = Literal["none", "magnitude", "random"]
Majority = Literal["total", "frequency"]


@dataclass(frozen=True, slots=True)
class Recipe:
    """Each tensor is pruned, then they are added up, or averaged where they agree with the majority's sign."""

    weights: tuple[float, ...]
    pruning: Pruning = "none"
    densities: tuple[float, ...] = ()
    draws: tuple[str, ...] = ()  # what the random mask of each is a function of
    elects_sign: bool = False
    majority: Majority = "total"
