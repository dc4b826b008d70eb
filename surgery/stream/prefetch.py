"""Ranges of files on the Hub, fetched ahead of the reads that they are for.

What will be read, and in which order, is known from the plan. It is cut into large ranges, a few of which are in
flight while others wait, within a budget of bytes, to be read from. The order is a guess that makes things fast, no
more: a range that is asked for before its turn is fetched at once, and a byte that is asked for twice is fetched twice.

Where a file is needed whole, and in its own order but for a little, its ranges cover it from end to end, and are
hashed one after the other as they come.
"""

from __future__ import annotations

import hashlib
import mmap
import threading
from bisect import bisect_left, bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Literal

from surgery.checkpoint import SourceFile
from surgery.checkpoint.remote import Cancelled, Damaged, Digest, RemoteFile, fetch
from surgery.errors import CheckpointError

__all__ = ["FileKey", "Piece", "Prefetch", "Wanted"]

FileKey = tuple[str, str]  # the model, and the file in it
State = Literal["waiting", "fetching", "ready", "gone"]

CONNECTIONS = 8
MOST_SPARE = 2  # buffers of a range
JOIN_SECONDS = 0.2  # a thread that waits for a server that says nothing is left behind
LAST = 1 << 62
GAP_BYTES = 256 << 10  # that nobody needs, and which cost less than a request


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
class _Range:
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
class _Whole:
    """A file that is hashed: the ranges that cover it, and how many of them are done."""

    ranges: list[_Range]
    digest: Digest
    sha256: hashlib._Hash | None  # pyright: ignore[reportPrivateUsage] # where the Hub lists none
    num_hashed: int = 0
    is_busy: bool = False


@dataclass(slots=True)
class _Ranges:
    """The ranges of one file in order of their start."""

    starts: list[int] = field(default_factory=list[int])
    ranges: list[_Range] = field(default_factory=list[_Range])

    def add(self, item: _Range) -> None:
        index = bisect_right(self.starts, item.start)
        self.starts.insert(index, item.start)
        self.ranges.insert(index, item)

    def holding(self, position: int) -> _Range | None:
        """The range, if it can still be had, that `position` lies in."""
        index = bisect_right(self.starts, position)
        for item in reversed(self.ranges[:index]):
            if item.stop > position and item.state != "gone":
                return item
            if item.number >= 0:  # these do not overlap
                return None
        return None


