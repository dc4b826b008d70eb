"""`merge.ramplus`."""

from __future__ import annotations

from dataclasses import dataclass, field

from surgery.graph import Kernel
from surgery.merging import Merge, Recipe, models_field, number_field


@dataclass(frozen=True, slots=True, kw_only=True)
class MergeRamPlus(Merge):
    """`merge.ram`, where what one model alone has changed is scaled up.

    Reads    the same tensor of the source and every model, f32|f16|bf16 of one shape; other dtypes must be equal
    Writes   as `merge.ram`, the elements that one model alone has changed times 1 + r * clip(shared / own, 0, alpha),
             counted tensor by tensor; in the source's dtype
    Exact    float32, rounded once
    Raises   OpError for what the models do not share: see the options
    Source   Reinforced agent merging, arXiv 2601.13572; the bits of mergekit 0.1.5 `ramplus_tl`
    """

    models: object = field(metadata=models_field(least=1))
    r: object = field(default=0.1, metadata=number_field("How strongly the share of shared changes counts."))
    alpha: object = field(default=0.2, metadata=number_field("The largest share that counts."))
    epsilon: object = field(default=1e-5, metadata=number_field("A weight has changed where it differs by more."))

    def kernel(self, recipe: Recipe) -> Kernel:
        """Base first, then the models."""
        from surgery.numerics.merge.ram import RamPlus

        r, alpha = recipe.shared["r"], recipe.shared["alpha"]
        return RamPlus(recipe.compute, recipe.dtype, len(recipe.models), recipe.shared["epsilon"], r, alpha)
