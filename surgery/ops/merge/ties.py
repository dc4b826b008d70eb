"""`merge.ties`."""

from __future__ import annotations

from dataclasses import dataclass, field

from surgery.graph import Kernel
from surgery.merging import Merge, Recipe, models_field, number_field
from surgery.op import doc


@dataclass(frozen=True, slots=True, kw_only=True)
class MergeTies(Merge):
    """Task vectors trimmed by magnitude, with one sign elected for each weight.

    Reads    the same tensor of the source and every model, f32|f16|bf16 of one shape
    Writes   source + lambda * the weighted mean of the trimmed task vectors that have the elected sign, in the
             source's dtype; of each task vector the `density` of largest magnitude is kept, tensor by tensor
    Exact    float32, rounded once. At the threshold itself the elements of lowest index are kept, where mergekit's
             choice is that of an unstable sort
    Raises   OpError for what the models do not share: see the options
    Source   TIES-Merging, arXiv 2306.01708; the bits of mergekit 0.1.5 `ties` but for elements at the threshold
    """

    models: object = field(metadata=models_field(weight=None, density=1.0))
    normalize: bool = field(default=True, metadata=doc("Divide by the sum of the weights that count."))
    rescale: bool = field(default=False, metadata=doc("Scale what is kept to the L1 norm of the whole task vector."))
    lambda_: object = field(default=1.0, metadata=number_field("Factor on the sum of task vectors.", key="lambda"))

    def kernel(self, recipe: Recipe) -> Kernel:
        """Base first, then the models."""
        from surgery.numerics.merge.pruned import Ties

        weights, lambda_ = recipe.numbers["weight"], recipe.shared["lambda_"]
        densities = recipe.numbers["density"]
        return Ties(recipe.compute, recipe.dtype, weights, True, self.normalize, lambda_, densities, self.rescale)
