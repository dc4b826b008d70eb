"""`merge.breadcrumbs_ties`."""

from __future__ import annotations

from dataclasses import dataclass, field

from surgery.graph import Kernel
from surgery.merging import Merge, Recipe, models_field, number_field
from surgery.op import doc


@dataclass(frozen=True, slots=True, kw_only=True)
class MergeBreadcrumbsTies(Merge):
    """Task vectors without their largest and smallest weights, with one sign elected for each weight.

    Reads    the same tensor of the source and every model, f32|f16|bf16 of one shape; other dtypes must be equal
    Writes   source + lambda * sum of weight * the task vectors that have the elected sign, in the source's dtype; of
             each task vector the `gamma` of largest magnitude goes, `density` is kept, the smallest go
    Exact    float32, rounded once. At the thresholds themselves the elements of lowest index are kept
    Raises   OpError for what the models do not share: see the options
    Source   Model Breadcrumbs, arXiv 2312.06795; the bits of mergekit 0.1.5 `breadcrumbs_ties` but for elements at a
             threshold
    """

    models: object = field(metadata=models_field(weight=None, density=1.0, gamma=0.01))
    normalize: bool = field(default=False, metadata=doc("Divide by the sum of the weights."))
    rescale: bool = field(default=False, metadata=doc("Scale what is kept to the L1 norm of the whole task vector."))
    lambda_: object = field(default=1.0, metadata=number_field("Factor on the sum of task vectors.", key="lambda"))

    def kernel(self, recipe: Recipe) -> Kernel:
        """Base first, then the models."""
        from surgery.numerics.merge.pruned import Breadcrumbs

        return Breadcrumbs(
            recipe.compute, recipe.dtype, recipe.numbers["weight"], True, self.normalize, recipe.shared["lambda_"],
            recipe.numbers["density"], self.rescale, recipe.numbers["gamma"],
        )  # fmt: skip
