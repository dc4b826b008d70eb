"""Keeping the allocator to what is asked for.

Why: after a large block is freed, glibc serves blocks of its size from the arena of the thread that
asks, and keeps them there; with several workers that is a multiple of what is ever in use. A
threshold that is set, to whatever, no longer grows, and large blocks go back to the system. So would
then all that is free at an arena's end, only to be asked for again: what of it may stay is set too.
"""

import ctypes

__all__ = ["give_back_large_blocks"]

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # malloc.h
LARGE_BYTES = 3 << 20


def give_back_large_blocks(kept_bytes: int) -> None:
    """Map blocks of `LARGE_BYTES` and more one by one, and keep at most `kept_bytes` of free smaller ones in an arena.

    For this process, from now on; no effect without glibc.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):
        return
    mallopt(M_MMAP_THRESHOLD, LARGE_BYTES)
    mallopt(M_TRIM_THRESHOLD, kept_bytes)
