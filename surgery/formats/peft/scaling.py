"""Kernels that multiply, rotate or set parts of a weight: IA3, OFT, trained tokens."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from surgery.formats.peft.fold import FoldKernel
from surgery.graph import Kernel, Span
from surgery.types import DType, TensorType

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["Rescale", "Rotate", "Rotation", "SetRows"]


@dataclass(frozen=True, slots=True)
class Rescale(FoldKernel):
    """weight ⊙ vector along dimension `dim`, in f32, rounded once.

    Source: (IA)³, arXiv 2205.05638; PEFT 0.21, `ia3.Linear.merge`.
    """

    dim: int
    vector: tuple[int, ...]  # the shape it is stored in

    def shapes(self) -> tuple[tuple[int, ...], ...]:
        """The vector."""
        return (self.vector,)

    def scaled(self, weight: float) -> FoldKernel:
        """Has no meaning for a product."""
        raise ValueError("is multiplied by IA3, which has no factor")

    def tile(self, state: object, partial: object, span: Span, *tiles: Tensor) -> tuple[Tensor | None, ...]:
        """One tile."""
        from surgery.formats.peft import arithmetic

        weight, vector = tiles
        inner = math.prod(self.shape[self.dim + 1 :])
        return (arithmetic.rescaled(weight, span, vector.cpu().float(), inner),)


@dataclass(frozen=True, slots=True)
class SetRows(FoldKernel):
    """A matrix with some of its rows replaced.

    Source: PEFT 0.21, `TrainableTokensLayer.merge`.
    """

    rows: tuple[int, ...]

    def shapes(self) -> tuple[tuple[int, ...], ...]:
        """The new rows."""
        return ((len(self.rows), self.shape[1]),)

    def scaled(self, weight: float) -> FoldKernel:
        """Has no meaning for what is replaced."""
        raise ValueError("has rows that the adapter replaces, which has no factor")

    def infer(self, *inputs: TensorType) -> tuple[TensorType, ...]:
        """The weight's own type. Raises ValueError if it lacks one of the rows."""
        if not all(0 <= row < self.shape[0] for row in self.rows):
            raise ValueError(f"{inputs[0]} lacks row {max(self.rows)}")
        return FoldKernel.infer(self, *inputs)

    def tile(self, state: object, partial: object, span: Span, *tiles: Tensor) -> tuple[Tensor | None, ...]:
        """One tile."""
        weight, rows = tiles
        width, folded = self.shape[1], weight.clone()
        for row, values in zip(self.rows, rows.view(-1, width), strict=True):
            lo, hi = max(span[0], row * width), min(span[1], (row + 1) * width)
            if lo < hi:
                folded[lo - span[0] : hi - span[0]].copy_(values[lo - row * width : hi - row * width])
        return (folded,)


@dataclass(frozen=True, slots=True)
class Rotation(Kernel):
    """Orthogonal blocks from the upper triangles of skew-symmetric ones: f32 [num_blocks, size, size].

    With `terms` the Neumann series 1 + 2S + 2S² + … + 2Sⁿ⁻² + Sⁿ⁻¹, without it the Cayley transform.
    Source: arXiv 2506.19847; PEFT 0.21, `OFTRotationModule`.
    """

    size: int
    terms: int  # 0: exact

    def infer(self, *inputs: TensorType) -> tuple[TensorType, ...]:
        """Raises ValueError if a row is no upper triangle."""
        (triangles,) = inputs
        if len(triangles.shape) != 2 or triangles.shape[1] != self.size * (self.size - 1) // 2:
            raise ValueError(f"{triangles} holds no upper triangles of blocks of {self.size}")
        return (TensorType(DType.F32, (triangles.shape[0], self.size, self.size)),)

    def run(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        """The blocks."""
        from surgery.formats.peft import arithmetic

        return (arithmetic.rotation(inputs[0].cpu().float(), self.size, self.terms).to(inputs[0].device),)


@dataclass(frozen=True, slots=True)
class Rotate(FoldKernel):
    """weight @ blockdiag(blocks)ᵀ in f32, rounded once; for an embedding not transposed.

    A tile is whole blocks, so that it holds all that its elements are made of.
    Source: OFT, arXiv 2306.07280; PEFT 0.21, `oft.Linear.merge`.
    """

    size: int
    num_stored: int  # blocks: one for all, or as many as fit a row
    forward: bool = False  # @ blocks, not their transposes

    def shapes(self) -> tuple[tuple[int, ...], ...]:
        """The blocks."""
        return ((self.num_stored, self.size, self.size),)

    def scaled(self, weight: float) -> FoldKernel:
        """Has no meaning for a rotation."""
        raise ValueError("is rotated by OFT, which has no factor")

    @property
    def align(self) -> int:
        """Whole blocks."""
        return self.size

    @property
    def scratch(self) -> int:
        """The rows before and after in f32, padded to a band."""
        return 40

    def tile(self, state: object, partial: object, span: Span, *tiles: Tensor) -> tuple[Tensor | None, ...]:
        """One tile."""
        from surgery.formats.peft import arithmetic

        weight, flat = tiles
        blocks = flat.cpu().view(self.num_stored, self.size, self.size)
        blocks = blocks if self.forward else blocks.transpose(1, 2)
        return (arithmetic.rotated(weight, span, blocks, self.shape),)
