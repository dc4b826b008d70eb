"""Quantization to 4 bits as a kernel of the graph.

Two passes where the quantization is double: the mean of all block maxima is a reduction over
tiles; given it, every block is independent of the others, whatever its tensor's size.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, cast

from surgery.formats.bitsandbytes.record import NESTED_BLOCK_SIZE, QuantRecord
from surgery.graph import BadValue, Span, TiledKernel
from surgery.numerics.dtypes import torch_dtype
from surgery.types import DType, TensorType

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["Quantize4bit"]

ANY_WEIGHT = TensorType(DType.BF16, (1, 1))
SOURCE_DTYPES = (DType.F32, DType.F16, DType.BF16)


@lru_cache(1000)  # millions of weights have few types
def _port_types(record: QuantRecord) -> tuple[TensorType, ...]:
    return tuple(record.port_types().values())


@dataclass(frozen=True, slots=True)
class Quantize4bit(TiledKernel):
    """f32|f16|bf16 [out, in] → the ports of `QuantRecord.port_types`, in that order."""

    quant_type: str
    block_size: int
    double_quant: bool

    @property
    def label(self) -> str:
        """`nf4` or `fp4`."""
        return self.quant_type

    def record(self, weight: TensorType) -> QuantRecord:
        """What the quant_state will say of `weight`."""
        return QuantRecord(self.quant_type, self.block_size, weight, self.double_quant)

    def infer(self, *inputs: TensorType) -> tuple[TensorType, ...]:
        """Raises ValueError if the weight is not a non-empty float matrix that bitsandbytes can quantize."""
        (weight,) = inputs
        if len(weight.shape) != 2 or weight.num_elements == 0:
            raise ValueError(f"{weight} is not a matrix")
        if weight.dtype not in SOURCE_DTYPES:
            raise ValueError(f"{weight} cannot be quantized: bitsandbytes takes f32, f16 and bf16 only")
        return _port_types(self.record(weight))

    @property
    def suffixes(self) -> tuple[str, ...]:
        """Of the ports, after `P.weight`."""
        return self.record(ANY_WEIGHT).suffixes

    def domain(self, *inputs: TensorType) -> int:
        """The elements of the weight."""
        return inputs[0].num_elements

    def input_steps(self) -> tuple[int | None, ...]:
        """The weight, element by element."""
        return (1,)

    def port_steps(self) -> tuple[int | None, ...]:
        """Two elements a byte, a block an absmax, 256 blocks a nested absmax; maps and record are whole."""
        nested = (self.block_size * NESTED_BLOCK_SIZE, None) if self.double_quant else ()
        return (2, self.block_size, *nested, None, None)

    @property
    def align(self) -> int:
        """Whole blocks; with double quantization, whole blocks of absmax."""
        return self.block_size * (NESTED_BLOCK_SIZE if self.double_quant else 1)

    @property
    def reductions(self) -> int:
        """Double quantization subtracts the mean of all absmax."""
        return int(self.double_quant)

    def partial(self, state: object, span: Span, *tiles: Tensor) -> Tensor:
        """The absmax of each block, f32. Raises BadValue with the index of a NaN or Inf."""
        from surgery.numerics import fourbit

        absmax = fourbit.block_absmax(tiles[0], self.block_size)
        if not bool(absmax.isfinite().all()):
            raise BadValue(
                cast(int, fourbit.first_non_finite(tiles[0])), "is NaN or Inf, which no 4-bit block can hold"
            )
        return absmax

    def combine(self, state: object, partials: Iterable[object], *inputs: TensorType) -> object:
        """The mean of all absmax, an f32 scalar with the bits of torch on one thread."""
        from surgery.numerics.mean import StreamedMean

        mean = StreamedMean(self.record(inputs[0]).num_blocks())
        for absmax in partials:
            mean.add(cast("Tensor", absmax))
        return mean.result()

    def tile(self, state: object, partial: object, span: Span, *tiles: Tensor) -> tuple[Tensor | None, ...]:
        """Packed codes, absmax and nested absmax of one tile."""
        from surgery.numerics import fourbit

        (weight,) = tiles
        absmax = self.partial(None, span, weight) if partial is None else cast("Tensor", partial)
        packed = fourbit.encode(weight, absmax, self.block_size, self.quant_type)
        if not self.double_quant:
            return (packed, absmax, None, None)
        codes, nested = fourbit.nested_encode(absmax.cpu(), cast("Tensor", state))
        return (packed, codes, nested, None, None, None)

    @property
    def keeps_value(self) -> bool:
        """4 bits stand for the weight."""
        return True

    def rounds(self, *inputs: TensorType) -> bool:
        """Always."""
        return True

    def restore(self, state: object, num_elements: int, ports: Sequence[Tensor | None], *inputs: TensorType) -> Tensor:
        """code · absmax in f32, absmax as it is stored, rounded to the weight's dtype."""
        from surgery.numerics import fourbit

        packed, absmax = cast("Tensor", ports[0]), cast("Tensor", ports[1])
        if self.double_quant:
            absmax = fourbit.nested_decode(absmax, cast("Tensor", ports[2]), cast("Tensor", state))
        absmax = absmax.to(packed.device)
        dtype = torch_dtype(inputs[0].dtype)
        return fourbit.decode(packed, absmax, num_elements, self.block_size, self.quant_type, dtype)

    def whole_ports(self, state: object, *inputs: TensorType) -> dict[int, Tensor]:
        """The maps and the quant_state record."""
        import torch

        from surgery.numerics.codebooks import CODEBOOKS, DYNAMIC_8BIT

        offset = float(cast("Tensor", state)) if self.double_quant else 0.0
        record = bytearray(self.record(inputs[0]).encode(offset))
        parts = [torch.tensor(CODEBOOKS[self.quant_type]), torch.frombuffer(record, dtype=torch.uint8)]
        if self.double_quant:
            parts.insert(0, torch.tensor(DYNAMIC_8BIT))
        first = 3 if self.double_quant else 2
        return dict(enumerate(parts, first))

    def run(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        """The reference, on the whole weight with plain comparisons."""
        import torch

        from surgery.numerics import fourbit
        from surgery.numerics.dtypes import dtype_of

        (weight,) = inputs
        flat = weight.reshape(-1)
        type_ = TensorType(dtype_of(weight.dtype), tuple(weight.shape))
        absmax = fourbit.block_absmax(flat, self.block_size)
        packed = fourbit.encode_reference(flat, absmax, self.block_size, self.quant_type)
        state = self.combine(None, [absmax], type_)
        ports: dict[int, Tensor] = {0: packed.unsqueeze(1), 1: absmax}
        if self.double_quant:
            ports[1], ports[2] = fourbit.nested_encode(absmax, torch.as_tensor(state))
        ports |= self.whole_ports(state, type_)
        return tuple(ports[port] for port in sorted(ports))
