"""`TensorType`: the dtype and shape of a tensor, known before any of its bytes are read."""

from __future__ import annotations

import math
from dataclasses import dataclass
from enum import Enum
from functools import singledispatch

__all__ = ["DType", "TensorType", "text"]


class DType(Enum):
    """A dtype of the safetensors format: its name on disk and its width in bits.

    Source: safetensors 0.8, `tensor::Dtype`.
    """

    BOOL = ("BOOL", 8)
    F4 = ("F4", 4)
    F6_E2M3 = ("F6_E2M3", 6)
    F6_E3M2 = ("F6_E3M2", 6)
    U8 = ("U8", 8)
    I8 = ("I8", 8)
    F8_E5M2 = ("F8_E5M2", 8)
    F8_E4M3 = ("F8_E4M3", 8)
    F8_E8M0 = ("F8_E8M0", 8)
    F8_E4M3FNUZ = ("F8_E4M3FNUZ", 8)
    F8_E5M2FNUZ = ("F8_E5M2FNUZ", 8)
    I16 = ("I16", 16)
    U16 = ("U16", 16)
    F16 = ("F16", 16)
    BF16 = ("BF16", 16)
    I32 = ("I32", 32)
    U32 = ("U32", 32)
    F32 = ("F32", 32)
    C64 = ("C64", 64)
    F64 = ("F64", 64)
    I64 = ("I64", 64)
    U64 = ("U64", 64)

    def __init__(self, disk_name: str, bits: int) -> None:
        self.disk_name = disk_name
        self.bits = bits

    @classmethod
    def from_disk(cls, name: str) -> DType:
        """The dtype that a safetensors header calls `name`; KeyError if there is none."""
        return _BY_DISK_NAME[name]

    @property
    def is_float(self) -> bool:
        """Whether values are real floating-point numbers."""
        return self.disk_name.startswith(("F", "BF"))

    @property
    def alignment(self) -> int:
        """Bytes that a tensor's offset must divide by for loaders that view it in place."""
        return max(1, self.bits // 8)

    def __str__(self) -> str:
        return self.disk_name.lower()


_BY_DISK_NAME = {dtype.disk_name: dtype for dtype in DType}


@dataclass(frozen=True, slots=True)
class TensorType:
    """dtype and shape; prints as `bf16[4096, 4096]`."""

    dtype: DType
    shape: tuple[int, ...]

    @property
    def num_elements(self) -> int:
        """Product of the shape; 1 for a scalar."""
        return math.prod(self.shape)

    @property
    def num_bytes(self) -> int:
        """Bytes on disk. Sub-byte dtypes are stored packed."""
        return (self.num_elements * self.dtype.bits + 7) // 8

    def __str__(self) -> str:
        return f"{self.dtype}[{', '.join(map(str, self.shape))}]"


@singledispatch
def text(value: object) -> str:
    """What a person reads of `value`; the `view` module registers one function per noun."""
    return repr(value)
