"""`merge.ram`."""

from __future__ import annotations

from dataclasses import dataclass, field

from surgery.graph import Kernel
from surgery.merging import Merge, Recipe, models_field, number_field


@dataclass(frozen=True, slots=True, kw_only=True)
class MergeRam(Merge):
    """What one model alone has changed is kept whole, what several have is averaged.

    Reads    the same tensor of the source and every model, f32|f16|bf16 of one shape; other dtypes must be equal
    Writes   source + the sum of the task vectors' elements above `epsilon`, each over the number of models that have
             one; in the source's dtype
    Exact    float32, rounded once
    Raises   OpError for what the models do not share: see the options
    Source   Reinforced agent merging, arXiv 2601.13572; the bits of mergekit 0.1.5 `ram`
    """

    models: object = field(metadata=models_field(least=1))
    epsilon: object = field(default=1e-5, metadata=number_field("A weight has changed where it differs by more."))

    def kernel(self, recipe: Recipe) -> Kernel:
        """Base first, then the models."""
        from surgery.numerics.merge.ram import Ram

        return Ram(recipe.compute, recipe.dtype, len(recipe.models), recipe.shared["epsilon"])
