"""Bytes on disk for a while, in a file that has no name: a kill leaves nothing of it."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

__all__ = ["ScratchFile"]


class ScratchFile:
    """A file that takes the room of what was written to it, wherever in it that is. Close it when done."""

    def __init__(self, directory: Path) -> None:
        self._file = tempfile.TemporaryFile(dir=directory, buffering=0)  # noqa: SIM115

    def read_into(self, buffer: memoryview, start: int) -> None:
        """Fill `buffer` with what was written from `start` on. Raises OSError."""
        filled = 0
        while filled < len(buffer):
            count = os.preadv(self._file.fileno(), [buffer[filled:]], start + filled)
            if not count:
                raise OSError("scratch is shorter than what was written to it")
            filled += count

    def write(self, data: bytes | memoryview, start: int) -> None:
        """Write `data` at `start`. Raises OSError."""
        left = memoryview(data)
        while left:
            count = os.pwrite(self._file.fileno(), left, start)
            left, start = left[count:], start + count

    def close(self) -> None:
        """Throw it away."""
        self._file.close()
