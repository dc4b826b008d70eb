"""A tensor times a number, as a kernel of the graph."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from surgery.graph import Span, TiledKernel
from surgery.types import TensorType

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["Scale"]


@dataclass(frozen=True, slots=True)
class Scale(TiledKernel):
    """A float tensor times a number, rounded to its dtype."""

    factor: float

    def infer(self, *inputs: TensorType) -> tuple[TensorType, ...]:
        """Raises ValueError for a tensor that is not float."""
        if not inputs[0].dtype.is_float:
            raise ValueError(f"{inputs[0]} is not float")
        return inputs

    def domain(self, *inputs: TensorType) -> int:
        """The elements."""
        return inputs[0].num_elements

    def input_steps(self) -> tuple[int | None, ...]:
        """Element by element."""
        return (1,)

    def port_steps(self) -> tuple[int | None, ...]:
        """Element by element."""
        return (1,)

    def tile(self, state: object, partial: object, span: Span, *tiles: Tensor) -> tuple[Tensor | None, ...]:
        """One tile: the product in float32 (float64 for a double), rounded once."""
        return (tiles[0] * self.factor,)

    def run(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        """The whole tensor."""
        return (inputs[0] * self.factor,)
