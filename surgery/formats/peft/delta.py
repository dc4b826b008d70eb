"""What an adapter adds to a weight, as a formula that gives any rows or columns of it.

Why a formula: the difference is as large as the weight itself, but it is made of small factors, so that
a tile of it costs no more memory than the tile.

Shapes in names: O, I rows and columns of the product as PEFT computes it ([out, in]), R rank.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["AdaLora", "Delta", "Hadamard", "Kronecker", "LowRank", "Shards", "Vera"]


@dataclass(frozen=True, slots=True)
class Delta(ABC):
    """A matrix f32 [rows, cols], of which there are `count`, one for each expert of a fused weight."""

    rows: int
    cols: int

    @property
    def count(self) -> int:
        """How many matrices the weight holds."""
        return 1

    @abstractmethod
    def shapes(self) -> tuple[tuple[int, ...], ...]:
        """The shapes of the tensors it is made from."""

    @abstractmethod
    def scaled(self, weight: float) -> Delta:
        """The same times `weight`."""

    def prepared(self, tensors: Sequence[Tensor]) -> Sequence[Tensor]:
        """What all blocks share, from f32 tensors of `shapes`."""
        return tensors

    @property
    def prepared_elements(self) -> int:
        """Elements of what `prepared` computes anew."""
        return 0

    @abstractmethod
    def block(self, tensors: Sequence[Tensor], index: int, rows: slice, cols: slice) -> Tensor:
        """f32 [rows, cols] of matrix `index`, which the caller may overwrite; valid until this thread asks again."""


@dataclass(frozen=True, slots=True)
class LowRank(Delta):
    """LoRA: (b @ a) * scaling, of a [R, I] and b [O, R]; of a convolution, I goes over the kernel's places too.

    Source: arXiv 2106.09685; the order of operations is that of PEFT 0.21, `Linear.get_delta_weight`.
    """

    rank: int
    scaling: float
    window: tuple[int, ...] = ()  # a convolution's kernel

    def shapes(self) -> tuple[tuple[int, ...], ...]:
        """a, b."""
        channels = self.cols // math.prod(self.window)
        return (self.rank, channels, *self.window), (self.rows, self.rank, *(1 for _ in self.window))

    def prepared(self, tensors: Sequence[Tensor]) -> Sequence[Tensor]:
        """As matrices."""
        a, b = tensors
        return a.view(self.rank, self.cols), b.view(self.rows, self.rank)

    def scaled(self, weight: float) -> Delta:
        """As PEFT's `set_scale`."""
        return replace(self, scaling=weight * self.scaling)

    def block(self, tensors: Sequence[Tensor], index: int, rows: slice, cols: slice) -> Tensor:
        """The product of a few rows and columns."""
        from surgery.formats.peft.products import product

        a_RI, b_OR = tensors
        return product("delta", b_OR[rows], a_RI[:, cols]).mul_(self.scaling)


@dataclass(frozen=True, slots=True)
class Vera(Delta):
    """VeRA: (λb ⊙ B) @ (λd ⊙ A), of projections shared by all modules and cut to this one.

    Source: arXiv 2310.11454; PEFT 0.21, `vera.Linear.get_delta_weight`.
    """

    rank: int
    widest: int  # columns of the shared A
    tallest: int  # rows of the shared B
    factor: float = 1.0

    def shapes(self) -> tuple[tuple[int, ...], ...]:
        """λb, λd, A, B."""
        return (self.rows,), (self.rank,), (self.rank, self.widest), (self.tallest, self.rank)

    def scaled(self, weight: float) -> Delta:
        """Times `weight`."""
        return replace(self, factor=weight * self.factor)

    def prepared(self, tensors: Sequence[Tensor]) -> Sequence[Tensor]:
        """The two factors."""
        lambda_b, lambda_d, a_RI, b_OR = tensors
        return lambda_d[:, None] * a_RI[:, : self.cols], lambda_b[:, None] * b_OR[: self.rows]

    @property
    def prepared_elements(self) -> int:
        """The two factors."""
        return self.rank * (self.rows + self.cols)

    def block(self, tensors: Sequence[Tensor], index: int, rows: slice, cols: slice) -> Tensor:
        """The product of a few rows and columns."""
        from surgery.formats.peft.products import product

        a_RI, b_OR = tensors
        return product("delta", b_OR[rows], a_RI[:, cols]).mul_(self.factor)


