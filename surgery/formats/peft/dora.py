"""DoRA: a weight's rows taken apart into direction and magnitude."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, cast

from surgery.formats.peft.bands import scratch_bytes, unit_of
from surgery.formats.peft.delta import Delta
from surgery.formats.peft.fold import FoldKernel
from surgery.graph import Span
from surgery.types import TensorType

if TYPE_CHECKING:
    from torch import Tensor

    from surgery.formats.peft.arithmetic import Bands

__all__ = ["Decomposed"]

UNIT = 1 << 20  # elements of the first pass, as whole rows


@dataclass(frozen=True, slots=True)
class Decomposed(FoldKernel):
    """(magnitude / ‖weight + delta‖) * (weight + delta), the norm over the inputs, rounded once.

    Where the weight is stored [in, out] the norms go down the columns; their squares are then summed in f64, which
    is closer than PEFT's f32 and not always the same bits.
    Source: arXiv 2402.09353; PEFT 0.21, `DoraLinearVariant.merge_unsafe`.
    """

    delta: Delta
    transposed: bool = False

    def shapes(self) -> tuple[tuple[int, ...], ...]:
        """Those of the difference, and the magnitude."""
        return (*self.delta.shapes(), (self.delta.rows,))

    def scaled(self, weight: float) -> FoldKernel:
        """Has no meaning: at 0 the weight would not come back."""
        raise ValueError("is decomposed by DoRA into direction and magnitude, which have no common factor")

    @property
    def scratch(self) -> int:
        """As adding, and the weight and the factors in f32 once more."""
        return 8 + scratch_bytes(self.delta, self.transposed)

    @property
    def reductions(self) -> int:
        """The norms come first."""
        return 1

    def unit(self, *inputs: TensorType) -> int | None:
        """Whole bands of rows, about a million elements."""
        return unit_of(self.delta, self.transposed, UNIT)

    def partial(self, state: object, span: Span, *tiles: Tensor) -> object:
        """Norms of whole rows, f32, or sums of squares of the columns, f64."""
        from surgery.formats.peft import arithmetic

        base, *tensors = tiles
        return arithmetic.norms(base, span, self._bands(tensors))

    def combine(self, state: object, partials: Iterable[object], *inputs: TensorType) -> object:
        """The norms of all outputs, f32 [out]."""
        from surgery.formats.peft import arithmetic

        return arithmetic.joined_norms(cast("Iterable[Tensor]", partials), self.transposed)

    def tile(self, state: object, partial: object, span: Span, *tiles: Tensor) -> tuple[Tensor | None, ...]:
        """One tile."""
        from surgery.formats.peft import arithmetic

        base, *tensors = tiles
        magnitude = tensors[-1].cpu().float()
        factors = magnitude / cast("Tensor", state)
        return (arithmetic.decomposed(base, span, self._bands(tensors), factors),)

    def _bands(self, tensors: list[Tensor]) -> Bands:
        from surgery.formats.peft import arithmetic

        return arithmetic.Bands(self.delta, self.transposed, self.views(tensors)[:-1])
