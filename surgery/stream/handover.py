"""Handing chunks over in the order of the files, hashed for their tensors on the way.

Why a thread of its own: a byte that is written is hashed twice, for its tensor and for its file. That takes longer than
most arithmetic, and has to go in order; so each of the two goes at its own pace, one behind the other.
"""

from __future__ import annotations

import hashlib
import queue
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from dataclasses import dataclass

from surgery.graph import TileError
from surgery.layout import OutputFile, Placed

__all__ = ["Chunk", "Handover", "Item", "TensorHashes"]

TensorHashes = dict[tuple[str, str], "hashlib._Hash"]  # pyright: ignore[reportPrivateUsage]
"""The sha256 of tensors, by file and name."""


@dataclass(frozen=True, slots=True)
class Chunk:
    """Finished bytes of one output tensor, `start` counted from its first byte."""

    file: OutputFile
    placed: Placed
    start: int
    data: memoryview
    errors: tuple[TileError, ...] = ()  # of rounding, tile by tile


@dataclass(slots=True)
class Item:
    """Something to hand over in order: chunks once `future` is done, then `done` gives back what they held."""

    future: Future[list[Chunk]]
    done: Callable[[], None]


Handed = Item | BaseException | None  # an error to be raised, or the end


class Handover:
    """Two queues, and the hashes of all tensors of which chunks were handed over."""

    def __init__(self) -> None:
        self.hashes: TensorHashes = {}
        self._computed: queue.SimpleQueue[Handed] = queue.SimpleQueue()
        self._hashed: queue.SimpleQueue[Handed] = queue.SimpleQueue()

    def put(self, handed: Handed) -> None:
        """What comes next: an item, or the last there is."""
        self._computed.put(handed)

    def hash_tensors(self) -> None:
        """Pass everything on, hashed, until the last. For a thread of its own."""
        try:
            while isinstance(handed := self._computed.get(), Item):
                for chunk in handed.future.result():
                    self._hash_of(chunk).update(chunk.data)
                self._hashed.put(handed)
            self._hashed.put(handed)
        except BaseException as error:  # raised again by whoever takes the chunks
            self._hashed.put(error)

    def _hash_of(self, chunk: Chunk) -> hashlib._Hash:  # pyright: ignore[reportPrivateUsage]
        return self.hashes.setdefault((chunk.file.name, chunk.placed.name), hashlib.sha256())

    def chunks(self) -> Iterator[Chunk]:
        """All chunks in order. The data of one lives until the next is asked for."""
        while (handed := self._hashed.get()) is not None:
            if isinstance(handed, BaseException):
                raise handed
            yield from handed.future.result()
            handed.done()
