"""`merge.nearswap`."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

from surgery.graph import Kernel
from surgery.merging import Merge, Recipe, models_field, number_field


@dataclass(frozen=True, slots=True, kw_only=True)
class MergeNearSwap(Merge):
    """The source, drawn to a model where the two are near already.

    Reads    the same tensor of the source and the model, f32|f16|bf16 of one shape; other dtypes must be equal
    Writes   w * model + (1 - w) * source with w = t / |source - model|, at most 1; in the source's dtype
    Exact    float32, rounded once
    Raises   OpError for what the models do not share: see the options
    Source   the bits of mergekit 0.1.5 `nearswap`
    """

    num_models: ClassVar[int] = 1

    models: object = field(metadata=models_field(least=1, most=1))
    t: object = field(metadata=number_field("The distance within which a weight becomes the model's."))

    def kernel(self, recipe: Recipe) -> Kernel:
        """The source first, then the model."""
        from surgery.numerics.merge.nearswap import NearSwap

        return NearSwap(recipe.compute, recipe.dtype, recipe.shared["t"])
