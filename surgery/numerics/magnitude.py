"""The norms of a weight's outputs: what DoRA's magnitudes begin as."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, cast

from surgery.graph import Span
from surgery.numerics.rows import RowReduction
from surgery.types import DType, TensorType

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["Norms"]


@dataclass(frozen=True, slots=True)
class Norms(RowReduction):
    """float [rows, columns] → f32 [rows], the norm of each row; `transposed`: f32 [columns], of each column.

    Down the columns the squares are summed in f64, which is closer than PEFT's f32 and not always the same bits.
    Source: arXiv 2402.09353; PEFT 0.21, `DoraLinearLayer.update_layer`.
    """

    shape: tuple[int, ...]
    transposed: bool

    def infer(self, *inputs: TensorType) -> tuple[TensorType, ...]:
        """Raises ValueError for what is no float matrix."""
        (type_,) = inputs
        if len(type_.shape) != 2 or not type_.dtype.is_float or type_.num_elements == 0:
            raise ValueError(f"{type_} is no matrix of floats")
        return (TensorType(DType.F32, (type_.shape[1 if self.transposed else 0],)),)

    def partial(self, state: object, span: Span, *tiles: Tensor) -> object:
        """Norms of rows, f32, or sums of squares of columns, f64."""
        import torch

        rows = tiles[0].cpu().float().view(-1, self.shape[1])
        if self.transposed:
            return rows.double().square_().sum(0)
        return cast("Tensor", torch.linalg.vector_norm(rows, dim=1))  # pyright: ignore[reportUnknownMemberType]

    def combine(self, state: object, partials: Iterable[object], *inputs: TensorType) -> object:
        """All norms, f32."""
        import torch

        parts = list(cast("Iterable[Tensor]", partials))
        return torch.stack(parts).sum(0).sqrt_().float() if self.transposed else torch.cat(parts)

    def state_bytes(self, *inputs: TensorType) -> int:
        """The norms; of columns one sum for each span."""
        if not self.transposed:
            return 4 * self.shape[0]
        return 8 * self.shape[1] * -(-inputs[0].num_elements // self.unit(*inputs))

    def run(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        """The whole tensor, in the same pieces."""
        elements = inputs[0].reshape(-1)
        step = self.unit()
        spans = [(start, min(start + step, elements.numel())) for start in range(0, elements.numel(), step)]
        partials = [self.partial(None, span, elements[slice(*span)]) for span in spans]
        return (cast("Tensor", self.combine(None, partials)),)
