"""What all merge kernels share: types in and out, the working dtype, and the reference `run`."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from surgery.graph import ERROR_UNIT, Span, TiledKernel
from surgery.numerics.dtypes import dtype_of, torch_dtype
from surgery.types import DType, TensorType

if TYPE_CHECKING:
    import torch
    from torch import Tensor

__all__ = ["BLOCK", "UNIT", "WHOLE", "MergeKernel", "is_whole", "unit_of_sums", "working_dtype"]

BLOCK = ERROR_UNIT  # elements: every main span starts at a multiple of it
UNIT = 1 << 20  # elements of a span whose sums are added up in float64
WHOLE = 12 << 20  # elements: up to here a tensor is summed at once, as mergekit does, for the same bits

_MERGED_DTYPES = (DType.BF16, DType.F16, DType.F32)


def working_dtype(compute: DType | None, *inputs: TensorType) -> DType:
    """The dtype of the arithmetic: `compute`, or what torch promotes the inputs' dtypes to."""
    dtypes = {type_.dtype for type_ in inputs}
    return compute or (dtypes.pop() if len(dtypes) == 1 else DType.F32)


def is_whole(*inputs: TensorType) -> bool:
    """Whether a tensor is small enough that its sums are taken in one span."""
    return inputs[0].num_elements <= WHOLE


def unit_of_sums(*inputs: TensorType) -> int:
    """Elements of one span where bits depend on the order of a sum."""
    return max(1, inputs[0].num_elements) if is_whole(*inputs) else UNIT


@dataclass(frozen=True, slots=True)
class MergeKernel(TiledKernel):
    """Tensors of one shape, f32|f16|bf16 → one of that shape in `dtype`.

    Inputs are cast to the working dtype first: `compute`, or, where that is None, what their dtypes
    promote to (mergekit's rule). The result is in the working dtype and is rounded to `dtype` last.
    """

    compute: DType | None
    dtype: DType

    @property
    @abstractmethod
    def num_inputs(self) -> int:
        """How many tensors are merged, a base among them."""

    def infer(self, *inputs: TensorType) -> tuple[TensorType, ...]:
        """Raises ValueError if the inputs differ in shape, or are not of a dtype that can be merged."""
        if len(inputs) != self.num_inputs:
            raise ValueError(f"{len(inputs)} tensors where {self.num_inputs} are merged")
        first = inputs[0]
        for type_ in inputs:
            if type_.shape != first.shape:
                raise ValueError(f"{type_} cannot be merged with {first}: the shapes differ")
            if type_.dtype not in _MERGED_DTYPES:
                raise ValueError(f"{type_} cannot be merged: only f32, f16 and bf16 can")
        return (TensorType(self.dtype, first.shape),)

    def domain(self, *inputs: TensorType) -> int:
        """The elements."""
        return inputs[0].num_elements

    def input_steps(self) -> tuple[int | None, ...]:
        """Element by element."""
        return (1,) * self.num_inputs

    def port_steps(self) -> tuple[int | None, ...]:
        """Element by element."""
        return (1,)

    def rounds(self, *inputs: TensorType) -> bool:
        """A merge is no approximation of its first input."""
        del inputs
        return False

    def work(self, *tiles: Tensor) -> torch.dtype:
        """The working dtype of tiles in their own dtypes."""
        types = [TensorType(dtype_of(tile.dtype), ()) for tile in tiles]
        return torch_dtype(working_dtype(self.compute, *types))

    def run(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        """The reference: every reduction, then one tile, over whole tensors."""
        types = [TensorType(dtype_of(x.dtype), tuple(x.shape)) for x in inputs]
        flat = [x.reshape(-1) for x in inputs]
        num_elements = self.domain(*types)
        state: object = None
        for _ in range(self.reductions):
            spans = _spans(num_elements, self.unit(*types))
            partials = [self.partial(state, (a, b), *(x[a:b] for x in flat)) for a, b in spans]
            state = self.combine(state, partials, *types)
        (merged,) = self.tile(state, None, (0, num_elements), *flat)
        assert merged is not None
        return (merged.reshape(inputs[0].shape),)


def _spans(num_elements: int, unit: int | None) -> Iterator[Span]:
    step = unit or max(1, num_elements)
    for start in range(0, num_elements, step):
        yield start, min(start + step, num_elements)
