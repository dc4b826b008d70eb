"""The arithmetic of folding, in bands of rows."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from surgery.formats.peft.bands import BAND_ELEMENTS, band_rows, stored_size
from surgery.formats.peft.delta import Delta
from surgery.graph import Span
from surgery.numerics.scratch import scratch

__all__ = ["Band", "Bands", "add", "decomposed", "joined_norms", "norms", "rescaled", "rotated", "rotation"]


@dataclass(frozen=True, slots=True)
class Band:
    """Part of a tile: elements [start, stop) of the domain, and the difference for them."""

    start: int
    stop: int
    delta: Tensor  # f32 [stop - start], may be overwritten


@dataclass(frozen=True, slots=True)
class Bands:
    """The difference of a weight, to be had for any span; `tensors` are f32."""

    delta: Delta
    transposed: bool
    tensors: Sequence[Tensor]

    def over(self, span: Span) -> Iterator[Band]:
        """The bands that `span` meets, cut to it."""
        start, stop = span
        prepared = self.delta.prepared(self.tensors)
        height, width = stored_size(self.delta, self.transposed)
        size = height * width
        for index in range(start // size, -(-stop // size)):
            first, last = max(0, start - index * size), min(size, stop - index * size)
            for band in self._of_matrix(prepared, index, (first, last)):
                yield Band(band.start + index * size, band.stop + index * size, band.delta)

    def _of_matrix(self, prepared: Sequence[Tensor], index: int, span: Span) -> Iterator[Band]:
        height, width = stored_size(self.delta, self.transposed)
        step = band_rows(height, width)
        start, stop = span
        for row in range(start // width // step * step, -(-stop // width), step):
            begin = min(row, height - step)  # the last band is as high as the others, so that its bits are too
            flat = self._rows(prepared, index, slice(begin, begin + step))
            lo, hi = max(start, row * width), min(stop, (row + step) * width)
            yield Band(lo, hi, flat[lo - begin * width : hi - begin * width])

    def _rows(self, prepared: Sequence[Tensor], index: int, stored: slice) -> Tensor:
        """Whole stored rows, flat."""
        if not self.transposed:
            return self.delta.block(prepared, index, stored, slice(0, self.delta.cols)).view(-1)
        turned = self.delta.block(prepared, index, slice(0, self.delta.rows), stored)
        return turned.t().contiguous().view(-1)


def add(base: Tensor, span: Span, bands: Bands, *, rounds_delta: bool) -> Tensor:
    """base [n] + the difference over `span`, in base's dtype."""
    folded = torch.empty_like(base)
    for band in bands.over(span):
        piece = slice(band.start - span[0], band.stop - span[0])
        delta = band.delta.to(base.dtype).float() if rounds_delta else band.delta
        folded[piece].copy_(widened(base[piece]).add_(delta))
    return folded


def widened(weight: Tensor) -> Tensor:
    """A copy of weight [n] in f32 (f64 where it is) on the CPU, valid until this thread asks again."""
    wide = torch.float64 if weight.dtype == torch.float64 else torch.float32
    return scratch("folded", wide, weight.numel(), torch.device("cpu")).copy_(weight)


def norms(base: Tensor, span: Span, bands: Bands) -> Tensor:
    """Of base + difference: the norm of each row, f32, or if turned the sum of squares of each column, f64."""
    parts: list[Tensor] = []
    for band in bands.over(span):
        sum_IO = _sum(base, span, band).view(-1, stored_size(bands.delta, bands.transposed)[1])
        if bands.transposed:
            parts.append(sum_IO.double().square_().sum(0))
        else:
            parts.append(torch.linalg.vector_norm(sum_IO, dim=1))  # pyright: ignore
    return torch.stack(parts).sum(0) if bands.transposed else torch.cat(parts)


def joined_norms(parts: Iterable[Tensor], transposed: bool) -> Tensor:
    """All norms, f32, of what `norms` gave for the spans."""
    if not transposed:
        return torch.cat(list(parts))
    sums = list(parts)
    return torch.stack(sums).sum(0).sqrt_().float()


