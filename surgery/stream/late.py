"""What comes of a file before it is needed, because the file is read in its own order to be hashed."""

from __future__ import annotations

from bisect import bisect_right, insort

from surgery.stream.ranges import Piece
from surgery.stream.scratch import ScratchFile

__all__ = ["Late"]


class Late:
    """Pieces of one file that are needed later, in memory or on scratch."""

    def __init__(self, scratch: ScratchFile | None = None, base: int = 0) -> None:
        """The file's bytes lie in `scratch` from `base` on."""
        self._scratch = scratch
        self._base = base
        self._starts: list[int] = []
        self._pieces: dict[int, tuple[Piece, bytes]] = {}

    def add(self, piece: Piece, data: bytes) -> int:
        """Keep a piece; how many bytes of memory that takes. Raises OSError."""
        start = piece.wanted.start
        insort(self._starts, start)
        if self._scratch:
            self._scratch.write(data, self._base + start)
            data = b""
        self._pieces[start] = (piece, data)
        return len(data)

    def holds(self, position: int) -> bool:
        """Whether the byte at `position` is kept."""
        index = bisect_right(self._starts, position) - 1
        return index >= 0 and position < self._pieces[self._starts[index]][0].wanted.stop

    def read_into(self, buffer: memoryview, position: int) -> tuple[int, int]:
        """Fill the front of `buffer` with what is kept from `position` on: how many bytes, and of memory set free."""
        if not self.holds(position):
            return 0, 0
        index = bisect_right(self._starts, position) - 1
        start = self._starts[index]
        piece, data = self._pieces[start]
        part = buffer[: piece.wanted.stop - position]
        if self._scratch:
            self._scratch.read_into(part, self._base + position)
        else:
            part[:] = data[position - start : position - start + len(part)]
        piece.position = max(piece.position, position + len(part))
        if piece.position < piece.wanted.stop:
            return len(part), 0
        del self._starts[index], self._pieces[start]
        return len(part), len(data)
