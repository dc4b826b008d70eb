"""`merge.dare_linear`."""

from __future__ import annotations

from dataclasses import dataclass, field

from surgery.graph import Kernel
from surgery.merging import Merge, Recipe, models_field, number_field
from surgery.op import doc


@dataclass(frozen=True, slots=True, kw_only=True)
class MergeDareLinear(Merge):
    """Task vectors whose weights are dropped by chance.

    Reads    the same tensor of the source and every model, f32|f16|bf16 of one shape; other dtypes must be equal
    Writes   source + lambda * sum of weight * the task vectors, in the source's dtype; each element of a task vector
             stays with probability `density`, and what stays is scaled up with `rescale`
    Exact    float32, rounded once. The masks are drawn from the spec's `seed` and the names of tensor and model alone,
             whatever the order of work; they have mergekit's distribution, not its draws
    Raises   OpError for what the models do not share: see the options
    Source   DARE, arXiv 2311.03099; mergekit 0.1.5 `dare_linear`
    """

    models: object = field(metadata=models_field(weight=None, density=1.0))
    normalize: bool = field(default=False, metadata=doc("Divide by the sum of the weights."))
    rescale: bool = field(default=True, metadata=doc("Scale what is kept to the L1 norm of the whole task vector."))
    lambda_: object = field(default=1.0, metadata=number_field("Factor on the sum of task vectors.", key="lambda"))

    def kernel(self, recipe: Recipe) -> Kernel:
        """Base first, then the models."""
        from surgery.numerics.merge.dropped import Dare

        return Dare(
            recipe.compute, recipe.dtype, recipe.numbers["weight"], False, self.normalize, recipe.shared["lambda_"],
            recipe.numbers["density"], self.rescale, recipe.seed, recipe.tensor, recipe.models,
        )  # fmt: skip
