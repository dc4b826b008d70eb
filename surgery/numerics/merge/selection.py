"""The k largest magnitudes of a tensor that is seen in tiles only, exactly, in bounded memory.

Why histograms: the bit pattern of a non-negative float grows with the float, so that the k-th
largest value is found from counts of patterns: of all bits where a value has 16, of the high and
then of the low half where it has 32. Which of several equal values belong to the k is settled by
the lowest index: one more pass counts them in each block, so that the main pass, which meets the
blocks in any order, knows in which block the last one lies and how many that block still keeps.
Counts are integers: nothing depends on how the tensor was cut. A tensor of less than one block is
seen at once, and its values are looked at directly: tables of counts would cost more than they save.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from typing import cast

import torch
from torch import Tensor

from surgery.graph import Span
from surgery.numerics.merge.kernel import BLOCK
from surgery.numerics.merge.pieces import pieces
from surgery.numerics.scratch import scratch

__all__ = ["Cut", "Keeper", "Magnitudes", "Selection", "Target", "advance", "count"]

_NAN = "holds, or another model's tensor does, a NaN: magnitudes cannot be ranked"
_HIGH_BINS = 1 << 15  # patterns of the high half, or of all bits but the sign of a 16-bit float
_LOW_BINS = 1 << 16
_CHUNK = 1 << 19  # elements counted at once: a table of counts costs as much as this many of them

Magnitudes = Callable[[int, slice], Tensor]
"""Of one source, over a slice of the tile: |x| in the working dtype, flat, in scratch."""

Target = tuple[int, int]
"""A source, and how many of its largest magnitudes are wanted: at least 1, at most all."""


@dataclass(frozen=True, slots=True)
class Cut:
    """The k largest: all magnitudes above `threshold`, and of the equal ones those before a place.

    All in the blocks before `block`, and the first `remaining` in it. Zeros are never kept.
    """

    threshold: float
    block: int
    remaining: int


@dataclass(frozen=True, slots=True)
class _Found:
    """Of one target: the bits of the k-th largest found so far, and its rank among all with these bits."""

    bits: int
    rank: int


@dataclass(frozen=True, slots=True)
class Selection:
    """What the passes so far have found: how many nonzeros each source has, and where each target's cut is."""

    dtype: torch.dtype
    targets: tuple[Target, ...]
    found: tuple[_Found, ...]
    passes: int
    cuts: tuple[Cut, ...] = ()

    @property
    def is_done(self) -> bool:
        """Whether `cuts` are known."""
        return len(self.cuts) == len(self.targets)


@dataclass(frozen=True, slots=True)
class _Small:
    """All magnitudes, f32 [n], of each source of a tensor that is less than one block."""

    values: list[Tensor]


def count(selection: Selection | None, span: Span, sources: Sequence[int], magnitudes: Magnitudes) -> object:
    """What one span adds to the next state; `sources` are those with targets."""
    num_elements = span[1] - span[0]
    if selection is None and span[0] == 0 and num_elements < BLOCK:  # no other span begins at 0
        return _Small([_values(num_elements, source, magnitudes) for source in sources])
    if selection is None:
        return [_count_high(num_elements, source, magnitudes) for source in sources]
    if selection.is_done:
        return None
    pairs = zip(selection.targets, selection.found, strict=True)
    if _needs_low(selection):
        return [_count_low(num_elements, source, found.bits, magnitudes) for (source, _), found in pairs]
    return [_count_equal(num_elements, source, _value(selection, found), magnitudes) for (source, _), found in pairs]


