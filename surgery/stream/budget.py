"""How many bytes may be in flight."""

from __future__ import annotations

import threading

__all__ = ["Budget", "Stopped"]


class Stopped(Exception):
    """Raised in a thread that waits for memory when the stream is being torn down."""


class Budget:
    """A counter of bytes that blocks who asks for more than is free."""

    def __init__(self, num_bytes: int) -> None:
        self.total = num_bytes
        self._free = num_bytes
        self._changed = threading.Condition()
        self._stopped = False

    def acquire(self, num_bytes: int) -> None:
        """Wait until `num_bytes` are free, and take them. More than the total waits for all of it."""
        wanted = min(num_bytes, self.total)
        with self._changed:
            self._changed.wait_for(lambda: self._stopped or self._free >= wanted)
            if self._stopped:
                raise Stopped
            self._free -= num_bytes

    def release(self, num_bytes: int) -> None:
        """Give bytes back."""
        with self._changed:
            self._free += num_bytes
            self._changed.notify_all()

    def stop(self) -> None:
        """Make every waiting and coming `acquire` raise Stopped."""
        with self._changed:
            self._stopped = True
            self._changed.notify_all()
