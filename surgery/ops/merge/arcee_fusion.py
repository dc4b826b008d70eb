"""`merge.arcee_fusion`."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

from surgery.graph import Kernel
from surgery.merging import Merge, Recipe, models_field


@dataclass(frozen=True, slots=True, kw_only=True)
class MergeArceeFusion(Merge):
    """Of what a model changed, what matters most.

    Reads    the same tensor of the source and the model, f32|f16|bf16 of one shape; other dtypes must be equal
    Writes   source + the elements of the task vector whose importance is at least the median and one and a half times
             the range between the quartiles; importance is the change times the divergence of the rows' softmax. In the
             source's dtype, where mergekit writes float32
    Exact    float32, rounded once
    Raises   OpError for what the models do not share: see the options
    Source   mergekit 0.1.5 `arcee_fusion`, its bits after rounding where it draws no sample (up to a million elements)
    """

    num_models: ClassVar[int] = 1

    models: object = field(metadata=models_field(least=1, most=1))

    def kernel(self, recipe: Recipe) -> Kernel:
        """The source first, then the model."""
        from surgery.numerics.merge.arcee_fusion import ArceeFusion

        return ArceeFusion(recipe.compute, recipe.dtype, recipe.shape)