@dataclass(frozen=True, slots=True)
class AdaLora(Delta):
    """AdaLoRA: b @ (a ⊙ e) * alpha / (num_ranks + 1e-5).

    Source: arXiv 2303.10512; PEFT 0.21, `SVDLinear.get_delta_weight`.
    """

    rank: int
    alpha: float
    num_ranks: float  # the rank that training began with

    def shapes(self) -> tuple[tuple[int, ...], ...]:
        """a, b, e."""
        return (self.rank, self.cols), (self.rows, self.rank), (self.rank, 1)

    def scaled(self, weight: float) -> Delta:
        """alpha times `weight`."""
        return replace(self, alpha=weight * self.alpha)

    def prepared(self, tensors: Sequence[Tensor]) -> Sequence[Tensor]:
        """a ⊙ e, b, and what the product is divided by."""
        a_RI, b_OR, e_R1 = tensors
        return a_RI * e_R1, b_OR, a_RI.new_full((1,), self.num_ranks) + 1e-5

    @property
    def prepared_elements(self) -> int:
        """a ⊙ e."""
        return self.rank * self.cols

    def block(self, tensors: Sequence[Tensor], index: int, rows: slice, cols: slice) -> Tensor:
        """The product of a few rows and columns."""
        from surgery.formats.peft.products import product

        a_RI, b_OR, divisor = tensors
        return product("delta", b_OR[rows], a_RI[:, cols]).mul_(self.alpha).div_(divisor)


@dataclass(frozen=True, slots=True)
class Hadamard(Delta):
    """LoHa: ((w1_a @ w1_b) ⊙ (w2_a @ w2_b)) * scaling.

    Source: arXiv 2108.06098; PEFT 0.21, `LoHaLayer.get_delta_weight`.
    """

    rank: int
    scaling: float

    def shapes(self) -> tuple[tuple[int, ...], ...]:
        """w1_a, w1_b, w2_a, w2_b."""
        return ((self.rows, self.rank), (self.rank, self.cols)) * 2

    def scaled(self, weight: float) -> Delta:
        """The scaling times `weight`."""
        return replace(self, scaling=weight * self.scaling)

    def block(self, tensors: Sequence[Tensor], index: int, rows: slice, cols: slice) -> Tensor:
        """The products of a few rows and columns."""
        from surgery.formats.peft.products import product

        w1_a, w1_b, w2_a, w2_b = tensors
        other = product("other", w2_a[rows], w2_b[:, cols])
        return product("delta", w1_a[rows], w1_b[:, cols]).mul_(other).mul_(self.scaling)


@dataclass(frozen=True, slots=True)
class Kronecker(Delta):
    """LoKr: kron(w1, w2) * scaling, each of both whole, or the product of two factors.

    Source: arXiv 2309.14859; PEFT 0.21, `LoKrLayer.get_delta_weight`.
    """

    first: tuple[tuple[int, int], ...]  # shapes of w1, or of its two factors
    second: tuple[tuple[int, int], ...]
    scaling: float

    def shapes(self) -> tuple[tuple[int, ...], ...]:
        """w1 or its factors, then w2 or its factors."""
        return (*self.first, *self.second)

    def scaled(self, weight: float) -> Delta:
        """The scaling times `weight`."""
        return replace(self, scaling=weight * self.scaling)

    def prepared(self, tensors: Sequence[Tensor]) -> Sequence[Tensor]:
        """w1 and w2."""
        first, second = tensors[: len(self.first)], tensors[len(self.first) :]
        return tuple(factors[0] if len(factors) == 1 else factors[0] @ factors[1] for factors in (first, second))

    @property
    def prepared_elements(self) -> int:
        """w1 and w2."""
        return sum(factors[0][0] * factors[-1][1] for factors in (self.first, self.second))

    def block(self, tensors: Sequence[Tensor], index: int, rows: slice, cols: slice) -> Tensor:
        """A few rows: of each, one row of w1 times one of w2."""
        import torch

        w1, w2 = tensors
        row = torch.arange(rows.start, rows.stop)
        left, right = w1[row // w2.shape[0]], w2[row % w2.shape[0]]
        whole = (left[:, :, None] * right[:, None, :]).view(len(row), -1)
        return whole[:, cols].mul_(self.scaling)


@dataclass(frozen=True, slots=True)
class Shards(Delta):
    """MiSS: a block [R, out] repeated along the inputs; `mini` outputs repeated too.

    Source: arXiv 2409.15371; PEFT 0.21, `MissLayer.get_delta_weight_miss`.
    """

    rank: int
    mini: int  # outputs that the block holds
    factor: float = 1.0

    def shapes(self) -> tuple[tuple[int, ...], ...]:
        """The block."""
        return ((self.rank, self.mini),)

    def scaled(self, weight: float) -> Delta:
        """Times `weight`."""
        return replace(self, factor=weight * self.factor)

    def block(self, tensors: Sequence[Tensor], index: int, rows: slice, cols: slice) -> Tensor:
        """A few rows and columns, looked up."""
        import torch

        (block_RO,) = tensors
        row, col = torch.arange(rows.start, rows.stop), torch.arange(cols.start, cols.stop)
        return block_RO.t()[row % self.mini][:, col % self.rank].mul_(self.factor)
