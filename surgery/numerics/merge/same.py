"""Tensors that are not numbers to be averaged: the models must agree on them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from surgery.graph import BadValue, Span, TiledKernel
from surgery.types import TensorType

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["Same"]


@dataclass(frozen=True, slots=True)
class Same(TiledKernel):
    """`num_inputs` tensors of one type, of any dtype that torch has → the first, if all are equal byte for byte."""

    num_inputs: int

    def infer(self, *inputs: TensorType) -> tuple[TensorType, ...]:
        """Raises ValueError if the types differ."""
        for type_ in inputs[1:]:
            if type_ != inputs[0]:
                raise ValueError(f"{type_} is not the {inputs[0]} of the other model")
        return (inputs[0],)

    def domain(self, *inputs: TensorType) -> int:
        """The elements."""
        return inputs[0].num_elements

    def input_steps(self) -> tuple[int | None, ...]:
        """Element by element."""
        return (1,) * self.num_inputs

    def port_steps(self) -> tuple[int | None, ...]:
        """Element by element."""
        return (1,)

    def tile(self, state: object, partial: object, span: Span, *tiles: Tensor) -> tuple[Tensor | None, ...]:
        """A copy of the first tile. Raises BadValue at the first element that differs."""
        import torch

        first = tiles[0].contiguous().view(torch.uint8)
        for tile in tiles[1:]:
            other = tile.contiguous().view(torch.uint8)
            if not torch.equal(first, other):
                index = int((first != other).nonzero()[0]) // tile.element_size()
                raise BadValue(index, "differs between the models")
        return (tiles[0].clone(),)

    def run(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        """Whole tensors."""
        (same,) = self.tile(None, None, (0, inputs[0].numel()), *(x.reshape(-1) for x in inputs))
        assert same is not None
        return (same.reshape(inputs[0].shape),)
