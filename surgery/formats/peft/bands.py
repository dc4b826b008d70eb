"""How a weight is cut into bands of rows.

Why bands: BLAS may round a product's elements differently when it computes other rows beside them, so every
element comes from one fixed band of rows, counted from the first row of the matrix, whatever tile asks for it.
Bands of 16 rows or columns or more have the bits of the whole product (MKL; the tests hold that against PEFT).
"""

from __future__ import annotations

import math

from surgery.formats.peft.delta import Delta
from surgery.graph import ERROR_UNIT

__all__ = ["BAND_ELEMENTS", "band_rows", "scratch_bytes", "stored_size", "unit_of"]

BAND_ELEMENTS = 1 << 17  # of f32: stays in a core's share of the cache
SMALLEST_BAND = 16  # rows
WHOLE_ELEMENTS = 1 << 18  # a matrix up to this size is one band


def band_rows(height: int, width: int) -> int:
    """Rows of a band of a matrix [height, width]: a power of two, or all of them."""
    if height * width <= WHOLE_ELEMENTS:
        return height
    rows = 1 << (max(1, BAND_ELEMENTS // width).bit_length() - 1)
    return min(height, max(SMALLEST_BAND, rows))


def stored_size(delta: Delta, transposed: bool) -> tuple[int, int]:
    """Rows and columns of a matrix as it is stored."""
    return (delta.cols, delta.rows) if transposed else (delta.rows, delta.cols)


def scratch_bytes(delta: Delta, transposed: bool) -> int:
    """Bytes of temporaries for each element of the smallest tile: a band thrice, the factors, the weight, in f32."""
    height, width = stored_size(delta, transposed)
    factors = sum(map(math.prod, delta.shapes())) + delta.prepared_elements
    return 4 + -(-(12 * band_rows(height, width) * width + 4 * factors) // ERROR_UNIT)


def unit_of(delta: Delta, transposed: bool, wanted: int) -> int:
    """Elements of whole bands, `wanted` or a little less, at least one band."""
    height, width = stored_size(delta, transposed)
    band = band_rows(height, width) * width
    return max(1, wanted // band) * band
