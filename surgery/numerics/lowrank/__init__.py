"""Low-rank factors: adapters mixed, added and reduced, and differences of matrices factored.

The kernels import no torch until they run; the arithmetic is in `factors` and `merging`.
"""

from __future__ import annotations

from surgery.numerics.lowrank.adding import Concatenated, Mixed, ReducedSum, SummedSVD
from surgery.numerics.lowrank.difference import LowRankDifference
from surgery.numerics.lowrank.principal import PrincipalComponents, Residual
from surgery.numerics.lowrank.recipe import Recipe

__all__ = [
    "Concatenated",
    "LowRankDifference",
    "Mixed",
    "PrincipalComponents",
    "Recipe",
    "ReducedSum",
    "Residual",
    "SummedSVD",
]
