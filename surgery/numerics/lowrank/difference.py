"""The difference of two matrices as a product of low rank, as a kernel of the graph.

Shapes: O rows (out), I columns (in), K = min(O, I), R rank.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from surgery.graph import Kernel, TileError
from surgery.types import DType, TensorType

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["LowRankDifference", "is_sketched", "sketch_width", "svd_workspace"]

FLOAT_BYTES = 4
SOURCE_DTYPES = (DType.F32, DType.F16, DType.BF16)
SMALL = 1024  # the exact SVD of a matrix with a side no longer than this takes about a second
SKETCH_SHARE = 4  # a sketch pays where it is this much narrower than the matrix


def sketch_width(rank: int) -> int:
    """Columns of a random sketch: twice the rank, and some more for small ranks."""
    return 2 * rank + 16


def is_sketched(num_rows: int, num_columns: int, rank: int) -> bool:
    """Whether a random sketch pays for a matrix of this shape."""
    shorter = min(num_rows, num_columns)
    return shorter > SMALL and SKETCH_SHARE * sketch_width(rank) <= shorter


def svd_workspace(shape: tuple[int, ...], rank: int, *, sketched: bool | None = None) -> int:
    """Bytes that decomposing takes: LAPACK's copy, the vectors and its work area, or the sketch."""
    shorter, longer = sorted(shape)
    sketched = is_sketched(shorter, longer, rank) if sketched is None else sketched
    vectors = 8 * sketch_width(rank) * (shorter + longer) if sketched else shorter * (shorter + longer) + 8 * shorter**2
    return FLOAT_BYTES * (shorter * longer + vectors)


@dataclass(frozen=True, slots=True)
class LowRankDifference(Kernel):
    """base, tuned → A [rank, I], B [O, rank] with scaling·BA ≈ tuned - base, in float32 and rounded to `dtype`.

    `transposed`: the matrices are stored [I, O]. With `energy`, rows beyond those that hold this share of
    the squared singular values are zeros.
    """

    rank: int
    scaling: float
    transposed: bool
    dtype: DType
    method: Literal["auto", "exact", "randomized"]
    draw: str  # what the sketch is a function of
    energy: float | None = None

    def infer(self, *inputs: TensorType) -> tuple[TensorType, ...]:
        """Raises ValueError for what are no two float matrices of one shape, or a rank they cannot have."""
        base, tuned = inputs
        if base.shape != tuned.shape:
            raise ValueError(f"it is {base} in the base and {tuned} in the fine-tuned model")
        if len(base.shape) != 2 or base.num_elements == 0:
            raise ValueError(f"{base} is no matrix")
        for type_ in inputs:
            if type_.dtype not in SOURCE_DTYPES:
                raise ValueError(f"{type_} is none of f32, f16, bf16")
        num_rows, num_columns = reversed(base.shape) if self.transposed else base.shape
        if not 1 <= self.rank <= min(num_rows, num_columns):
            raise ValueError(f"{base} has no rank {self.rank}")
        return TensorType(self.dtype, (self.rank, num_columns)), TensorType(self.dtype, (num_rows, self.rank))

    def run(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        """A and B, computed on the CPU, so that no device shows in the bits."""
        from surgery.numerics.cast import rounded
        from surgery.numerics.lowrank import factors

        for tensor, whose in zip(inputs, ("base", "fine-tuned model"), strict=True):
            factors.check_finite(tensor, f" in the {whose}")
        delta_OI = self._delta(*inputs)
        if self.is_randomized(*delta_OI.shape):
            triplets = factors.randomized_svd(delta_OI, self.rank, sketch_width(self.rank), self.draw)
        else:
            triplets = factors.svd(delta_OI, self.rank)
        num_kept = self.rank
        if self.energy is not None:
            total = factors.sum_of_squares(delta_OI)
            num_kept = factors.energy_rank(triplets[1], total, self.energy)
        a_RI, b_OR = factors.balanced(triplets, self.rank, num_kept, self.scaling)
        return tuple(rounded(factor, self.dtype).to(inputs[0].device) for factor in (a_RI, b_OR))

    def is_randomized(self, num_rows: int, num_columns: int) -> bool:
        """Whether a matrix of this shape is decomposed by a random sketch."""
        return self.method == "randomized" or (self.method == "auto" and is_sketched(num_rows, num_columns, self.rank))

    def _delta(self, base: Tensor, tuned: Tensor) -> Tensor:
        delta = tuned.cpu().float() - base.cpu().float()
        return delta.T if self.transposed else delta

    def workspace(self, *inputs: TensorType) -> int:
        """The difference with its operands; and for an exact SVD LAPACK's copy, the vectors and its work area."""
        shape = (inputs[0].shape[0], inputs[0].shape[1])
        return 2 * FLOAT_BYTES * inputs[0].num_elements + svd_workspace(
            shape, self.rank, sketched=self.is_randomized(*shape)
        )

    def measure(self, inputs: Sequence[Tensor], outputs: Sequence[Tensor]) -> TileError | None:
        """What the cut to a rank, and the rounding, leave out of the difference."""
        from surgery.numerics.lowrank.measuring import error_of

        base, tuned = (tensor.cpu().T if self.transposed else tensor.cpu() for tensor in inputs)
        a_RI, b_OR = (tensor.cpu().float() for tensor in outputs)

        def rows(start: int, stop: int) -> Tensor:
            return tuned[start:stop].float() - base[start:stop].float()

        return error_of(rows, a_RI, b_OR, self.scaling)
