"""`merge.nuslerp`."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar, Literal

from surgery.graph import Kernel
from surgery.merging import Merge, Recipe, models_field
from surgery.op import doc


@dataclass(frozen=True, slots=True, kw_only=True)
class MergeNuSlerp(Merge):
    """Two models interpolated on the sphere by their weights.

    Reads    the same tensor of both models, f32|f16|bf16 of one shape; other dtypes must be equal
    Writes   the point on the arc between the two at weight2 / (weight1 + weight2), in the source's dtype. Where
             `source` is not one of the two, it is their base: the arc is that of their task vectors, which is added to
             it
    Exact    float32, rounded once
    Raises   OpError for what the models do not share: see the options
    Source   the bits of mergekit 0.1.5 `nuslerp`
    """

    base: ClassVar[Literal["source", "optional", "none"]] = "optional"
    num_models: ClassVar[int] = 2

    models: object = field(metadata=models_field(least=2, most=2, weight=None))
    flatten: bool = field(
        default=True, metadata=doc("A tensor is one vector; else each row is one.", key="nuslerp_flatten")
    )
    row_wise: bool = field(
        default=False,
        metadata=doc("Without `nuslerp_flatten`: vectors run along the first dimension.", key="nuslerp_row_wise"),
    )

    def kernel(self, recipe: Recipe) -> Kernel:
        """The base, if there is one, then the two models."""
        from surgery.numerics.merge.nuslerp import NuSlerp

        first, second = recipe.numbers["weight"]
        return NuSlerp(
            recipe.compute, recipe.dtype, (first, second), recipe.has_base, self.flatten, self.row_wise, recipe.shape
        )
