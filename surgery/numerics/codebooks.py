"""The value tables of bitsandbytes' 4-bit formats, as exact float32 values in Python floats.

Why plain Python: planning needs the tables' bytes before anything heavy is imported.
"""

import struct
from itertools import pairwise

# QLoRA (arXiv 2305.14314), appendix E, as bitsandbytes.functional.get_4bit_type("nf4") holds them.
NF4: tuple[float, ...] = (
    -1.0,
    -0.6961928009986877,
    -0.5250730514526367,
    -0.39491748809814453,
    -0.28444138169288635,
    -0.18477343022823334,
    -0.09105003625154495,
    0.0,
    0.07958029955625534,
    0.16093020141124725,
    0.24611230194568634,
    0.33791524171829224,
    0.44070982933044434,
    0.5626170039176941,
    0.7229568362236023,
    1.0,
)


def _f32(x: float) -> float:
    """x rounded to the nearest float32."""
    return struct.unpack("<f", struct.pack("<f", x))[0]


# Sign, two exponent bits, one mantissa bit, in the order of the bit patterns;
# bitsandbytes.functional.get_4bit_type("fp4") divides by the largest, 12, in float32.
_FP4_MAGNITUDES = tuple(_f32(x / 12) for x in (0.0, 0.0625, 8.0, 12.0, 4.0, 6.0, 2.0, 3.0))
FP4: tuple[float, ...] = _FP4_MAGNITUDES + tuple(0.0 - x for x in _FP4_MAGNITUDES)

CODEBOOKS: dict[str, tuple[float, ...]] = {"nf4": NF4, "fp4": FP4}


def _linspace(num_points: int) -> list[float]:
    """torch.linspace(0.1, 1, num_points): float32 steps from both ends towards the middle."""
    start, step = _f32(0.1), _f32((1.0 - _f32(0.1)) / (num_points - 1))
    half = num_points // 2
    low = [_f32(start + step * i) for i in range(half)]
    return low + [_f32(1.0 - step * (num_points - 1 - i)) for i in range(half, num_points)]


def _dynamic_8bit() -> tuple[float, ...]:
    """Seven decades, each split into twice as many means as the one below (arXiv 1511.04561)."""
    values = [0.0, 1.0]
    for decade in range(7):
        edges, scale = _linspace(2**decade + 1), _f32(10.0 ** (decade - 6))
        means = [_f32(_f32(a + b) / 2) for a, b in pairwise(edges)]
        values += [sign * _f32(scale * mean) for mean in means for sign in (1.0, -1.0)]
    return tuple(sorted(values))


# 256 values, as bitsandbytes.functional.create_dynamic_map() gives them.
DYNAMIC_8BIT: tuple[float, ...] = _dynamic_8bit()