class Prefetch:
    """Fetches ahead. Used by one thread; close it when done."""

    def __init__(self, files: dict[FileKey, SourceFile], budget: int, range_bytes: int) -> None:
        """`budget`: bytes in memory, some of them for what comes out of turn, for what is kept late, and for reuse."""
        self._files = files
        self._remote = {key: file.place for key, file in files.items() if isinstance(file.place, RemoteFile)}
        self._budget = budget - (2 + MOST_SPARE) * range_bytes
        self._range_bytes = range_bytes
        self._ranges: dict[FileKey, _Ranges] = {key: _Ranges() for key in self._remote}
        self._queue: list[_Range] = []
        self._live: list[_Range] = []
        self._kept: dict[FileKey, dict[int, tuple[Piece, bytes]]] = {key: {} for key in self._remote}
        self._wholes: dict[FileKey, _Whole] = {}
        self._spare: list[mmap.mmap] = []
        self._used = 0
        self._stopped = False
        self._failure: BaseException | None = None
        self._changed = threading.Condition()
        self._threads: list[threading.Thread] = []

    def expect(self, wanted: Sequence[Wanted], hashed: frozenset[str]) -> None:
        """What will be read, in order. Of models in `hashed` the sha256 of each file that is read whole is computed."""
        by_file: dict[FileKey, list[Wanted]] = {}
        for item in wanted:
            by_file.setdefault(item.key, []).append(item)
        for key, items in by_file.items():
            covering = self._covering(key, items)
            for item in covering or self._coalesced(items):
                self._ranges[key].add(item)
                self._queue.append(item)
            if covering:
                file = self._remote[key]
                sha256 = hashlib.sha256() if key[0] in hashed and not file.sha256 else None
                self._wholes[key] = _Whole(covering, Digest(file), sha256)
        self._queue.sort(key=lambda item: (item.order, item.number))
        for number in range(max(1, min(CONNECTIONS, len(self._queue)))):
            self._threads.append(threading.Thread(target=self._work, name=f"surgery-hub-{number}", daemon=True))
        for thread in self._threads:
            thread.start()

    def _covering(self, key: FileKey, items: list[Wanted]) -> list[_Range]:
        """Ranges that cover the file from its first byte to its last, in order; none where that does not serve."""
        header = self._files[key].header
        pieces = sorted((Piece(item, item.start) for item in items), key=lambda piece: piece.wanted.start)
        if sum(item.stop - item.start for item in items) != header.file_bytes - header.num_bytes:
            return []
        earliest = LAST
        num_late = 0
        for piece in reversed(pieces):
            piece.is_late = piece.wanted.order > earliest
            earliest = min(earliest, piece.wanted.order)
            num_late += (piece.wanted.stop - piece.wanted.start) * piece.is_late
        if num_late > self._range_bytes // len(self._remote):
            return []
        ranges: list[_Range] = []
        for start in range(0, header.file_bytes, self._range_bytes):
            stop = min(start + self._range_bytes, header.file_bytes)
            ranges.append(_Range(key, start, stop, LAST, -1, number=len(ranges), is_hashed=False))
        for piece in pieces:
            _deal(piece, ranges, self._range_bytes)
        order = LAST
        for item in reversed(ranges):
            order = item.order = min([order, *(piece.wanted.order for piece in item.pieces if not piece.is_late)])
            item.is_read = not item.num_left
        return ranges

    def _coalesced(self, items: list[Wanted]) -> list[_Range]:
        """Ranges in the order of need, of what is near in the file as well."""
        ranges: list[_Range] = []
        starts = sorted(item.start for item in items)
        for item in items:
            last = ranges[-1] if ranges else None
            if last and self._is_near(last, item) and bisect_left(starts, last.stop) == bisect_left(starts, item.start):
                last.stop = item.stop
            else:
                last = _Range(item.key, item.start, item.stop, item.order, item.step)
                ranges.append(last)
            last.add(Piece(item, item.start))
        return ranges

    def _is_near(self, last: _Range, item: Wanted) -> bool:
        return 0 <= item.start - last.stop <= GAP_BYTES and item.stop - last.start <= self._range_bytes

    def read_into(self, buffer: memoryview, key: FileKey, start: int, stop: int) -> None:
        """Fill `buffer` with bytes [start, ...) of the file; `stop` is where what is read in this step ends.

        Raises CheckpointError.
        """
        position = start
        end = start + len(buffer)
        while position < end:
            part = buffer[position - start :]
            taken = self._take_kept(part, key, position)
            if not taken:
                item = self._obtain(key, position, stop)
                taken = min(item.stop, end) - position
                assert item.buffer is not None
                part[:taken] = memoryview(item.buffer)[position - item.start : position - item.start + taken]
                self._consume(item, position, position + taken)
            position += taken

    def _take_kept(self, buffer: memoryview, key: FileKey, position: int) -> int:
        for start, (piece, data) in self._kept[key].items():
            if start <= position < start + len(data):
                taken = min(len(buffer), start + len(data) - position)
                buffer[:taken] = data[position - start : position - start + taken]
                piece.position = max(piece.position, position + taken)
                if piece.position >= start + len(data):
                    del self._kept[key][start]
                    self._release(len(data))
                return taken
        return 0

    def _obtain(self, key: FileKey, position: int, stop: int) -> _Range:
        """The range that holds `position`, once it is there."""
        with self._changed:
            while True:
                item = self._ranges[key].holding(position)
                if item is None:
                    item = self._extra(key, position, min(stop, position + self._range_bytes))
                item.is_demanded, item.is_read = True, False
                self._changed.notify_all()
                self._wait_for(item)
                if item.state == "ready":
                    return item

    def _wait_for(self, item: _Range) -> None:
        """Wait until a range is there. Raises what went wrong."""
        self._changed.wait_for(lambda: item.state in ("ready", "gone") or item.error or self._failure or self._stopped)
        if self._stopped:
            raise Cancelled
        if error := item.error or self._failure:
            raise error

    def _extra(self, key: FileKey, start: int, stop: int) -> _Range:
        """A range that nobody expected."""
        wanted = Wanted(key, start, stop, -1, -1)
        item = _Range(key, start, stop, -1, -1)
        item.add(Piece(wanted, start))
        self._ranges[key].add(item)
        self._queue.insert(0, item)
        return item

    def _consume(self, item: _Range, start: int, stop: int) -> None:
        item.read_up_to(start, stop)
        if not item.num_left:
            with self._changed:
                item.is_read = True
                self._let_go(item)

    def passed(self, step: int) -> None:
        """All reads of the steps up to this one were made."""
        with self._changed:
            while self._queue and self._queue[0].last_step <= step and self._queue[0].number < 0:
                self._queue.pop(0).state = "gone"
            for item in [item for item in self._live if item.last_step <= step]:
                item.is_read = True
                self._let_go(item)

    def _let_go(self, item: _Range) -> None:
        """Free a range that nobody needs any more, but for what is kept for late. Holds the lock."""
        if item.state != "ready" or not item.is_read or not item.is_hashed:
            return
        assert item.buffer is not None
        for piece in item.pieces:
            start, stop = piece.wanted.start, piece.wanted.stop
            if piece.is_late and piece.position < stop:
                self._kept[item.key][start] = (piece, item.buffer[start - item.start : stop - item.start])
                self._used += stop - start
        if item.num_bytes == self._range_bytes and len(self._spare) < MOST_SPARE:
            self._spare.append(item.buffer)
        item.state, item.buffer = "gone", None
        self._live.remove(item)
        self._used -= item.num_bytes
        self._changed.notify_all()

    def _release(self, num_bytes: int) -> None:
        with self._changed:
            self._used -= num_bytes
            self._changed.notify_all()

    def finish(self, key: FileKey) -> str:
        """The sha256 of a file, or nothing where it was not read whole. Raises CheckpointError if it is damaged."""
        whole = self._wholes.get(key)
        if whole is None:
            return ""
        with self._changed:
            for item in whole.ranges:
                item.is_demanded = item.is_read = True
            self._changed.notify_all()
            for item in whole.ranges:
                self._changed.wait_for(lambda item=item: item.is_hashed or item.error or self._failure or self._stopped)
                if error := item.error or self._failure:
                    raise error
                if not item.is_hashed:
                    raise Cancelled
        return whole.sha256.hexdigest() if whole.sha256 else self._remote[key].sha256

    def stop(self) -> None:
        """Let nobody wait any more."""
        with self._changed:
            self._stopped = True
            self._changed.notify_all()

    def close(self) -> None:
        """Stop fetching."""
        self.stop()
        for thread in self._threads:
            thread.join(JOIN_SECONDS)

    def _work(self) -> None:
        while item := self._next():
            try:
                buffer = self._buffer(item.num_bytes)
                self._fill(item, buffer)
            except Cancelled:
                return
            except BaseException as error:  # raised again by whoever needs it
                with self._changed:
                    item.error = error
                    self._changed.notify_all()
                continue
            with self._changed:
                item.buffer, item.state = buffer, "ready"
                self._let_go(item)
                self._changed.notify_all()
            del buffer
            self._hash(item.key)

    def _next(self) -> _Range | None:
        """The next range to fetch, once there is room for it; None at the end."""
        with self._changed:
            while not self._stopped:
                item = next((item for item in self._queue if item.is_demanded), None)
                if item is None and self._queue and self._used + self._queue[0].num_bytes <= self._budget:
                    item = self._queue[0]
                if item is not None:
                    self._queue.remove(item)
                    item.state = "fetching"
                    self._live.append(item)
                    self._used += item.num_bytes
                    return item
                self._changed.wait()
        return None

    def _buffer(self, num_bytes: int) -> mmap.mmap:
        """Pages that were written to before come cheaper."""
        with self._changed:
            if num_bytes == self._range_bytes and self._spare:
                return self._spare.pop()
        return mmap.mmap(-1, num_bytes)

    def _fill(self, item: _Range, buffer: mmap.mmap) -> None:
        view = memoryview(buffer)
        position = 0

        def take(data: bytes) -> None:
            nonlocal position
            view[position : position + len(data)] = data
            position += len(data)

        fetch(self._remote[item.key], item.start, item.stop, take, lambda: self._stopped)

    def _hash(self, key: FileKey) -> None:
        """Hash the ranges of a file that are there, in order, if no other thread is at it."""
        whole = self._wholes.get(key)
        for item in self._unhashed(whole) if whole else ():
            assert whole and item.buffer is not None
            whole.digest.update(memoryview(item.buffer))
            if whole.sha256:
                whole.sha256.update(memoryview(item.buffer))

    def _unhashed(self, whole: _Whole) -> Iterator[_Range]:
        """The next ranges to be hashed, each taken for hashed when the next one is asked for."""
        while True:
            with self._changed:
                item = whole.ranges[whole.num_hashed] if whole.num_hashed < len(whole.ranges) else None
                if whole.is_busy or item is None or item.state != "ready":
                    return
                whole.is_busy = True
            try:
                yield item
            finally:
                with self._changed:
                    whole.is_busy = False
                    whole.num_hashed += 1
                    item.is_hashed = True
                    if whole.num_hashed == len(whole.ranges):
                        self._check(whole)
                    self._let_go(item)
                    self._changed.notify_all()

    def _check(self, whole: _Whole) -> None:
        try:
            whole.digest.check()
        except CheckpointError as error:  # raised by the next read
            self._failure = self._failure or Damaged(*error.problems)


def _deal(piece: Piece, ranges: list[_Range], range_bytes: int) -> None:
    """Give each range its part of the piece."""
    wanted = piece.wanted
    position = wanted.start
    while position < wanted.stop:
        item = ranges[position // range_bytes]
        stop = min(item.stop, wanted.stop)
        part = Wanted(wanted.key, position, stop, wanted.order, wanted.step)
        item.add(Piece(part, position, piece.is_late))
        position = stop
