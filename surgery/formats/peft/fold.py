"""What every kernel that folds has in common: the weight goes in and comes out, the adapter's tensors are whole."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from surgery.graph import TiledKernel
from surgery.types import DType, TensorType

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["FOLDABLE", "FoldKernel"]

FOLDABLE = (DType.F32, DType.F16, DType.BF16, DType.F64)


@dataclass(frozen=True, slots=True)
class FoldKernel(TiledKernel):
    """A weight of `shape` with an adapter's tensors folded in, in the weight's own dtype."""

    shape: tuple[int, ...]

    def shapes(self) -> tuple[tuple[int, ...], ...]:
        """The shapes of the adapter's tensors, in order of the inputs after the weight."""
        raise NotImplementedError

    def scaled(self, weight: float) -> FoldKernel:
        """The same with the adapter's effect times `weight`. Raises ValueError where that has no meaning."""
        raise NotImplementedError

    def infer(self, *inputs: TensorType) -> tuple[TensorType, ...]:
        """The weight's own type. Raises ValueError if a shape or a dtype does not fit."""
        base, *tensors = inputs
        if base.dtype not in FOLDABLE:
            raise ValueError(f"{base} is not of a dtype that an adapter can be folded into")
        expected = (self.shape, *self.shapes())
        for type_, shape in zip((base, *tensors), expected, strict=True):
            if type_.shape != shape:
                raise ValueError(f"{type_} is not of the shape {list(shape)}")
        return (base,)

    def domain(self, *inputs: TensorType) -> int:
        """The elements of the weight."""
        return inputs[0].num_elements

    def input_steps(self) -> tuple[int | None, ...]:
        """The weight element by element, the adapter's tensors whole."""
        return (1, *(None for _ in self.shapes()))

    def port_steps(self) -> tuple[int | None, ...]:
        """Element by element."""
        return (1,)

    def run(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        """The whole weight as one tile."""
        base, *tensors = inputs
        span = (0, base.numel())
        flat = [base.reshape(-1), *(tensor.reshape(-1) for tensor in tensors)]
        state: object = None
        for _ in range(self.reductions):
            state = self.combine(state, [self.partial(state, span, *flat)])
        (folded,) = self.tile(state, None, span, *flat)
        assert folded is not None
        return (folded.reshape(base.shape),)

    def views(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """The adapter's tensors as f32 matrices on the CPU, which alone computes so that bits depend on no device."""
        return [tensor.cpu().float().view(shape) for tensor, shape in zip(tensors, self.shapes(), strict=True)]
