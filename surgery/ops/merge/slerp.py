"""`merge.slerp`."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

from surgery.graph import Kernel
from surgery.merging import Merge, Recipe, models_field, number_field


@dataclass(frozen=True, slots=True, kw_only=True)
class MergeSlerp(Merge):
    """From the source to another model along the arc between them.

    Reads    the same tensor of the source and the model, f32|f16|bf16 of one shape; other dtypes must be equal
    Writes   at `t` = 0 the source, at 1 the model; between them spherical interpolation of each tensor as one vector,
             linear where they are nearly parallel (|cosine| > 0.9995); in the source's dtype
    Exact    float32, rounded once
    Raises   OpError for what the models do not share: see the options
    Source   the bits of mergekit 0.1.5 `slerp`, one tensor at a time
    """

    num_models: ClassVar[int] = 1

    models: object = field(metadata=models_field(least=1, most=1))
    t: object = field(metadata=number_field("Where between the source (0) and the model (1)."))

    def kernel(self, recipe: Recipe) -> Kernel:
        """The source first, then the model."""
        from surgery.numerics.merge.slerp import Slerp

        return Slerp(recipe.compute, recipe.dtype, recipe.shared["t"])
