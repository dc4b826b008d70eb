"""How far B @ A is from the matrix that it stands for."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from surgery.graph import ERROR_UNIT, TileError

__all__ = ["error_of"]


def error_of(rows: Callable[[int, int], Tensor], a_RI: Tensor, b_OR: Tensor, scaling: float = 1.0) -> TileError:
    """The error of scaling·BA against the matrix whose rows [start, stop) `rows` gives, a few rows at a time."""
    num_rows, num_columns = b_OR.shape[0], a_RI.shape[1]
    step = max(1, ERROR_UNIT // num_columns)
    largest, sums = 0.0, list[float]()
    for start in range(0, num_rows, step):
        stop = min(start + step, num_rows)
        exact = rows(start, stop)
        error = exact - (b_OR[start:stop] @ a_RI).to(exact.dtype) * scaling
        largest = max(largest, float(error.abs().max()))
        sums.append(float(error.double().square().sum()))
    return TileError(largest, tuple(sums), num_rows * num_columns)
