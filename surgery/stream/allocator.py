"""Keeping the allocator to what is asked for.

Why: after a large block is freed, glibc serves blocks of its size from the arena of the thread that
asks, and keeps them there; with several workers that is a multiple of what is ever in use. A
threshold that is set, to whatever, no longer grows, and large blocks go back to the system.
"""

import ctypes

__all__ = ["give_back_large_blocks"]

M_MMAP_THRESHOLD = -3  # malloc.h
LARGE_BYTES = 3 << 20


def give_back_large_blocks() -> None:
    """Map blocks of `LARGE_BYTES` and more one by one, in this process from now on; no effect without glibc."""
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):
        return
    mallopt(M_MMAP_THRESHOLD, LARGE_BYTES)
