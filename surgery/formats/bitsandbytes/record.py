"""The JSON that describes a 4-bit weight, `P.weight.quant_state.bitsandbytes__nf4`."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import cast

from surgery.numerics.dtypes import float_dtype, torch_name
from surgery.types import DType, TensorType

__all__ = ["NESTED_BLOCK_SIZE", "QuantRecord"]

NESTED_BLOCK_SIZE = 256  # fixed in bitsandbytes, `quantize_4bit`
LONGEST_FLOAT = -2.2250738585072014e-308  # no float prints longer


@dataclass(frozen=True, slots=True)
class QuantRecord:
    """What the record says but for `nested_offset`, which only the weights can tell."""

    quant_type: str
    block_size: int
    weight: TensorType
    double_quant: bool

    @property
    def num_bytes(self) -> int:
        """The padded length, the same whatever the offset prints as, so that headers can be planned."""
        unpadded = len(json.dumps(self._fields(LONGEST_FLOAT)))
        return unpadded + -unpadded % 8

    def encode(self, offset: float) -> bytes:
        """The JSON text, padded with spaces to `num_bytes` (its readers call json.loads)."""
        return json.dumps(self._fields(offset)).encode().ljust(self.num_bytes)

    def _fields(self, offset: float) -> dict[str, object]:
        fields: dict[str, object] = {
            "quant_type": self.quant_type,
            "blocksize": self.block_size,
            "dtype": torch_name(self.weight.dtype),
            "shape": list(self.weight.shape),
        }
        if self.double_quant:
            nested = {"nested_blocksize": NESTED_BLOCK_SIZE, "nested_dtype": "float32", "nested_offset": offset}
            fields.update(nested)
        return fields

    @classmethod
    def decode(cls, raw: bytes) -> tuple[QuantRecord, float]:
        """The record and its offset (0 without double quantization). Raises ValueError if it does not hold."""
        fields = cast(dict[str, object], json.loads(raw))
        try:
            shape = tuple(int(size) for size in cast(list[int], fields["shape"]))
            weight = TensorType(float_dtype(cast(str, fields["dtype"])), shape)
            double_quant = "nested_offset" in fields
            record = cls(cast(str, fields["quant_type"]), cast(int, fields["blocksize"]), weight, double_quant)
            offset = float(cast(float, fields.get("nested_offset", 0.0)))
        except (KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"its quant_state record lacks or misstates {error}") from None
        record.check(fields)
        return record, offset

    def check(self, fields: dict[str, object]) -> None:
        """Raises ValueError for what no version of bitsandbytes writes."""
        if self.quant_type not in ("nf4", "fp4"):
            raise ValueError(f"its quant_state record has the unknown quant_type {self.quant_type!r}")
        if type(self.block_size) is not int or self.block_size < 2 or self.block_size & (self.block_size - 1):
            raise ValueError(f"its quant_state record has the impossible blocksize {self.block_size!r}")
        if any(size < 1 for size in self.weight.shape) or not self.weight.dtype.is_float:
            raise ValueError(f"its quant_state record describes the impossible weight {self.weight}")
        if self.double_quant and fields.get("nested_blocksize") != NESTED_BLOCK_SIZE:
            raise ValueError("its quant_state record has a nested_blocksize other than 256")

    def num_blocks(self) -> int:
        """Blocks of the flattened weight; the last may be short."""
        return -(-self.weight.num_elements // self.block_size)

    @property
    def suffixes(self) -> tuple[str, ...]:
        """Of the stored tensors, after `P.weight`; sorted."""
        nested = (".nested_absmax", ".nested_quant_map") if self.double_quant else ()
        return ("", ".absmax", *nested, ".quant_map", f".quant_state.bitsandbytes__{self.quant_type}")

    def port_types(self) -> dict[str, TensorType]:
        """The stored tensors by their suffix after `P.weight`, with types; sorted by name."""
        num_blocks = self.num_blocks()
        absmax = DType.U8 if self.double_quant else DType.F32
        types = [TensorType(DType.U8, ((self.weight.num_elements + 1) // 2, 1)), TensorType(absmax, (num_blocks,))]
        if self.double_quant:
            types.append(TensorType(DType.F32, (-(-num_blocks // NESTED_BLOCK_SIZE),)))
            types.append(TensorType(DType.F32, (256,)))
        types += [TensorType(DType.F32, (16,)), TensorType(DType.U8, (self.num_bytes,))]
        return dict(zip(self.suffixes, types, strict=True))
