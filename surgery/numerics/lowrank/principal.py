"""PiSSA: a weight's principal components as factors, and what they leave of it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from surgery.graph import Kernel
from surgery.numerics.lowrank.difference import FLOAT_BYTES, SOURCE_DTYPES, is_sketched, sketch_width, svd_workspace
from surgery.types import DType, TensorType

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["PrincipalComponents", "Residual"]


@dataclass(frozen=True, slots=True)
class PrincipalComponents(Kernel):
    """weight [O, I] → A f32 [rank, I], B f32 [O, rank]; scaling·BA is its best approximation of that rank.

    `transposed`: the weight is stored [I, O].
    Source: PiSSA, arXiv 2404.02948; PEFT 0.21, `LoraLayer.pissa_init`.
    """

    rank: int
    scaling: float
    transposed: bool
    draw: str  # what the sketch is a function of

    def infer(self, *inputs: TensorType) -> tuple[TensorType, ...]:
        """Raises ValueError for what is no float matrix of at least that rank."""
        (weight,) = inputs
        if weight.dtype not in SOURCE_DTYPES or len(weight.shape) != 2:
            raise ValueError(f"{weight} is no matrix of f32, f16 or bf16")
        num_rows, num_columns = reversed(weight.shape) if self.transposed else weight.shape
        if not 1 <= self.rank <= min(num_rows, num_columns):
            raise ValueError(f"{weight} has no rank {self.rank}")
        return TensorType(DType.F32, (self.rank, num_columns)), TensorType(DType.F32, (num_rows, self.rank))

    def run(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        """Both factors, computed on the CPU, so that no device shows in the bits."""
        from surgery.numerics.lowrank import factors

        (weight,) = inputs
        factors.check_finite(weight)
        w_OI = weight.cpu().float()
        w_OI = w_OI.T if self.transposed else w_OI
        if is_sketched(w_OI.shape[0], w_OI.shape[1], self.rank):
            triplets = factors.randomized_svd(w_OI, self.rank, sketch_width(self.rank), self.draw)
        else:
            triplets = factors.svd(w_OI, self.rank)
        a_RI, b_OR = factors.balanced(triplets, self.rank, self.rank, self.scaling)
        if not (a_RI.isfinite().all() and b_OR.isfinite().all()):
            raise ValueError(f"has principal components that are too large over √{self.scaling:g}: give a larger alpha")
        return a_RI.contiguous().to(weight.device), b_OR.contiguous().to(weight.device)

    def workspace(self, *inputs: TensorType) -> int:
        """The weight in f32, and what its decomposition takes."""
        return FLOAT_BYTES * inputs[0].num_elements + svd_workspace(inputs[0].shape, self.rank)


@dataclass(frozen=True, slots=True)
class Residual(Kernel):
    """weight, A, B → weight - scaling·BA in the weight's dtype, computed in f32 and rounded once."""

    scaling: float
    transposed: bool

    def infer(self, *inputs: TensorType) -> tuple[TensorType, ...]:
        """The weight's own type."""
        return (inputs[0],)

    def run(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        """The whole weight."""
        from surgery.numerics.cast import rounded
        from surgery.numerics.dtypes import dtype_of

        weight, a_RI, b_OR = (tensor.cpu() for tensor in inputs)
        product = (self.scaling * b_OR) @ a_RI
        left = weight.float() - (product.T if self.transposed else product)
        return (rounded(left.contiguous(), dtype_of(weight.dtype)).to(inputs[0].device),)

    def workspace(self, *inputs: TensorType) -> int:
        """The weight, the product and the difference in f32."""
        return 3 * FLOAT_BYTES * inputs[0].num_elements
