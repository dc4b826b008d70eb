"""`merge.della`."""

from __future__ import annotations

from dataclasses import dataclass, field

from surgery.graph import Kernel
from surgery.merging import Merge, Recipe, models_field, number_field
from surgery.op import doc


@dataclass(frozen=True, slots=True, kw_only=True)
class MergeDella(Merge):
    """Task vectors whose smaller weights are likelier to be dropped, with one sign elected for each weight.

    Reads    the same tensor of the source and every model, f32|f16|bf16 of one shape; other dtypes must be equal
    Writes   source + lambda * sum of weight * the task vectors that have the elected sign, in the source's dtype; an
             element stays with a probability from density - epsilon to density + epsilon by the rank of its magnitude
             in its row
    Exact    float32, rounded once. The masks are drawn from the spec's `seed` and the names of tensor and model alone,
             whatever the order of work; they have mergekit's distribution, not its draws
    Raises   OpError for what the models do not share: see the options, or a density that epsilon takes out of (0, 1)
    Source   DELLA-Merging, arXiv 2406.11617; mergekit 0.1.5 `della`
    """

    models: object = field(metadata=models_field(weight=None, density=1.0, epsilon=0.15))
    normalize: bool = field(default=True, metadata=doc("Divide by the sum of the weights."))
    rescale: bool = field(default=True, metadata=doc("Scale what is kept to the L1 norm of the whole task vector."))
    lambda_: object = field(default=1.0, metadata=number_field("Factor on the sum of task vectors.", key="lambda"))

    def kernel(self, recipe: Recipe) -> Kernel:
        """Base first, then the models."""
        from surgery.numerics.merge.dropped import Della

        return Della(
            recipe.compute, recipe.dtype, recipe.numbers["weight"], True, self.normalize, recipe.shared["lambda_"],
            recipe.numbers["density"], self.rescale, recipe.seed, recipe.tensor, recipe.models,
            recipe.numbers["epsilon"], recipe.shape,
        )  # fmt: skip
