"""`merge.multislerp`."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar, Literal

from surgery.graph import Kernel
from surgery.merging import Merge, Recipe, models_field
from surgery.op import doc


@dataclass(frozen=True, slots=True, kw_only=True)
class MergeMultiSlerp(Merge):
    """Several models averaged on the sphere by their weights.

    Reads    the same tensor of every model, f32|f16|bf16 of one shape; other dtypes must be equal
    Writes   the weighted barycentre in the tangent space at the weighted mean direction, back on the sphere, times the
             weighted mean norm; in the source's dtype. Where `source` is not among the models, it is their base: their
             task vectors are averaged and added to it
    Exact    float32, rounded once
    Raises   OpError for what the models do not share: see the options
    Source   the bits of mergekit 0.1.5 `multislerp`
    """

    base: ClassVar[Literal["source", "optional", "none"]] = "optional"

    models: object = field(metadata=models_field(weight=None))
    normalize_weights: bool = field(default=True, metadata=doc("Divide the weights by their sum."))
    eps: float = field(default=1e-8, metadata=doc("Norms below it count as zero."))

    def kernel(self, recipe: Recipe) -> Kernel:
        """The base, if there is one, then the models."""
        from surgery.numerics.merge.multislerp import MultiSlerp

        weights = recipe.numbers["weight"]
        if self.normalize_weights and sum(weights) == 0:
            raise ValueError("the weights add up to 0, by which nothing can be divided")
        return MultiSlerp(recipe.compute, recipe.dtype, weights, recipe.has_base, self.normalize_weights, self.eps)
