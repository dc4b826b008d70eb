"""Uniform draws that depend on a seed, a tensor's name, a model and an element's index, and on nothing else.

Why: workers take the spans of a tensor in any order, and spans differ with the memory. Draws are
made for fixed blocks of elements, each from a generator of its own, always on the CPU. The
generator is seeded with 128 bits of a hash: torch's would take 32 of them, and of the blocks of a
large model some would draw the same.
"""

from __future__ import annotations

import hashlib

import numpy as np
import torch
from torch import Tensor

from surgery.graph import Span
from surgery.numerics.merge.kernel import BLOCK

__all__ = ["Draws"]


class Draws:
    """The draws of one tensor; `streams` names the models. An object serves one thread."""

    def __init__(self, seed: int, name: str, streams: tuple[str, ...], device: torch.device) -> None:
        self._seed = seed
        self._name = name
        self._streams = streams
        self._device = device
        self._drawn: dict[int, tuple[int, Tensor]] = {}  # of each model the last block drawn

    def below(self, probability: float, index: int, start: int, num_elements: int) -> Tensor:
        """1 with `probability`, else 0, f32 [num_elements], for elements from `start` on, within one block.

        For one model there must be one probability. Valid until the next block of that model.
        """
        block = start // BLOCK
        if self._drawn.get(index, (-1, None))[0] != block:
            self._drawn[index] = (block, self._block(index, block).lt_(probability))
        mask = self._drawn[index][1]
        return mask[start - block * BLOCK :][:num_elements]

    def uniform(self, index: int, span: Span) -> Tensor:
        """In [0, 1), f32, for the elements of any span."""
        first, last = span[0] // BLOCK, -(-span[1] // BLOCK)
        drawn = torch.cat([self._block(index, block) for block in range(first, last)])
        return drawn[span[0] - first * BLOCK :][: span[1] - span[0]]

    def _block(self, index: int, block: int) -> Tensor:
        """In [0, 1), f32 [BLOCK]."""
        key = "\0".join([str(self._seed), self._name, self._streams[index], str(block)])
        digest = hashlib.sha256(key.encode()).digest()
        generator = np.random.Generator(np.random.PCG64DXSM(int.from_bytes(digest[:16], "little")))
        drawn = torch.from_numpy(generator.random(BLOCK, dtype=np.float32))  # pyright: ignore
        return drawn.to(self._device)
