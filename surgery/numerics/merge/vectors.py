"""Scalars of whole vectors: sums for which a tensor is one span, or is cut into spans summed in float64.

Why: the bits of a sum are its order. A tensor of up to WHOLE elements is summed at once, by the calls
that mergekit makes, for its bits; a larger one by its Gram matrix in float64, span by span, from
which the same scalars follow to rounding. Both on the CPU, whose order does not depend on a device.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from typing import cast

import torch
from torch import Tensor

from surgery.numerics.merge.pieces import pieces

__all__ = ["added", "each", "euclidean", "filled", "gram", "norms", "per_column", "per_row"]


def filled(num_elements: int, dtype: torch.dtype, values: Callable[[slice], Tensor]) -> Tensor:
    """A whole vector on the CPU from `values`, piece by piece."""
    out = torch.empty(num_elements, dtype=dtype)
    for piece in pieces(num_elements):
        out[piece].copy_(values(piece))
    return out


def gram(vectors: Sequence[Tensor]) -> Tensor:
    """The dot product of each pair, f64 [n, n]."""
    n = len(vectors)
    products = torch.zeros(n, n, dtype=torch.float64)
    for piece in pieces(vectors[0].numel()):
        wide = [x[piece].double() for x in vectors]
        for i in range(n):
            for j in range(i + 1):
                products[i, j] += (wide[i] * wide[j]).sum()
    return products.tril() + products.tril(-1).t()


def added(grams: Iterable[Tensor]) -> Tensor:
    """The Gram matrix of vectors cut into spans, each element exactly added and rounded once."""
    spans = list(grams)
    flat = zip(*(cast(list[float], span.view(-1).tolist()) for span in spans), strict=True)  # pyright: ignore
    return torch.tensor([math.fsum(values) for values in flat], dtype=torch.float64).view_as(spans[0])


def norms(x: Tensor) -> Tensor:
    """Of vectors along the last dimension, kept, in their own dtype: as `torch.norm` takes it."""
    return cast(Tensor, torch.norm(x, dim=-1, keepdim=True))  # pyright: ignore[reportUnknownMemberType]


def euclidean(x: Tensor, dim: int | None = None, keepdim: bool = False) -> Tensor:
    """As `torch.linalg.vector_norm` takes it."""
    return cast(Tensor, torch.linalg.vector_norm(x, dim=dim, keepdim=keepdim))  # pyright: ignore


def each(x: Tensor) -> list[Tensor]:
    """Its elements, [1] each: a tensor to multiply with keeps its dtype's rounding, and needs no copy to the host."""
    flat = x.reshape(-1)
    return [flat[i : i + 1] for i in range(flat.numel())]


def per_row(values: Tensor, width: int, start: int, num_elements: int) -> Tensor:
    """values[row] of each element from `start` on, in rows of `width`."""
    first, last = start // width, -(-(start + num_elements) // width)
    spread = values[first:last].view(-1, 1).expand(-1, width).reshape(-1)
    return spread[start - first * width :][:num_elements]


def per_column(values: Tensor, start: int, num_elements: int) -> Tensor:
    """values[column] of each element from `start` on, in rows as long as `values`."""
    offset = start % values.numel()
    return values.repeat(-(-(offset + num_elements) // values.numel()))[offset:][:num_elements]
