"""The hash of a file whose ranges come one by one."""

from __future__ import annotations

import hashlib
from bisect import bisect_right
from collections.abc import Sequence

from surgery.checkpoint.remote import Digest, RemoteFile
from surgery.stream.ranges import Range

__all__ = ["NOTHING", "Begun", "WholeFile"]

Begun = tuple[int, str]
"""How many bytes of a file are hashed, and the state of the hash."""
NOTHING: Begun = (0, "")


class WholeFile:
    """A file that is hashed: from what was read while planning, and from `ranges`, which cover the rest in order."""

    def __init__(
        self, file: RemoteFile, ranges: Sequence[Range], stops: Sequence[int], begun: Begun, *, is_hashed: bool
    ) -> None:
        """`begun`: what a run before this one has hashed; `is_hashed`: whether the sha256 is wanted, listed or not.

        `stops`: where tensors end, in order, at which the hash can be put down.
        """
        self.file = file
        self.ranges = ranges
        self.is_busy = False
        self._num_hashed = 0
        self._position, state = begun  # bytes that are hashed
        self._digest = Digest(file, state)
        self._stops = stops
        self.steps: list[Begun] = []  # where it can be gone on from, until somebody takes note of them
        self._sha256 = hashlib.sha256() if is_hashed and not file.sha256 else None
        if not ranges:
            self._hash_known(file.size)

    @property
    def next(self) -> Range | None:
        """The range to be hashed next."""
        return self.ranges[self._num_hashed] if self._num_hashed < len(self.ranges) else None

    def hash(self, item: Range) -> None:
        """Take the next range into account, with what is known around it."""
        assert item.buffer is not None
        self._hash_known(item.start)
        data = memoryview(item.buffer)
        first, last = bisect_right(self._stops, item.start), bisect_right(self._stops, item.stop)
        for stop in (*self._stops[first:last], item.stop):
            self._update(data[self._position - item.start : stop - item.start])
            if state := self._digest.state:
                self.steps.append((stop, state))
        self._num_hashed += 1
        if not self.next:
            self._hash_known(self.file.size)

    def _hash_known(self, stop: int) -> None:
        if stop > self._position:
            self._update(self.file.known.get(self._position, stop))

    def _update(self, data: bytes | memoryview) -> None:
        self._digest.update(data)
        if self._sha256:
            self._sha256.update(data)
        self._position += len(data)

    def check(self) -> None:
        """Raises CheckpointError if the file is not the one that the Hub lists."""
        self._digest.check()

    @property
    def sha256(self) -> str:
        """Of a file that is hashed, and was checked; nothing if it was not asked for, and the Hub lists none."""
        return self._sha256.hexdigest() if self._sha256 else self.file.sha256
