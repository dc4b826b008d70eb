"""What was read of a file on the Hub while planning: kept, so that it is not sent once more."""

from __future__ import annotations

import threading
from bisect import bisect_left, bisect_right

__all__ = ["Known"]


class Known:
    """Parts of a file. They never overlap, and are never forgotten."""

    def __init__(self) -> None:
        self._starts: list[int] = []
        self._parts: list[bytes] = []
        self._lock = threading.Lock()

    def add(self, start: int, data: bytes) -> None:
        """The bytes from `start` on; none of them are known yet."""
        with self._lock:
            index = bisect_left(self._starts, start)
            self._starts.insert(index, start)
            self._parts.insert(index, data)

    def gaps(self, start: int, stop: int) -> list[tuple[int, int]]:
        """What is not known of the bytes [start, stop), in order."""
        found: list[tuple[int, int]] = []
        with self._lock:
            first = max(0, bisect_right(self._starts, start) - 1)
            for begin, part in zip(self._starts[first:], self._parts[first:], strict=True):
                if begin >= stop:
                    break
                if begin > start:
                    found.append((start, begin))
                start = max(start, begin + len(part))
        return [*found, (start, stop)] if start < stop else found

    def read_into(self, buffer: memoryview, position: int) -> int:
        """Fill the front of `buffer` with what is known from `position` on; how many bytes that is."""
        with self._lock:
            index = bisect_right(self._starts, position) - 1
            if index < 0:
                return 0
            begin, part = self._starts[index], self._parts[index]
        found = memoryview(part)[position - begin : position - begin + len(buffer)]
        buffer[: len(found)] = found
        return len(found)

    def get(self, start: int, stop: int) -> bytes:
        """The bytes [start, stop), all of which are known."""
        buffer = bytearray(stop - start)
        position = start
        while position < stop:
            taken = self.read_into(memoryview(buffer)[position - start :], position)
            assert taken
            position += taken
        return bytes(buffer)
