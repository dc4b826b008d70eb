"""`merge.linear`."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar, Literal

from surgery.graph import Kernel
from surgery.merging import Merge, Recipe, models_field
from surgery.op import doc


@dataclass(frozen=True, slots=True, kw_only=True)
class MergeLinear(Merge):
    """Weighted average of the models.

    Reads    the same tensor of every model, f32|f16|bf16 of one shape; `source` counts only where it is listed
    Writes   sum(weight * x), over sum(weight) with `normalize`, in the source's dtype; other dtypes must be equal
    Exact    float32, one fused multiply-add a model in the order given, rounded once
    Raises   OpError for what the models do not share: see the options
    Source   Model soups, arXiv 2203.05482; the bits of mergekit 0.1.5 `linear`
    """

    base: ClassVar[Literal["source", "optional", "none"]] = "none"

    models: object = field(metadata=models_field(weight=None))
    normalize: bool = field(default=True, metadata=doc("Divide by the sum of the weights."))

    def kernel(self, recipe: Recipe) -> Kernel:
        """The average."""
        from surgery.numerics.merge.linear import Linear

        weights = recipe.numbers["weight"]
        if self.normalize and sum(weights) == 0:
            raise ValueError("the weights add up to 0, by which nothing can be divided; `normalize: false` does not")
        return Linear(recipe.compute, recipe.dtype, weights, self.normalize)
