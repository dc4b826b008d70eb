"""Ranges of files on the Hub, fetched ahead of the reads that they are for.

What will be read, and in which order, is known from the plan. It is cut into large ranges, a few of which are in
flight while others wait, within a budget of bytes, to be read from. The order is a guess that makes things fast, no
more: a range that is asked for before its turn is fetched at once, and a byte that is asked for twice is fetched twice.
What was read while planning is not fetched again.

A file whose ranges cover it is hashed, one range after the other as they come.
"""

from __future__ import annotations

import mmap
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType

from surgery.checkpoint import SourceFile
from surgery.checkpoint.remote import Cancelled, Damaged, RemoteFile, fetch
from surgery.errors import CheckpointError
from surgery.stream.late import Late
from surgery.stream.ranges import (
    FileKey,
    FileRanges,
    Piece,
    Range,
    Wanted,
    coalesced,
    covering,
    in_order,
    is_all,
    unknown,
)
from surgery.stream.scratch import ScratchFile
from surgery.stream.whole import NOTHING, Begun, WholeFile

__all__ = ["Prefetch"]

CONNECTIONS = 8
MOST_SPARE = 2  # buffers of a range
JOIN_SECONDS = 0.2  # a thread that waits for a server that says nothing is left behind


class Prefetch:
    """Fetches ahead. Used by one thread; close it when done."""

    def __init__(
        self, files: dict[FileKey, SourceFile], budget: int, range_bytes: int, directory: Path | None = None
    ) -> None:
        """`budget`: bytes in memory, some of them for what comes out of turn, and for what is kept late.

        `directory`: where what is kept late may lie as well.
        """
        self._files = files
        self._remote = {key: file.place for key, file in files.items() if isinstance(file.place, RemoteFile)}
        self._budget = budget - 2 * range_bytes
        self._range_bytes = range_bytes
        self._ranges: dict[FileKey, FileRanges] = {key: FileRanges() for key in self._remote}
        self._queue: list[Range] = []
        self._live: list[Range] = []
        self.checked: list[RemoteFile] = []  # files that are what the Hub lists, so far
        self._late = {key: Late() for key in self._remote}
        self._directory = directory
        self._scratch: ScratchFile | None = None
        self._scratch_base = 0
        self._wholes: dict[FileKey, WholeFile] = {}
        self._begun: Mapping[str, Begun] = {}
        self._newly_hashed: list[tuple[str, Begun]] = []
        self._spare: list[mmap.mmap] = []  # in what the budget leaves
        self._used = 0
        self._stopped = False
        self._failure: BaseException | None = None
        self._changed = threading.Condition()
        self._threads: list[threading.Thread] = []

    def expect(
        self,
        wanted: Sequence[Wanted],
        hashed: frozenset[str],
        room: int = 0,
        begun: Mapping[str, Begun] = MappingProxyType({}),
    ) -> None:
        """What will be read, in order. Of models in `hashed` each file is read whole, if it can be in its order.

        What of a file comes before it is needed may take `room` bytes of scratch. Nothing of what a run before this one
        has hashed of a file (`begun`) is needed.
        """
        self._begun = begun
        by_file: dict[FileKey, list[Wanted]] = {key: [] for key in self._remote}
        for item in wanted:
            by_file[item.key].append(item)
        for key, items in by_file.items():
            room -= self._plan(key, unknown(items, self._remote[key].known), room, is_hashed=key[0] in hashed)
        self._queue.sort(key=lambda item: (item.order, item.number))
        for number in range(max(1, min(CONNECTIONS, len(self._queue)))):
            self._threads.append(threading.Thread(target=self._work, name=f"surgery-hub-{number}", daemon=True))
        for thread in self._threads:
            thread.start()

    def _plan(self, key: FileKey, items: Sequence[Wanted], room: int, *, is_hashed: bool) -> int:
        """Plan the ranges of a file; how many bytes of scratch they take."""
        file, header = self._remote[key], self._files[key].header
        pieces, num_late = in_order(items)
        in_memory = self._range_bytes // len(self._remote)
        begun = self._begun.get(str(file), NOTHING)
        is_wanted = is_hashed or is_all(items, max(header.num_bytes, begun[0]), header.file_bytes, file.known)
        if is_wanted and num_late <= max(in_memory, room):
            stops = sorted({extent.stop for extent in header.tensors.values()})
            cover = covering(key, pieces, file.known.gaps(begun[0], header.file_bytes), self._range_bytes)
            self._wholes[key] = WholeFile(file, cover, stops, begun, is_hashed=is_hashed)
        else:
            cover = coalesced(items, self._range_bytes)
        for item in cover:
            self._ranges[key].add(item)
            self._queue.append(item)
        if key not in self._wholes or num_late <= in_memory:
            return 0
        self._late[key] = Late(self._scratch_file(), self._scratch_base)
        self._scratch_base += file.size
        return num_late

    def _scratch_file(self) -> ScratchFile:
        assert self._directory
        self._scratch = self._scratch or ScratchFile(self._directory)
        return self._scratch

    def read_into(self, buffer: memoryview, key: FileKey, start: int, stop: int) -> None:
        """Fill `buffer` with bytes [start, ...) of the file; `stop` is where what is read in this step ends.

        Raises CheckpointError.
        """
        position = start
        end = start + len(buffer)
        while position < end:
            part = buffer[position - start :]
            taken = self._remote[key].known.read_into(part, position) or self._take_late(part, key, position)
            if not taken:
                item = self._obtain(key, position, stop)
                if item is None:
                    continue
                taken = min(item.stop, end) - position
                assert item.buffer is not None
                part[:taken] = memoryview(item.buffer)[position - item.start : position - item.start + taken]
                self._consume(item, position, position + taken)
            position += taken

    def _take_late(self, buffer: memoryview, key: FileKey, position: int) -> int:
        with self._changed:
            taken, freed = self._late[key].read_into(buffer, position)
            self._used -= freed
            if freed:
                self._changed.notify_all()
        return taken

    def _obtain(self, key: FileKey, position: int, stop: int) -> Range | None:
        """The range that holds `position`, once it is there; None if it came meanwhile, and is kept as late."""
        with self._changed:
            while not self._late[key].holds(position):
                item = self._ranges[key].holding(position)
                if item is None:
                    item = self._extra(key, position, min(stop, position + self._range_bytes))
                item.is_demanded, item.is_read = True, False
                self._changed.notify_all()
                self._wait_for(item)
                if item.state == "ready":
                    return item
        return None

    def _wait_for(self, item: Range) -> None:
        """Wait until a range is there. Raises what went wrong."""
        self._changed.wait_for(lambda: item.state in ("ready", "gone") or item.error or self._failure or self._stopped)
        if self._stopped:
            raise Cancelled
        if error := item.error or self._failure:
            raise error

    def _extra(self, key: FileKey, start: int, stop: int) -> Range:
        """A range that nobody expected, from `start`, which is not known, to `stop` at most."""
        start, stop = self._remote[key].known.gaps(start, stop)[0]
        wanted = Wanted(key, start, stop, -1, -1)
        item = Range(key, start, stop, -1, -1)
        item.add(Piece(wanted, start))
        self._ranges[key].add(item)
        self._queue.insert(0, item)
        return item

    def _consume(self, item: Range, start: int, stop: int) -> None:
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

    def _let_go(self, item: Range) -> None:
        """Free a range that nobody needs any more, but for what is kept for late. Holds the lock."""
        if item.state != "ready" or not item.is_read or not item.is_hashed:
            return
        assert item.buffer is not None
        for piece in item.pieces:
            start, stop = piece.wanted.start, piece.wanted.stop
            if piece.is_late and piece.position < stop:
                try:
                    self._used += self._late[item.key].add(piece, item.buffer[start - item.start : stop - item.start])
                except OSError as error:  # a disk that is full now; raised by the next read
                    self._failure = self._failure or error
        self._used -= item.num_bytes
        if item.num_bytes == self._range_bytes and len(self._spare) < MOST_SPARE:
            self._spare.append(item.buffer)
        self._fit_spare()
        item.state, item.buffer = "gone", None
        self._live.remove(item)
        self._changed.notify_all()

    def _fit_spare(self) -> None:
        while self._spare and self._used + len(self._spare) * self._range_bytes > self._budget:
            self._spare.pop()

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
        if not whole.ranges:
            self._check(whole)
        if self._failure:
            raise self._failure
        return whole.sha256

    def newly_hashed(self) -> list[tuple[str, Begun]]:
        """How far files were hashed, step by step since this was asked last."""
        with self._changed:
            new, self._newly_hashed = self._newly_hashed, []
        return new

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
        if self._scratch:
            self._scratch.close()

    def _work(self) -> None:
        while taken := self._next():
            item, spare = taken
            try:
                buffer = spare or mmap.mmap(-1, item.num_bytes)
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
            del buffer, spare, taken
            self._hash(item.key)

    def _next(self) -> tuple[Range, mmap.mmap | None] | None:
        """The next range to fetch, once there is room for it, and a buffer if one is spare; None at the end."""
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
                    spare = self._take_spare(item.num_bytes)
                    self._fit_spare()
                    return item, spare
                self._changed.wait()
        return None

    def _take_spare(self, num_bytes: int) -> mmap.mmap | None:
        """Pages that were written to before come cheaper."""
        return self._spare.pop() if num_bytes == self._range_bytes and self._spare else None

    def _fill(self, item: Range, buffer: mmap.mmap) -> None:
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
        while whole and (item := self._begin_hashing(whole)):
            try:
                whole.hash(item)
            finally:
                self._end_hashing(whole, item)

    def _begin_hashing(self, whole: WholeFile) -> Range | None:
        with self._changed:
            item = whole.next
            if whole.is_busy or item is None or item.state != "ready":
                return None
            whole.is_busy = True
            return item

    def _end_hashing(self, whole: WholeFile, item: Range) -> None:
        with self._changed:
            whole.is_busy = False
            item.is_hashed = True
            self._newly_hashed += [(str(whole.file), step) for step in whole.steps]
            whole.steps = []
            if not whole.next:
                self._check(whole)
            self._let_go(item)
            self._changed.notify_all()

    def _check(self, whole: WholeFile) -> None:
        try:
            whole.check()
            self.checked.append(whole.file)
        except CheckpointError as error:  # raised by the next read
            self._failure = self._failure or Damaged(*error.problems)
