"""The file that a run writes into: what comes in file order goes past the page cache, where the system lets it.

Why: a byte that goes through the page cache takes a fresh page, a copy into it and its writing back, which in all costs
as much as hashing it twice, in part in threads of the kernel that nobody counts. A direct write wants whole
blocks from aligned memory, so bytes are gathered in two buffers: one is written while the other one fills.
"""

from __future__ import annotations

import mmap
import os
from concurrent.futures import Future, ThreadPoolExecutor
from errno import EINVAL
from pathlib import Path

import numpy as np

__all__ = ["Target"]

BLOCK_BYTES = max(4096, mmap.PAGESIZE)  # so that no page holds bytes that were written both ways
GATHERED_BYTES = 4 << 20
SMALLEST_DIRECT = 4 * GATHERED_BYTES  # of a file
WRITE_BEHIND_BYTES = 4 << 20
WRITTEN_BEHIND = 4  # times as much is looked at again, to drop what has reached the disk by then


class Target:
    """A file of a known size, with what it holds already. Used by one thread; another one writes what is gathered."""

    def __init__(self, path: Path, num_bytes: int) -> None:
        self._fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o666)
        os.ftruncate(self._fd, min(os.fstat(self._fd).st_size, num_bytes))
        self._direct_fd = _open_direct(path) if num_bytes >= SMALLEST_DIRECT else -1
        self._executor = ThreadPoolExecutor(1, "surgery-write")
        self._pending: Future[None] | None = None
        num_buffers = 2 if self._is_direct else 0
        self._buffers = [np.frombuffer(mmap.mmap(-1, GATHERED_BYTES), np.uint8) for _ in range(num_buffers)]
        self._base = 0  # where in the file the buffer begins
        self._start = self._stop = 0  # what of the buffer is filled
        self._unsynced = 0

    @property
    def _is_direct(self) -> bool:
        return self._direct_fd >= 0

    def append(self, data: memoryview, position: int) -> None:
        """Write what comes after all that was appended before, if not right behind it. Raises OSError, maybe later."""
        if not self._is_direct:
            self.put(data, position)
            return
        if position != self._base + self._stop:
            self.flush()
            self._begin(position)
        bytes_ = np.frombuffer(data, np.uint8)
        while len(bytes_):
            piece, bytes_ = np.split(bytes_, [GATHERED_BYTES - self._stop])
            self._buffers[0][self._stop : self._stop + len(piece)] = piece  # without the interpreter's lock
            self._stop += len(piece)
            if self._stop == GATHERED_BYTES:
                self._send()
                self._begin(self._base + GATHERED_BYTES)

    def _begin(self, position: int) -> None:
        self._base = position // BLOCK_BYTES * BLOCK_BYTES
        self._start = self._stop = position - self._base

    def _send(self) -> None:
        """Have what is gathered written, and go on with the other buffer."""
        self._wait()
        buffer = self._buffers[0].data[: self._stop]
        self._pending = self._executor.submit(self._write, buffer, self._base, self._start)
        self._buffers.reverse()

    def _wait(self) -> None:
        pending, self._pending = self._pending, None
        if pending:
            pending.result()

    def _write(self, buffer: memoryview, base: int, start: int) -> None:
        """Write `buffer` from `start` on to `base` + `start`: whole blocks directly, the rest as ever."""
        first = min(-(-start // BLOCK_BYTES) * BLOCK_BYTES, len(buffer))
        last = max(first, len(buffer) // BLOCK_BYTES * BLOCK_BYTES)
        self.put(buffer[start:first], base + start)
        written = first + self._put_directly(buffer[first:last], base + first)
        self.put(buffer[written:], base + written)

    def _put_directly(self, blocks: memoryview, position: int) -> int:
        """How many bytes the system took."""
        written = 0
        while written < len(blocks) and self._is_direct:
            try:
                written += os.pwrite(self._direct_fd, blocks[written:], position + written)
            except OSError as error:
                if error.errno != EINVAL:
                    raise
                break
        return written

    def put(self, data: memoryview, position: int) -> None:
        """Write what comes in no order. Raises OSError."""
        while len(data):
            count = os.pwrite(self._fd, data, position)
            data, position = data[count:], position + count
            self._unsynced += count
        if self._unsynced > WRITE_BEHIND_BYTES:
            # On Linux this starts writing dirty pages back, without waiting, so that the sync at the end finds little
            # to do, and drops clean ones: memory that the next pages can have is cheaper than fresh memory.
            start = max(0, position - WRITTEN_BEHIND * WRITE_BEHIND_BYTES)
            os.posix_fadvise(self._fd, start, position - start, os.POSIX_FADV_DONTNEED)
            self._unsynced = 0

    def read(self, num_bytes: int, position: int) -> bytes:
        """What was `put` before, or was there."""
        return os.pread(self._fd, num_bytes, position)

    def flush(self) -> None:
        """Write what is gathered."""
        self._send()
        self._wait()

    def sync(self) -> None:
        """Get everything onto the disk."""
        if self._is_direct:
            self.flush()
        os.fsync(self._fd)

    def close(self) -> None:
        """Close the file; what is gathered is lost."""
        self._executor.shutdown(wait=True)
        fds = (self._fd, self._direct_fd)
        self._fd = self._direct_fd = -1  # forgotten first: an interrupt in between must not make us close them twice
        for fd in fds:
            if fd >= 0:
                os.close(fd)


def _open_direct(path: Path) -> int:
    """-1 where there is no such thing."""
    try:
        return os.open(path, os.O_WRONLY | os.O_DIRECT) if hasattr(os, "O_DIRECT") else -1
    except OSError:
        return -1
