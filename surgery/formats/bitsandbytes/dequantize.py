"""4-bit weights back to floats, as a kernel of the graph."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from surgery.formats.bitsandbytes.quantize import Quantize4bit
from surgery.formats.bitsandbytes.record import QuantRecord
from surgery.graph import Graph, Node, Span, TiledKernel
from surgery.numerics.cast import rounded
from surgery.types import DType, TensorType

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["Dequantize4bit", "quantize_of_dequantize"]


@dataclass(frozen=True, slots=True)
class Dequantize4bit(TiledKernel):
    """The ports of `Quantize4bit`, in order → the weight in `dtype`.

    As bitsandbytes and transformers do it: code · absmax in f32, rounded to the dtype that the
    record names, then cast to `dtype`.
    """

    record: QuantRecord
    dtype: DType

    def infer(self, *inputs: TensorType) -> tuple[TensorType, ...]:
        """Raises ValueError if the parts do not have the sizes that the record implies."""
        expected = self.record.port_types()
        for (suffix, type_), given in zip(expected.items(), inputs, strict=True):
            loose = suffix == "" or suffix.startswith(".quant_state")  # shape [1, n] of old, unpadded JSON
            fits = given.num_elements == type_.num_elements if suffix == "" else given == type_
            if not fits and not suffix.startswith(".quant_state"):
                raise ValueError(f"`weight{suffix}` is {given}; its record implies {type_}")
            if loose and given.dtype is not DType.U8:
                raise ValueError(f"`weight{suffix}` is {given}; only u8 storage is known")
        return (TensorType(self.dtype, self.record.weight.shape),)

    def domain(self, *inputs: TensorType) -> int:
        """The elements of the weight."""
        return self.record.weight.num_elements

    def _kernel(self) -> Quantize4bit:
        return Quantize4bit(self.record.quant_type, self.record.block_size, self.record.double_quant)

    def input_steps(self) -> tuple[int | None, ...]:
        """As the ports of the quantization."""
        return self._kernel().port_steps()

    def port_steps(self) -> tuple[int | None, ...]:
        """The weight, element by element."""
        return (1,)

    @property
    def keeps_value(self) -> bool:
        """The floats are what the codes stand for."""
        return True

    @property
    def align(self) -> int:
        """As the quantization's."""
        return self._kernel().align

    def tile(self, state: object, partial: object, span: Span, *tiles: Tensor) -> tuple[Tensor | None, ...]:
        """Decode one tile.

        Raises ValueError if the stored codebook is not bitsandbytes' own, BadValue for what `dtype` cannot hold.
        """
        import torch

        from surgery.numerics import fourbit
        from surgery.numerics.codebooks import CODEBOOKS, DYNAMIC_8BIT
        from surgery.numerics.dtypes import torch_dtype

        packed, absmax, quant_map, raw_record = tiles[0], tiles[1], tiles[-2], tiles[-1]
        _, offset = QuantRecord.decode(bytes(raw_record.cpu().numpy()))
        _check_map(quant_map, CODEBOOKS[self.record.quant_type])
        if self.record.double_quant:
            _check_map(tiles[3], DYNAMIC_8BIT)
            absmax = fourbit.nested_decode(absmax.cpu(), tiles[2].cpu(), torch.tensor(offset)).to(packed.device)
        weight = fourbit.decode(
            packed, absmax, span[1] - span[0], self.record.block_size, self.record.quant_type,
            torch_dtype(self.record.weight.dtype),
        )  # fmt: skip
        return (rounded(weight, self.dtype),)

    def run(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        """The reference, on whole tensors."""
        (weight,) = self.tile(None, None, (0, self.record.weight.num_elements), *(part.reshape(-1) for part in inputs))
        assert weight is not None
        return (weight.reshape(self.record.weight.shape),)


def _check_map(stored: Tensor, known: tuple[float, ...]) -> None:
    import torch

    if not torch.equal(stored.cpu(), torch.tensor(known)):
        raise ValueError("is stored with a codebook that is not bitsandbytes' own")


def quantize_of_dequantize(graph: Graph, node: Node) -> Node | None:
    """quantize(dequantize(q)) in the same format is q: a byte copy, not a second rounding."""
    del graph
    if not isinstance(node.kernel, Quantize4bit):
        return None
    (inner,) = node.inputs
    if not isinstance(inner.kernel, Dequantize4bit):
        return None
    record = inner.kernel.record
    same = node.kernel.record(inner.type) == record
    return inner.inputs[node.port] if same else None