def decomposed(base: Tensor, span: Span, bands: Bands, factors: Tensor) -> Tensor:
    """(base + difference) over `span`, each output times its factor, in base's dtype."""
    folded = torch.empty_like(base)
    width = stored_size(bands.delta, bands.transposed)[1]
    for band in bands.over(span):
        piece = slice(band.start - span[0], band.stop - span[0])
        folded[piece].copy_(_sum(base, span, band).mul_(_along(factors, band, width, bands.transposed)))
    return folded


def _sum(base: Tensor, span: Span, band: Band) -> Tensor:
    return widened(base[band.start - span[0] : band.stop - span[0]]).add_(band.delta)


def _along(factors: Tensor, band: Band, width: int, turned: bool) -> Tensor:
    """The factor of each element of `band`: one for each row, or if turned one for each column."""
    first, last = band.start // width, -(-band.stop // width)
    rows = factors.expand(last - first, width) if turned else factors[first:last, None].expand(-1, width)
    return rows.reshape(-1)[band.start - first * width : band.stop - first * width]


def rescaled(weight: Tensor, span: Span, vector: Tensor, inner: int) -> Tensor:
    """weight ⊙ vector over `span`: each factor holds for `inner` elements, and after the last comes the first."""
    folded = torch.empty_like(weight)
    repeated = vector.repeat(2 + BAND_ELEMENTS // inner // vector.numel())
    for start in range(span[0], span[1], BAND_ELEMENTS):
        stop = min(start + BAND_ELEMENTS, span[1])
        first, last = start // inner, -(-stop // inner)
        factors = repeated[first % vector.numel() :][: last - first]
        along = factors[:, None].expand(-1, inner).reshape(-1)[start - first * inner : stop - first * inner]
        piece = slice(start - span[0], stop - span[0])
        folded[piece].copy_(widened(weight[piece]).mul_(along))
    return folded


def rotation(triangles: Tensor, size: int, terms: int) -> Tensor:
    """Orthogonal blocks [n, size, size] of upper triangles [n, size * (size - 1) / 2], both f32."""
    upper = torch.zeros(triangles.shape[0], size, size)
    rows, cols = torch.triu_indices(size, size, 1)
    upper[:, rows, cols] = triangles
    skew = upper - upper.transpose(1, 2)
    identity = torch.eye(size).repeat(triangles.shape[0], 1, 1)
    if not terms:
        return torch.linalg.solve(identity + skew, identity - skew, left=False)  # pyright: ignore
    return _neumann(identity, skew, terms)


def _neumann(series: Tensor, skew: Tensor, terms: int) -> Tensor:
    if terms == 1:
        return series
    series.add_(skew, alpha=2.0)
    if terms == 2:
        return series
    power = torch.bmm(skew, skew)
    series.add_(power, alpha=2.0)
    for _ in range(3, terms - 1):
        power = torch.bmm(power, skew)
        series.add_(power, alpha=2.0)
    return series.add_(torch.bmm(power, skew))


def rotated(weight: Tensor, span: Span, blocks: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Rows of weight [height, width], in blocks, times `blocks` [n, size, size]; n is 1 or as many as fit a row."""
    height, width = shape[0], math.prod(shape[1:])
    num, size = width // blocks.shape[1], blocks.shape[1]
    blocks = blocks.expand(num, size, size)
    step = band_rows(height, width)
    folded = torch.empty_like(weight)
    for row in range(span[0] // width // step * step, -(-span[1] // width), step):
        begin = min(row, height - step)
        lo, hi = max(span[0], row * width), min(span[1], (row + step) * width)
        band = torch.zeros(step * width)  # what lies outside of the tile changes nothing in it
        band[lo - begin * width : hi - begin * width] = weight[lo - span[0] : hi - span[0]]
        turned = torch.bmm(band.view(step, num, size).transpose(0, 1), blocks).transpose(0, 1).reshape(-1)
        folded[lo - span[0] : hi - span[0]].copy_(turned[lo - begin * width : hi - begin * width])
    return folded
