"""`merge.sce`."""

from __future__ import annotations

from dataclasses import dataclass, field

from surgery.graph import Kernel
from surgery.merging import Merge, Recipe, models_field, number_field


@dataclass(frozen=True, slots=True, kw_only=True)
class MergeSce(Merge):
    """Task vectors selected by variance, weighed by energy, with minority signs erased.

    Reads    the same tensor of the source and every model, f32|f16|bf16 of one shape; other dtypes must be equal
    Writes   source + the task vectors, of which the share `select_topk` of largest variance over the models is kept,
             each weighed by its mean square, where its sign is the elected one; in the source's dtype
    Exact    float32, rounded once. At the threshold itself the elements of lowest index are kept
    Raises   OpError for what the models do not share: see the options
    Source   SCE, FuseChat 3.0, arXiv 2408.07990; the bits of mergekit 0.1.5 `sce` but for elements at the threshold
    """

    models: object = field(metadata=models_field(least=1))
    select_topk: object = field(default=1.0, metadata=number_field("The share of elements that is kept."))

    def kernel(self, recipe: Recipe) -> Kernel:
        """Base first, then the models."""
        from surgery.numerics.merge.sce import Sce

        return Sce(recipe.compute, recipe.dtype, len(recipe.models), recipe.shared["select_topk"])