def advance(
    selection: Selection | None, partials: Iterable[object], dtype: torch.dtype, sources: Sequence[int],
    targets_of: Callable[[Mapping[int, int]], Sequence[Target]],
) -> Selection:  # fmt: skip
    """The state after one more pass; after the first, `targets_of` is given how many nonzeros each source has."""
    if selection is None:
        iterator = iter(partials)
        first = next(iterator)
        if isinstance(first, _Small):
            return _after_all(dict(zip(sources, first.values, strict=True)), dtype, targets_of)
        partials = chain([first], iterator)  # added up one by one: together they are larger than the tensor
        return _after_high(dict(zip(sources, _added(partials), strict=True)), dtype, targets_of)
    if selection.is_done:
        return replace(selection, passes=selection.passes + 1)
    if _needs_low(selection):
        found = tuple(
            _located(counts, found.rank, found.bits << 16)
            for counts, found in zip(_added(partials), selection.found, strict=True)
        )
        return Selection(dtype, selection.targets, found, 2)
    spans = [cast(list[Tensor], partial) for partial in partials]
    counts = [torch.cat(blocks) for blocks in zip(*spans, strict=True)]
    cuts = tuple(
        _cut(_value(selection, found), found.rank, c) for found, c in zip(selection.found, counts, strict=True)
    )
    return Selection(dtype, selection.targets, selection.found, selection.passes + 1, cuts)


class Keeper:
    """Applies a cut to the pieces of one tile, in order; the tile starts at a multiple of BLOCK."""

    def __init__(self, cut: Cut, dtype: torch.dtype) -> None:
        self._cut = cut
        self._below = _next_below(cut.threshold, dtype)
        self._remaining = cut.remaining

    def __call__(self, x: Tensor, start: int) -> Tensor:
        """Zeroes in place what is not of the k largest; `start` is the piece's first element in the tensor."""
        block = start // BLOCK
        if block != self._cut.block:
            shrink = self._below if block < self._cut.block else self._cut.threshold
            return torch.ops.aten.hardshrink.out(x, shrink, out=x)
        equal = (x.abs() == self._cut.threshold).nonzero().view(-1)
        torch.ops.aten.hardshrink.out(x, self._below, out=x)
        x[equal[self._remaining :]] = 0
        self._remaining = max(0, self._remaining - equal.numel())
        return x


def _needs_low(selection: Selection) -> bool:
    return selection.dtype == torch.float32 and selection.passes == 1


def _count_high(num_elements: int, source: int, magnitudes: Magnitudes) -> Tensor:
    """Counts, i64 [_HIGH_BINS + 1], of the high 15 bits under the sign; the last one: of nonzeros."""
    counts = torch.zeros(_HIGH_BINS + 1, dtype=torch.int64)
    for chunk in _chunks(num_elements):
        nonzeros: list[Tensor] = []
        highs: list[Tensor] = []
        for piece in chunk:
            x = magnitudes(source, piece)
            nonzeros.append(
                torch.gt(x, 0, out=scratch("nonzero", x.dtype, x.numel(), x.device)).sum(dtype=torch.float32)
            )
            highs.append(_high(x))
        counts[:-1] += torch.bincount(torch.cat(highs), minlength=_HIGH_BINS).cpu()
        counts[-1] += int(torch.stack(nonzeros).sum(dtype=torch.float64))
    return counts


def _high(x: Tensor) -> Tensor:
    """The high halves, i16, of f32 magnitudes, which are overwritten; all bits of 16-bit ones."""
    if x.dtype != torch.float32:
        return x.view(torch.int16).clone()
    return x.view(torch.int32).bitwise_right_shift_(16).to(torch.int16)


def _count_low(num_elements: int, source: int, high: int, magnitudes: Magnitudes) -> Tensor:
    """Counts, i64 [_LOW_BINS], of the low 16 bits of the f32 magnitudes whose high bits are `high`.

    All others are counted too, in a bin before and one after: cheaper than to leave them out.
    """
    counts = torch.zeros(_LOW_BINS + 2, dtype=torch.int64)
    for chunk in _chunks(num_elements):
        lows = [_low(magnitudes(source, piece), high).clone() for piece in chunk]
        counts += torch.bincount(torch.cat(lows), minlength=_LOW_BINS + 2).cpu()
    return counts[1:-1]


def _low(x: Tensor, high: int) -> Tensor:
    bits = x.view(torch.int32)
    return bits.sub_((high << 16) - 1).clamp_(0, _LOW_BINS + 1)


def _chunks(num_elements: int) -> Iterator[list[slice]]:
    """The pieces of each chunk."""
    for start in range(0, num_elements, _CHUNK):
        within = pieces(min(_CHUNK, num_elements - start))
        yield [slice(start + piece.start, start + piece.stop) for piece in within]


