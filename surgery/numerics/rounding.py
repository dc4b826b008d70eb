"""What rounding cost: max and squared error of a tile, the same bits on every device."""

from __future__ import annotations

import math
from typing import cast

import torch
from torch import Tensor

from surgery.graph import ERROR_UNIT, TileError
from surgery.numerics.scratch import scratch

__all__ = ["rounding_error", "tile_error"]

_SQUARES_FIT = (2.0**-40, 2.0**40)  # largest errors whose squares, summed, need no scaling


def rounding_error(exact: Tensor, rounded: Tensor) -> TileError:
    """The error of `rounded` against `exact`, both float [n], as f32 differences (f64 where `exact` is)."""
    wide = torch.float64 if exact.dtype == torch.float64 else torch.float32
    error = scratch("error", wide, exact.numel(), exact.device).copy_(rounded)
    if exact.dtype != wide:  # an explicit cast: mixed-dtype arithmetic is slower
        exact = scratch("exact", wide, exact.numel(), exact.device).copy_(exact)
    return tile_error(error.sub_(exact).float())


def tile_error(error: Tensor) -> TileError:
    """Max |error| and sums of squares of f32 [n], which is overwritten.

    One sum for every ERROR_UNIT elements, and elementwise adds in an order fixed by the unit alone,
    so that neither the tile's size nor the device nor the number of threads changes a bit.
    """
    num_whole = error.numel() // ERROR_UNIT * ERROR_UNIT
    whole, rest = error[:num_whole].view(-1, ERROR_UNIT), error[num_whole:].view(1, -1)
    results = [_unit_sums(units) for units in (whole, rest) if units.numel()]
    largest = max((value for values, _ in results for value in values), default=0.0)
    return TileError(largest, tuple(value for _, sums in results for value in sums), error.numel())


def _unit_sums(error_UE: Tensor) -> tuple[list[float], list[float]]:
    """Max and sum of squares of each row."""
    largest_U = _largest(error_UE)
    if not all(map(math.isfinite, largest_U)):  # what is not finite in the source stays so: no error
        largest_U = _largest(error_UE.nan_to_num_(0.0, 0.0, 0.0))
    if all(value == 0.0 or _SQUARES_FIT[0] <= value <= _SQUARES_FIT[1] for value in largest_U):
        return largest_U, _fold(error_UE.mul_(error_UE))
    return largest_U, [_scaled_sum(row, value) for row, value in zip(error_UE, largest_U, strict=True)]


def _largest(error_UE: Tensor) -> list[float]:
    """Max of each row's magnitudes, which is what is left of the row: bit patterns order like magnitudes."""
    bits_UE = error_UE.view(torch.int32).bitwise_and_(0x7FFFFFFF)
    return _floats(bits_UE.amax(dim=1).view(torch.float32))


def _scaled_sum(error: Tensor, largest: float) -> float:
    if largest == 0.0 or _SQUARES_FIT[0] <= largest <= _SQUARES_FIT[1]:
        return _fold(error.mul_(error).view(1, -1))[0]
    exponent = math.frexp(largest)[1]
    # Two factors, since 2**-exponent alone overflows for subnormal errors.
    error.mul_(2.0 ** (-exponent // 2)).mul_(2.0 ** (-exponent - -exponent // 2))
    return math.ldexp(_fold(error.mul_(error).view(1, -1))[0], 2 * exponent)


def _fold(x_UE: Tensor) -> list[float]:
    """The sum of each row, overwriting it: pairs E/2 apart, then E/4, ..., the last 256 exactly."""
    while x_UE.shape[1] > 256:
        half = (x_UE.shape[1] + 1) // 2
        x_UE[:, : x_UE.shape[1] - half].add_(x_UE[:, half:])
        x_UE = x_UE[:, :half]
    return [math.fsum(_floats(row)) for row in x_UE]


def _floats(x: Tensor) -> list[float]:
    return cast(list[float], x.tolist())  # pyright: ignore[reportUnknownMemberType]
