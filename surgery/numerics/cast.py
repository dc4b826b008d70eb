"""Casting between dtypes as a kernel of the graph, with what rounding cost."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from surgery.graph import BadValue, Graph, Node, Span, TiledKernel
from surgery.numerics.dtypes import dtype_of, torch_dtype, torch_name
from surgery.numerics.transpose import Transpose
from surgery.types import DType, TensorType

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["Cast", "cast_of_cast", "is_exact", "rounded", "transpose_of_cast"]

E4M3_LIMIT = 464.0  # the largest magnitude that rounds to 448, the largest value

# Bits of significand (with the hidden one) and the largest exponent: IEEE 754; OCP 8-bit floating point.
_PRECISION = {
    DType.F64: (53, 1023, -1074),
    DType.F32: (24, 127, -149),
    DType.BF16: (8, 127, -133),
    DType.F16: (11, 15, -24),
    DType.F8_E5M2: (3, 15, -16),
    DType.F8_E4M3: (4, 8, -9),
}


def is_exact(source: DType, target: DType) -> bool:
    """Whether every value of `source` is one of `target`."""
    digits, largest, smallest = _PRECISION[source]
    target_digits, target_largest, target_smallest = _PRECISION[target]
    return digits <= target_digits and largest <= target_largest and smallest >= target_smallest


@dataclass(frozen=True, slots=True)
class Cast(TiledKernel):
    """A float tensor of any shape in another float dtype, rounded to nearest even."""

    dtype: DType

    def infer(self, *inputs: TensorType) -> tuple[TensorType, ...]:
        """Raises ValueError if the input is not float, or in a float dtype that torch cannot round to."""
        (type_,) = inputs
        if type_.dtype not in _PRECISION:
            raise ValueError(f"{type_} is not of a float dtype that can be cast")
        return (TensorType(self.dtype, type_.shape),)

    def domain(self, *inputs: TensorType) -> int:
        """The elements."""
        return inputs[0].num_elements

    def input_steps(self) -> tuple[int | None, ...]:
        """Element by element."""
        return (1,)

    def port_steps(self) -> tuple[int | None, ...]:
        """Element by element."""
        return (1,)

    @property
    def keeps_value(self) -> bool:
        """Rounded or not, it stands for the input."""
        return True

    def tile(self, state: object, partial: object, span: Span, *tiles: Tensor) -> tuple[Tensor | None, ...]:
        """One tile. Raises BadValue where a finite value is too large for the dtype."""
        return (rounded(tiles[0], self.dtype),)

    def rounds(self, *inputs: TensorType) -> bool:
        """Unless every value of the input's dtype is one of `dtype`."""
        return not is_exact(inputs[0].dtype, self.dtype)

    def run(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        """The whole tensor."""
        return (inputs[0].to(torch_dtype(self.dtype)),)


def rounded(x: Tensor, dtype: DType) -> Tensor:
    """`x` in `dtype`. Raises BadValue where a finite value is too large for it."""
    import torch

    y = x.to(torch_dtype(dtype))
    if is_exact(dtype_of(x.dtype), dtype):
        return y
    wide = x if x.dtype == torch.float64 else x.float()
    overflowed = wide.isfinite() & ~y.float().isfinite()
    if dtype is DType.F8_E4M3:  # without an infinity: torch saturates, or gives NaN, by its version
        overflowed = wide.abs() > E4M3_LIMIT
    if bool(overflowed.any()):
        raise BadValue(int(overflowed.nonzero()[0]), f"is too large for {torch_name(dtype)}")
    return y


def cast_of_cast(graph: Graph, node: Node) -> Node | None:
    """cast(x) to its own dtype is x; cast(cast(x)) is one cast where the inner one is exact."""
    if not isinstance(node.kernel, Cast):
        return None
    (inner,) = node.inputs
    if inner.type == node.type:
        return inner
    if isinstance(inner.kernel, Cast) and is_exact(inner.inputs[0].type.dtype, inner.type.dtype):
        return graph.apply(node.kernel, inner.inputs[0])[0]
    return None


def transpose_of_cast(graph: Graph, node: Node) -> Node | None:
    """transpose(cast(x)) is cast(transpose(x)): so only sources are transposed, and casts run on tiles."""
    if not (isinstance(node.kernel, Transpose) and isinstance(node.inputs[0].kernel, Cast)):
        return None
    (inner,) = node.inputs
    return graph.apply(inner.kernel, *graph.apply(node.kernel, inner.inputs[0]))[0]
