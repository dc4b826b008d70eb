"""Arcee fusion: of a model's changes, those that matter most."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, cast

from surgery.graph import Span
from surgery.numerics.dtypes import torch_dtype
from surgery.numerics.merge.kernel import UNIT, MergeKernel, working_dtype
from surgery.types import DType, TensorType

if TYPE_CHECKING:
    import torch
    from torch import Tensor

__all__ = ["ArceeFusion"]

_EPS = 1e-8  # added to probabilities
_BINS = 1 << 16


@dataclass(frozen=True, slots=True)
class _State:
    """`found` are the bits, so far, of the quartiles of importance, and their ranks among those with these bits."""

    divergences: Tensor  # of each row, in the working dtype
    found: tuple[tuple[int, int], ...]
    threshold: float | None


@dataclass(frozen=True, slots=True)
class ArceeFusion(MergeKernel):
    """base + d where importance >= median + 1.5 (third quartile - first), d = model - base.

    Inputs: the base, the model.

    The importance of an element is |d| times the divergence KL(softmax(model) | softmax(base)) of its
    row along the last dimension of `shape`, in the working dtype. The result is float32 whatever
    that is, and rounded once. Quartiles are exact: the elements of rank floor(q (n - 1)); mergekit
    draws a sample of 10^6 of a larger tensor, at random.
    Source: mergekit `arcee_fusion`, whose bits these are where it draws no sample.
    """

    shape: tuple[int, ...]

    @property
    def num_inputs(self) -> int:
        """Two."""
        return 2

    @property
    def _width(self) -> int:
        return max(1, self.shape[-1] if self.shape else 1)

    @property
    def reductions(self) -> int:
        """A histogram of all bits, or of half of them at a time."""
        return 1 if self.compute in (DType.BF16, DType.F16) else 2

    def unit(self, *inputs: TensorType) -> int | None:
        """Whole rows."""
        return max(1, UNIT // self._width) * self._width

    def state_bytes(self, *inputs: TensorType) -> int:
        """The divergence of each row."""
        return 16 * (inputs[0].num_elements // max(1, self.shape[-1] if self.shape else 1))

    @property
    def scratch(self) -> int:
        """Two softmaxes and what comes of them."""
        return 64

    def partial(self, state: object, span: Span, *tiles: Tensor) -> object:
        """(The divergence of each row, counts of the high halves), then counts of the low halves; on the CPU."""
        import torch

        known = cast("_State | None", state)
        if known is not None and known.threshold is not None:
            return None
        work = self.work(*tiles)
        base, model = (tile.cpu().to(work).view(-1, self._width) for tile in tiles)
        size = (model - base).abs_()
        if known is None:
            divergence = _divergence(model, base)
            keys = _keys(size * divergence)
            return divergence.view(-1), torch.bincount(keys >> 16 if _is_f32(work) else keys, minlength=_BINS)
        first = span[0] // self._width
        keys = _keys(size * known.divergences[first : first + base.shape[0]].view(-1, 1))
        return [
            torch.bincount(keys.sub(high << 16).clamp_(-1, _BINS).add_(1), minlength=_BINS + 2)[1:-1]
            for high, _ in known.found
        ]

    def combine(self, state: object, partials: Iterable[object], *inputs: TensorType) -> object:
        """Where the quartiles lie; in the end, the threshold."""
        import torch

        known = cast("_State | None", state)
        n = inputs[0].num_elements
        work = torch_dtype(working_dtype(self.compute, *inputs))
        if not n or (known is not None and known.threshold is not None):
            return known
        if known is None:
            parts = cast("list[tuple[Tensor, Tensor]]", list(partials))
            counts = sum((counts for _, counts in parts[1:]), parts[0][1])
            found = tuple(_located(counts, quarter * (n - 1) // 4) for quarter in (1, 2, 3))
            divergences = torch.cat([divergence for divergence, _ in parts])
            return _State(divergences, found, None if _is_f32(work) else _threshold([bits for bits, _ in found], work))
        spans = cast("list[list[Tensor]]", list(partials))
        bits: list[int] = []
        for i, (high, rank) in enumerate(known.found):
            low, _ = _located(sum((span[i] for span in spans[1:]), spans[0][i]), rank)
            bits.append((high << 16) + low)
        return _State(known.divergences, known.found, _threshold(bits, work))

    def tile(self, state: object, partial: object, span: Span, *tiles: Tensor) -> tuple[Tensor | None, ...]:
        """One tile."""
        import torch

        from surgery.numerics.merge.pieces import delta, load, pieces, store
        from surgery.numerics.merge.vectors import per_row
        from surgery.numerics.scratch import scratch

        work, device = self.work(*tiles), tiles[0].device
        out = torch.empty(tiles[0].numel(), dtype=torch_dtype(self.dtype), device=device)
        if not out.numel():
            return (out,)
        known = cast(_State, state)
        divergences = known.divergences.to(device)
        for piece in pieces(out.numel()):
            base = load(tiles[0][piece], work, "base")
            change = delta(tiles[1][piece], base, "delta")
            importance = torch.abs(change, out=scratch("importance", work, change.numel(), device))
            importance.mul_(per_row(divergences, self._width, span[0] + piece.start, change.numel()))
            change.mul_(importance.ge_(cast(float, known.threshold)))
            wide = scratch("wide", torch.float32, change.numel(), device).copy_(base)
            store(out, piece, wide.add_(load(change, torch.float32, "change")))
        return (out,)


def _is_f32(dtype: torch.dtype) -> bool:
    import torch

    return dtype == torch.float32


def _divergence(model: Tensor, base: Tensor) -> Tensor:
    """KL of each row's softmax, [rows, 1]."""
    import torch

    p, q = (torch.softmax(x, dim=-1) + _EPS for x in (model, base))
    return torch.sum(p * torch.log(p / q), dim=-1, keepdim=True)


def _keys(x: Tensor) -> Tensor:
    """Integers from 0 that grow with the value, i32, flat: i64 where they do not fit."""
    import torch

    flat = x.view(-1).masked_fill(x.view(-1).isnan(), math.nan)  # all NaN alike, and last
    if x.dtype == torch.float32:
        bits = flat.view(torch.int32)
        return (bits ^ (bits >> 31 & 0x7FFFFFFF)).long() + (1 << 31)
    bits = flat.view(torch.int16).int()
    return (bits ^ (bits >> 15 & 0x7FFF)) + (1 << 15)


def _value(key: int, dtype: torch.dtype) -> Tensor:
    """The scalar with this key."""
    import torch

    half, integer = (1 << 31, torch.int32) if dtype == torch.float32 else (1 << 15, torch.int16)
    signed = key - half
    bits = signed if signed >= 0 else signed ^ (half - 1)
    return torch.tensor([bits], dtype=integer).view(dtype)[0]


def _located(counts: Tensor, rank: int) -> tuple[int, int]:
    """The bin in which the element of this rank lies, counted from the smallest, and its rank there."""
    up_to = counts.cumsum(0)
    place = int((up_to <= rank).sum())
    return place, rank - (int(up_to[place - 1]) if place else 0)


def _threshold(keys: Sequence[int], dtype: torch.dtype) -> float:
    first, median, third = (_value(key, dtype) for key in keys)
    return float(median + 1.5 * (third - first))
