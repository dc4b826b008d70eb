"""`merge.model_stock`."""

from __future__ import annotations

from dataclasses import dataclass, field

from surgery.graph import Kernel
from surgery.merging import Merge, Recipe, models_field
from surgery.op import doc


@dataclass(frozen=True, slots=True, kw_only=True)
class MergeModelStock(Merge):
    """The average of several models, drawn to the source by the angle between them.

    Reads    the same tensor of the source and every model, f32|f16|bf16 of one shape; other dtypes must be equal
    Writes   t * the mean of the models + (1 - t) * source, t = N c / (1 + (N - 1) c) with c the mean cosine between the
             N task vectors, tensor by tensor; in the source's dtype
    Exact    float32, rounded once
    Raises   OpError for what the models do not share: see the options, or fewer than two models
    Source   Model Stock, arXiv 2403.19522; the bits of mergekit 0.1.5 `model_stock`
    """

    models: object = field(metadata=models_field(least=2))
    filter_wise: bool = field(default=False, metadata=doc("The angle is that of each row, not of the whole tensor."))

    def kernel(self, recipe: Recipe) -> Kernel:
        """Base first, then the models."""
        from surgery.numerics.merge.model_stock import ModelStock

        return ModelStock(recipe.compute, recipe.dtype, len(recipe.models), self.filter_wise, recipe.shape)
