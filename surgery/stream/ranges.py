"""What is fetched of a file in one request each: large ranges, made of what will be read and in which order.

Where a file is needed whole, or is to be hashed, and in its own order but for a little, its ranges cover it from end to
end. Otherwise they are in the order of need.
"""

from __future__ import annotations

import mmap
from bisect import bisect_right
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Literal

from surgery.checkpoint.known import Known

__all__ = [
    "FileKey",
    "FileRanges",
    "Piece",
    "Range",
    "Wanted",
    "coalesced",
    "covering",
    "in_order",
    "is_all",
    "unknown",
]

FileKey = tuple[str, str]  # the model, and the file in it
State = Literal["waiting", "fetching", "ready", "gone"]

LAST = 1 << 62


@dataclass(frozen=True, slots=True)
class Wanted:
    """Bytes [start, stop) of a file that are read in one step of the plan; `order` counts all of them."""

    key: FileKey
    start: int
    stop: int
    order: int
    step: int


@dataclass(slots=True)
class Piece:
    """What is wanted of a range; `position` is where the next read is expected."""

    wanted: Wanted
    position: int
    is_late: bool = False  # needed after what comes behind it in the file


@dataclass(slots=True, eq=False)
class Range:
    """A range of a file, to be fetched in one request."""

    key: FileKey
    start: int
    stop: int
    order: int
    last_step: int
    pieces: list[Piece] = field(default_factory=list[Piece])
    number: int = -1  # of the ranges that cover a whole file
    state: State = "waiting"
    is_demanded: bool = False
    is_read: bool = False  # nothing of it is expected to be read any more
    is_hashed: bool = True
    buffer: mmap.mmap | None = None
    error: BaseException | None = None
    starts: list[int] = field(default_factory=list[int])  # of the pieces, in order
    num_left: int = 0  # bytes that are expected to be read and were not yet

    @property
    def num_bytes(self) -> int:
        """Bytes that it takes in memory."""
        return self.stop - self.start

    def add(self, piece: Piece) -> None:
        """The next piece in order of the file."""
        self.pieces.append(piece)
        self.starts.append(piece.wanted.start)
        if not piece.is_late:
            self.num_left += piece.wanted.stop - piece.wanted.start
            self.last_step = max(self.last_step, piece.wanted.step)

    def read_up_to(self, start: int, stop: int) -> None:
        """Bytes [start, stop) were read, and what lies before them in their pieces never will be."""
        index = max(0, bisect_right(self.starts, start) - 1)
        while index < len(self.pieces) and self.starts[index] < stop:
            piece = self.pieces[index]
            position = max(piece.position, min(stop, piece.wanted.stop))
            self.num_left -= 0 if piece.is_late else position - piece.position
            piece.position = position
            index += 1


@dataclass(slots=True)
class FileRanges:
    """The ranges of one file in order of their start."""

    starts: list[int] = field(default_factory=list[int])
    ranges: list[Range] = field(default_factory=list[Range])

    def add(self, item: Range) -> None:
        """One more, wherever it lies."""
        index = bisect_right(self.starts, item.start)
        self.starts.insert(index, item.start)
        self.ranges.insert(index, item)

    def holding(self, position: int) -> Range | None:
        """The range, if it can still be had, that `position` lies in."""
        index = bisect_right(self.starts, position)
        for item in reversed(self.ranges[:index]):
            if item.stop > position and item.state != "gone":
                return item
            if item.number >= 0:  # these do not overlap
                return None
        return None


def unknown(items: Iterable[Wanted], known: Known) -> list[Wanted]:
    """What of `items` was not read while planning."""
    return [
        Wanted(item.key, start, stop, item.order, item.step)
        for item in items
        for start, stop in known.gaps(item.start, item.stop)
    ]


def is_all(items: Iterable[Wanted], start: int, stop: int, known: Known) -> bool:
    """Whether `items` are all that is not known of the bytes [start, stop) of a file."""
    data = known.gaps(start, stop)
    return sum(item.stop - item.start for item in items) == sum(stop - start for start, stop in data)


def in_order(items: Iterable[Wanted]) -> tuple[list[Piece], int]:
    """`items` in order of the file, and how many bytes of them are needed after what comes behind them in it."""
    pieces = sorted((Piece(item, item.start) for item in items), key=lambda piece: piece.wanted.start)
    return pieces, _mark_late(pieces)


def covering(key: FileKey, pieces: Sequence[Piece], gaps: Iterable[tuple[int, int]], range_bytes: int) -> list[Range]:
    """Ranges that cover all `gaps` of a file, in order, with `pieces`, as `in_order` gives them."""
    ranges: list[Range] = []
    for begin, end in gaps:
        for start in range(begin, end, range_bytes):
            stop = min(start + range_bytes, end)
            ranges.append(Range(key, start, stop, LAST, -1, number=len(ranges), is_hashed=False))
    _deal(pieces, ranges)
    order = LAST
    for item in reversed(ranges):
        order = item.order = min([order, *(piece.wanted.order for piece in item.pieces if not piece.is_late)])
        item.is_read = not item.num_left
    return ranges


def coalesced(items: Iterable[Wanted], range_bytes: int) -> list[Range]:
    """Ranges in the order of need, of what lies side by side in the file as well."""
    ranges: list[Range] = []
    for item in items:
        last = ranges[-1] if ranges else None
        if last and item.start == last.stop and item.stop - last.start <= range_bytes:
            last.stop = item.stop
        else:
            last = Range(item.key, item.start, item.stop, item.order, item.step)
            ranges.append(last)
        last.add(Piece(item, item.start))
    return ranges


def _mark_late(pieces: Sequence[Piece]) -> int:
    """Find what is needed after what comes behind it in the file; how many bytes that is."""
    earliest = LAST
    num_late = 0
    for piece in reversed(pieces):
        piece.is_late = piece.wanted.order > earliest
        earliest = min(earliest, piece.wanted.order)
        num_late += (piece.wanted.stop - piece.wanted.start) * piece.is_late
    return num_late


def _deal(pieces: Sequence[Piece], ranges: Sequence[Range]) -> None:
    """Give each range its part of each piece; all in order of the file."""
    starts = [item.start for item in ranges]
    for piece in pieces:
        wanted, position = piece.wanted, piece.wanted.start
        while position < wanted.stop:
            item = ranges[bisect_right(starts, position) - 1]
            stop = min(item.stop, wanted.stop)
            part = Wanted(wanted.key, position, stop, wanted.order, wanted.step)
            item.add(Piece(part, position, piece.is_late))
            position = stop
