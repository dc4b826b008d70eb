"""Rows that a smaller vocabulary lacks, taken from a larger one."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from surgery.graph import Span, TiledKernel
from surgery.types import TensorType

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["PadRows"]


@dataclass(frozen=True, slots=True)
class PadRows(TiledKernel):
    """[n, ...] and a larger [m, ...] of the same dtype → the first with the last m - n rows of the second."""

    def infer(self, *inputs: TensorType) -> tuple[TensorType, ...]:
        """The larger type. Raises ValueError if they differ in more than rows."""
        small, large = inputs
        if small.dtype is not large.dtype or small.shape[1:] != large.shape[1:]:
            raise ValueError(f"{small} cannot be padded with rows of {large}")
        return (large,)

    def domain(self, *inputs: TensorType) -> int:
        """The elements of the larger one."""
        return inputs[1].num_elements

    def input_steps(self) -> tuple[int | None, ...]:
        """Element by element; the smaller one ends early."""
        return (1, 1)

    def port_steps(self) -> tuple[int | None, ...]:
        """Element by element."""
        return (1,)

    def tile(self, state: object, partial: object, span: Span, *tiles: Tensor) -> tuple[Tensor | None, ...]:
        """One tile."""
        import torch

        small, large = tiles
        return (torch.cat([small, large[small.numel() :]]),)

    def run(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        """The whole tensor."""
        import torch

        small, large = inputs
        return (torch.cat([small, large[small.shape[0] :]]),)
