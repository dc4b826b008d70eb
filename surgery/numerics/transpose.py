"""A matrix turned on its side: GPT-2 stores its Linears [in, out], every format [out, in]."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from surgery.graph import Graph, Kernel, Node
from surgery.types import TensorType

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["Transpose", "transpose_of_transpose"]


@dataclass(frozen=True, slots=True)
class Transpose(Kernel):
    """[rows, cols] → [cols, rows], any dtype."""

    def infer(self, *inputs: TensorType) -> tuple[TensorType, ...]:
        """The type with its two dimensions swapped. Raises ValueError if it is not a matrix."""
        (type_,) = inputs
        if len(type_.shape) != 2:
            raise ValueError(f"{type_} is not a matrix")
        return (TensorType(type_.dtype, (type_.shape[1], type_.shape[0])),)

    def run(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        """A contiguous transposed copy."""
        (matrix,) = inputs
        return (matrix.t().contiguous(),)


def transpose_of_transpose(graph: Graph, node: Node) -> Node | None:
    """transpose(transpose(x)) is x."""
    del graph
    if isinstance(node.kernel, Transpose) and isinstance(node.inputs[0].kernel, Transpose):
        return node.inputs[0].inputs[0]
    return None
