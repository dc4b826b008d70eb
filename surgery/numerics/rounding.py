"""What rounding cost: max and squared error of a tile, the same bits on every device."""

from __future__ import annotations

import math
from typing import cast

import torch
from torch import Tensor

from surgery.graph import TileError

__all__ = ["rounding_error", "sum_of_squares"]

_SQUARES_FIT = (2.0**-40, 2.0**40)  # largest errors whose squares, summed, need no scaling


def rounding_error(x: Tensor, rounded: Tensor) -> TileError:
    """The error of `rounded` against `x`, both float [n], in f32 (in f64 where x is)."""
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    error = rounded.to(wide) - x.to(wide)
    error = error[error.isfinite()].float()
    largest = float(error.abs().max()) if error.numel() else 0.0
    return TileError(largest, sum_of_squares(error, largest), x.numel())


def sum_of_squares(x: Tensor, largest: float) -> float:
    """Sum of x**2, f32 [n], overwriting x: pairs n/2 apart, then n/4, ..., the last 256 exactly."""
    if largest == 0.0 or not math.isfinite(largest):
        return largest
    exponent = 0
    if not _SQUARES_FIT[0] <= largest <= _SQUARES_FIT[1]:
        exponent = math.frexp(largest)[1]
        # Two factors, since 2**-exponent alone overflows for subnormal errors.
        x.mul_(2.0 ** (-exponent // 2)).mul_(2.0 ** (-exponent - -exponent // 2))
    x.mul_(x)
    while x.numel() > 256:
        half = (x.numel() + 1) // 2
        x[: x.numel() - half].add_(x[half:])
        x = x[:half]
    rest = cast(list[float], x.tolist())  # pyright: ignore[reportUnknownMemberType]
    return math.ldexp(math.fsum(rest), 2 * exponent)
