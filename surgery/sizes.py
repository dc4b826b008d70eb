"""Byte counts as people write them: `5GB` is 5·10⁹, `2GiB` is 2·2³⁰."""

from __future__ import annotations

import re

__all__ = ["format_binary", "format_decimal", "parse_size"]

_UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12, "KI": 2**10, "MI": 2**20, "GI": 2**30, "TI": 2**40}
_SIZE = re.compile(r"\s*(\d{1,20}(?:\.\d{1,20})?)\s*([KMGT]I?|)B?\s*", re.IGNORECASE)

SIZE_PATTERN = r"^\s*\d+(\.\d+)?\s*([KMGTkmgt][Ii]?)?[Bb]?\s*$"


def parse_size(size: str | int) -> int:
    """Bytes in `size`: an int, or text such as `5GB`, `256MiB`. Raises ValueError for anything else."""
    match = _SIZE.fullmatch(str(size))
    if match is None:
        raise ValueError(f"{size!r} is no size: write 5GB (10⁹ bytes) or 2GiB (2³⁰ bytes)")
    num_bytes = int(float(match[1]) * _UNITS[match[2].upper()])
    if num_bytes <= 0:
        raise ValueError(f"{size!r} is no size: it must be more than nothing")
    return num_bytes


def _format(num_bytes: int, base: int, units: tuple[str, ...]) -> str:
    value, unit = float(num_bytes), units[0]
    for unit in units:
        if value < base or unit == units[-1]:
            break
        value /= base
    return f"{num_bytes} B" if unit == units[0] else f"{value:.1f} {unit}"


def format_decimal(num_bytes: int) -> str:
    """`16.1 GB`: powers of 1000, for files."""
    return _format(num_bytes, 1000, ("B", "kB", "MB", "GB", "TB"))


def format_binary(num_bytes: int) -> str:
    """`2.0 GiB`: powers of 1024, for memory."""
    return _format(num_bytes, 1024, ("B", "KiB", "MiB", "GiB", "TiB"))
