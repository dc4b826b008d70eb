"""The hash of a file whose ranges come one by one."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

from surgery.checkpoint.remote import Digest, RemoteFile
from surgery.stream.ranges import Range

__all__ = ["WholeFile"]


class WholeFile:
    """A file that is hashed: from what was read while planning, and from `ranges`, which cover the rest in order."""

    def __init__(self, file: RemoteFile, ranges: Sequence[Range], *, is_hashed: bool) -> None:
        """`is_hashed`: whether the sha256 is wanted even where the Hub lists none."""
        self.file = file
        self.ranges = ranges
        self.is_busy = False
        self._num_hashed = 0
        self._position = 0  # bytes that are hashed
        self._digest = Digest(file)
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
        self._update(memoryview(item.buffer))
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
