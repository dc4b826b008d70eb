"""A reduction over the rows of a matrix, whose result is all there is."""

from __future__ import annotations

from typing import TYPE_CHECKING, cast

from surgery.graph import Span, TiledKernel
from surgery.types import TensorType

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["RowReduction"]

UNIT = 1 << 20  # elements, as whole rows


class RowReduction(TiledKernel):
    """One reduction of a matrix of this `shape`, seen as whole rows; its state is the one port."""

    __slots__ = ()
    shape: tuple[int, ...]

    def domain(self, *inputs: TensorType) -> int:
        """The elements of the matrix."""
        return inputs[0].num_elements

    def input_steps(self) -> tuple[int | None, ...]:
        """Element by element."""
        return (1,)

    def port_steps(self) -> tuple[int | None, ...]:
        """Known once every row was seen."""
        return (None,)

    @property
    def align(self) -> int:
        """Whole rows."""
        return self.shape[1]

    @property
    def reductions(self) -> int:
        """One."""
        return 1

    def unit(self, *inputs: TensorType) -> int:
        """Whole rows, about a million elements."""
        return max(1, UNIT // self.shape[1]) * self.shape[1]

    def tile(self, state: object, partial: object, span: Span, *tiles: Tensor) -> tuple[Tensor | None, ...]:
        """Nothing: the port comes from the state."""
        return (None,)

    def whole_ports(self, state: object, *inputs: TensorType) -> dict[int, Tensor]:
        """The state."""
        return {0: cast("Tensor", state)}
