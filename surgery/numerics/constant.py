"""A tensor of one number."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from surgery.graph import Kernel
from surgery.types import DType, TensorType

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["Constant"]


@dataclass(frozen=True, slots=True)
class Constant(Kernel):
    """f32 of this shape, every element `value`."""

    value: float
    shape: tuple[int, ...]

    def infer(self, *inputs: TensorType) -> tuple[TensorType, ...]:
        """One tensor."""
        return (TensorType(DType.F32, self.shape),)

    def run(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        """The tensor, on the CPU."""
        import torch

        return (torch.full(self.shape, self.value),)
