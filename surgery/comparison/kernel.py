"""The kernel that holds two tensors against each other: a row of figures for each unit of elements."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from typing import TYPE_CHECKING

from surgery.comparison.model import Figures
from surgery.graph import ERROR_UNIT, Span, TiledKernel
from surgery.types import DType, TensorType

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torch import Tensor

__all__ = ["FIGURES", "Difference", "figures_of"]

FIGURES = 8  # in a row, as `_row` has them
SIGN = -(1 << 63)
INTEGERS = ("BOOL", "U8", "I8", "I16", "U16", "I32", "U32", "I64", "U64")


@dataclass(frozen=True, slots=True)
class Difference(TiledKernel):
    """Two tensors of the same shape → f64 [units, FIGURES]; with `bits_only` nothing but which elements differ.

    Floats are subtracted in f64. So are integers, after an exact difference.
    """

    bits_only: bool

    def infer(self, *inputs: TensorType) -> tuple[TensorType, ...]:
        """Raises ValueError if the shapes differ."""
        a, b = inputs
        if a.shape != b.shape:
            raise ValueError(f"{a} and {b} differ in shape")
        return (TensorType(DType.F64, (-(-a.num_elements // ERROR_UNIT), FIGURES)),)

    def domain(self, *inputs: TensorType) -> int:
        """The elements."""
        return inputs[0].num_elements

    def input_steps(self) -> tuple[int | None, ...]:
        """Element by element."""
        return (1, 1)

    def port_steps(self) -> tuple[int | None, ...]:
        """A row for each unit."""
        return (ERROR_UNIT // FIGURES,)

    @property
    def align(self) -> int:
        """Whole units, so that the sums do not depend on how large a tile is."""
        return ERROR_UNIT

    def tile(self, state: object, partial: object, span: Span, *tiles: Tensor) -> tuple[Tensor | None, ...]:
        """The rows of the units in one tile."""
        import torch

        rows: list[list[float]] = []
        for start, a, b in _units(*tiles):
            compared = _bits_row(a, b) if self.bits_only else _row(a, b, span[0] + start)
            rows.append(compared)
        return (torch.tensor(rows, dtype=torch.float64).reshape(-1),)

    def run(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        """The reference, on whole tensors."""
        (rows,) = self.tile(None, None, (0, inputs[0].numel()), *(value.reshape(-1) for value in inputs))
        assert rows is not None
        return (rows.reshape(-1, FIGURES),)


def figures_of(row: list[float], num_elements: int, *, has_values: bool) -> Figures:
    """A row as `Figures` of the `num_elements` that it stands for."""
    different, max_abs, squares, squares_a, squares_b, products, unmatched, first = row
    sums = (max_abs, squares, squares_a, squares_b, products)
    return Figures(num_elements, int(different), *sums, int(unmatched), int(first), has_values)


def _units(a: Tensor, b: Tensor) -> Iterator[tuple[int, Tensor, Tensor]]:
    for start in range(0, a.numel(), ERROR_UNIT):
        yield start, a[start : start + ERROR_UNIT], b[start : start + ERROR_UNIT]


def _bits_row(a: Tensor, b: Tensor) -> list[float]:
    return [_num_unlike(a, b), 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, -1.0]


def _num_unlike(a: Tensor, b: Tensor) -> float:
    """Elements of one dtype whose bits differ."""
    import torch

    as_bits = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[a.element_size()]
    x, y = a.view(as_bits), b.view(as_bits)
    return 0.0 if torch.equal(x, y) else float(torch.count_nonzero(x ^ y))


def _row(a: Tensor, b: Tensor, start: int) -> list[float]:
    import torch

    from surgery.numerics.scratch import scratch

    n = a.numel()
    x, y, d = (scratch(f"difference {use}", torch.float64, n, a.device) for use in "xyd")
    x.copy_(a)
    y.copy_(b)
    torch.sub(y, x, out=d) if not _are_integers(a, b) else d.copy_(_distance(a, b))
    squares_a, squares_b = float(torch.dot(x, x)), float(torch.dot(y, y))
    unmatched, first = 0, -1
    if not squares_a + squares_b <= sys.float_info.max:
        unmatched, first = _without_non_finite(x, y, d)
        first = start + first if unmatched else -1
        squares_a, squares_b = float(torch.dot(x, x)), float(torch.dot(y, y))
    different = _num_unlike(a, b) if a.dtype == b.dtype else float(torch.count_nonzero(d)) + unmatched
    sums = [float(torch.dot(d, d)), squares_a, squares_b, float(torch.dot(x, y))]
    return [different, float(d.abs_().max()), *sums, float(unmatched), float(first)]


def _without_non_finite(x: Tensor, y: Tensor, d: Tensor) -> tuple[int, int]:
    """Zeros where one is NaN or infinite; how many of these are not the same in both, and the first of them."""
    left_out = ~(x.isfinite() & y.isfinite())
    same = (x == y) | (x.isnan() & y.isnan())
    unmatched = (left_out & ~same).nonzero().view(-1)
    for values in (x, y, d):
        values[left_out] = 0.0
    return unmatched.numel(), int(unmatched[0]) if unmatched.numel() else -1


def _are_integers(a: Tensor, b: Tensor) -> bool:
    """Of which the differences are exact."""
    from surgery.numerics.dtypes import dtype_of

    names = {dtype_of(value.dtype).disk_name for value in (a, b)}
    return names <= set(INTEGERS) and ("U64" not in names or len(names) == 1)


def _distance(a: Tensor, b: Tensor) -> Tensor:
    """|a - b|, f64: exact below 2**53, nearest above."""
    import torch

    x, y = (value.view(torch.int64) ^ SIGN if value.dtype == torch.uint64 else value.long() for value in (a, b))
    wrapped = torch.where(x > y, x - y, y - x)
    return wrapped.double() + (wrapped < 0) * 2.0**64
