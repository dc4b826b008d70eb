"""`merge.karcher`."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar, Literal

from surgery.graph import Kernel
from surgery.merging import Merge, Recipe, models_field
from surgery.op import doc


@dataclass(frozen=True, slots=True, kw_only=True)
class MergeKarcher(Merge):
    """The Riemannian (Karcher) mean of the models on the sphere.

    Reads    the same tensor of every model, f32|f16|bf16 of one shape; `source` counts only where it is listed
    Writes   the mean direction on the sphere, each tensor one vector, times the mean norm; in the source's dtype
    Exact    float32, rounded once
    Raises   OpError for what the models do not share: see the options
    Source   the bits of mergekit 0.1.5 `karcher`
    """

    base: ClassVar[Literal["source", "optional", "none"]] = "none"

    models: object = field(metadata=models_field(least=2))
    max_iter: int = field(default=10, metadata=doc("Iterations at most.", schema={"type": "integer", "minimum": 1}))
    tol: float = field(default=1e-5, metadata=doc("The step below which the iteration ends."))

    def kernel(self, recipe: Recipe) -> Kernel:
        """The models in order."""
        from surgery.numerics.merge.karcher import Karcher

        return Karcher(recipe.compute, recipe.dtype, len(recipe.models), self.max_iter, self.tol)
