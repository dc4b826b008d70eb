"""`merge.task_arithmetic`."""

from __future__ import annotations

from dataclasses import dataclass, field

from surgery.graph import Kernel
from surgery.merging import Merge, Recipe, models_field, number_field
from surgery.op import doc


@dataclass(frozen=True, slots=True, kw_only=True)
class MergeTaskArithmetic(Merge):
    """Task vectors added to the source.

    Reads    the same tensor of the source and every model, f32|f16|bf16 of one shape
    Writes   source + lambda * sum(weight * (x - source)), over sum(weight) with `normalize`, in the source's dtype
    Exact    float32, rounded once
    Raises   OpError for what the models do not share: see the options
    Source   Task arithmetic, arXiv 2212.04089; the bits of mergekit 0.1.5 `task_arithmetic`
    """

    models: object = field(metadata=models_field(weight=None))
    normalize: bool = field(default=False, metadata=doc("Divide by the sum of the weights."))
    lambda_: object = field(default=1.0, metadata=number_field("Factor on the sum of task vectors.", key="lambda"))

    def kernel(self, recipe: Recipe) -> Kernel:
        """Base first, then the models."""
        from surgery.numerics.merge.task_arithmetic import TaskArithmetic

        weights, lambda_ = recipe.numbers["weight"], recipe.shared["lambda_"]
        return TaskArithmetic(recipe.compute, recipe.dtype, weights, False, self.normalize, lambda_)
