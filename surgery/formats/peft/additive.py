"""Adding a difference to a weight."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from surgery.formats.peft.bands import scratch_bytes
from surgery.formats.peft.delta import Delta
from surgery.formats.peft.fold import FoldKernel
from surgery.graph import Span

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["AddDelta", "AddRow", "AddVector"]


@dataclass(frozen=True, slots=True)
class AddDelta(FoldKernel):
    """weight + delta in f32, rounded once to the weight's dtype.

    `transposed`: the weight is stored [cols, rows] (a Conv1D, an embedding). `rounds_delta`: the difference is
    rounded to the weight's dtype before it is added, as PEFT does for embeddings and fused experts.
    """

    delta: Delta
    transposed: bool = False
    rounds_delta: bool = False

    def shapes(self) -> tuple[tuple[int, ...], ...]:
        """Those of the difference."""
        return self.delta.shapes()

    def scaled(self, weight: float) -> FoldKernel:
        """The difference times `weight`."""
        return replace(self, delta=self.delta.scaled(weight))

    @property
    def scratch(self) -> int:
        """The weight and the difference in f32, in bands that the smallest tile may cover only in part."""
        return scratch_bytes(self.delta, self.transposed)

    def tile(self, state: object, partial: object, span: Span, *tiles: Tensor) -> tuple[Tensor | None, ...]:
        """One tile."""
        from surgery.formats.peft import arithmetic

        base, *tensors = tiles
        bands = arithmetic.Bands(self.delta, self.transposed, self.views(tensors))
        return (arithmetic.add(base, span, bands, rounds_delta=self.rounds_delta),)


@dataclass(frozen=True, slots=True)
class AddVector(FoldKernel):
    """bias + vector * scaling in f32, rounded once to the bias's dtype."""

    scaling: float

    def shapes(self) -> tuple[tuple[int, ...], ...]:
        """As long as the bias."""
        return (self.shape,)

    def scaled(self, weight: float) -> FoldKernel:
        """The vector times `weight`."""
        return replace(self, scaling=weight * self.scaling)

    def tile(self, state: object, partial: object, span: Span, *tiles: Tensor) -> tuple[Tensor | None, ...]:
        """One tile."""
        bias, vector = tiles
        delta = vector[slice(*span)].float() * self.scaling
        return ((bias + delta.to(bias.device)).to(bias.dtype),)


@dataclass(frozen=True, slots=True)
class AddRow(AddVector):
    """The same with a vector stored as a row, [1, out]."""

    def shapes(self) -> tuple[tuple[int, ...], ...]:
        """One row as long as the bias."""
        return ((1, *self.shape),)