def _count_equal(num_elements: int, source: int, value: float, magnitudes: Magnitudes) -> Tensor:
    """How many magnitudes are `value`, f32 [blocks]."""
    counts: list[Tensor] = []
    for piece in pieces(num_elements):
        equal = magnitudes(source, piece).eq_(value).sum(dtype=torch.float32)
        if piece.start % BLOCK:
            counts[-1] += equal
        else:
            counts.append(equal)
    return torch.stack(counts).cpu()


def _added(partials: Iterable[object]) -> Iterator[Tensor]:
    """For each source or target, its counts over all spans, i64."""
    sums: list[Tensor] = []
    for partial in partials:
        added = cast(list[Tensor], partial)
        if not sums:
            sums = [torch.zeros_like(counts) for counts in added]
        for into, counts in zip(sums, added, strict=True):
            into += counts
    yield from sums


def _after_high(
    counts: Mapping[int, Tensor], dtype: torch.dtype, targets_of: Callable[[Mapping[int, int]], Sequence[Target]]
) -> Selection:
    infinity = 0x7C00 if dtype == torch.float16 else 0x7F80  # patterns above it are NaN
    if any(bool(c[infinity + 1 : -1].any()) for c in counts.values()):
        raise ValueError(_NAN)
    nonzeros = {source: int(c[-1]) for source, c in counts.items()}
    targets = tuple(targets_of(nonzeros))
    found = tuple(_located(counts[source][:-1], k, 0) for source, k in targets)
    return Selection(dtype, targets, found, 1)


def _values(num_elements: int, source: int, magnitudes: Magnitudes) -> Tensor:
    values = [magnitudes(source, piece).to(torch.float32, copy=True) for piece in pieces(num_elements)]
    return torch.cat(values)


def _after_all(
    values: Mapping[int, Tensor], dtype: torch.dtype, targets_of: Callable[[Mapping[int, int]], Sequence[Target]]
) -> Selection:
    if any(bool(x.isnan().any()) for x in values.values()):
        raise ValueError(_NAN)
    targets = tuple(targets_of({source: int(x.count_nonzero()) for source, x in values.items()}))
    cuts = tuple(_cut_of(values[source], k) for source, k in targets)
    return Selection(dtype, targets, (), 1, cuts)


def _cut_of(x: Tensor, k: int) -> Cut:
    """The cut of the k largest of `x`, all of one block."""
    value = float(x.kthvalue(x.numel() - k + 1).values)
    if value == 0:
        return Cut(0.0, -1, 0)
    rank = k - int((x > value).sum())
    return Cut(value, 1, 0) if rank == int((x == value).sum()) else Cut(value, 0, rank)


def _located(counts: Tensor, rank: int, bits: int) -> _Found:
    """In which bin the `rank`-th largest lies: its pattern added to `bits`, and the rank within it."""
    from_top = counts.flip(0).cumsum(0)
    place = int((from_top < rank).sum())
    above = int(from_top[place - 1]) if place else 0
    return _Found(bits + counts.numel() - 1 - place, rank - above)


def _cut(value: float, rank: int, equal: Tensor) -> Cut:
    """Where the `rank`-th of the equal ones lies, from their number in each block."""
    if value == 0:
        return Cut(0.0, -1, 0)
    up_to = equal.to(torch.int64).cumsum(0)
    block = int((up_to < rank).sum())
    before = int(up_to[block - 1]) if block else 0
    if int(up_to[block]) == rank:  # a block that keeps all need not be counted again
        return Cut(value, block + 1, 0)
    return Cut(value, block, rank - before)


def _value(selection: Selection, found: _Found) -> float:
    """The k-th largest magnitude of a target whose bits are known."""
    return _float_of(found.bits, selection.dtype)


def _float_of(bits: int, dtype: torch.dtype) -> float:
    integer = torch.int32 if dtype == torch.float32 else torch.int16
    return float(torch.tensor([bits], dtype=integer).view(dtype))


def _next_below(value: float, dtype: torch.dtype) -> float:
    """The largest float of `dtype` below `value`; 0 for 0."""
    integer = torch.int32 if dtype == torch.float32 else torch.int16
    bits = int(torch.tensor([value], dtype=dtype).view(integer))
    return _float_of(max(0, bits - 1), dtype)
