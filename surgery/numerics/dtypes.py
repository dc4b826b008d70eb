"""Between safetensors' dtypes and torch's. Imports torch only when called."""

from __future__ import annotations

from typing import TYPE_CHECKING

from surgery.types import DType

if TYPE_CHECKING:
    import torch

__all__ = ["FLOAT_NAMES", "dtype_of", "float_dtype", "torch_dtype", "torch_name"]

_TORCH_NAMES = {
    DType.BOOL: "bool",
    DType.U8: "uint8",
    DType.I8: "int8",
    DType.F8_E5M2: "float8_e5m2",
    DType.F8_E4M3: "float8_e4m3fn",
    DType.F8_E8M0: "float8_e8m0fnu",
    DType.F8_E4M3FNUZ: "float8_e4m3fnuz",
    DType.F8_E5M2FNUZ: "float8_e5m2fnuz",
    DType.I16: "int16",
    DType.U16: "uint16",
    DType.F16: "float16",
    DType.BF16: "bfloat16",
    DType.I32: "int32",
    DType.U32: "uint32",
    DType.F32: "float32",
    DType.C64: "complex64",
    DType.F64: "float64",
    DType.I64: "int64",
    DType.U64: "uint64",
}

FLOAT_NAMES = ("float32", "float16", "bfloat16", "float64", "float8_e4m3fn", "float8_e5m2")
_BY_TORCH_NAME = {name: dtype for dtype, name in _TORCH_NAMES.items()}


def float_dtype(name: str) -> DType:
    """The dtype that torch and transformers call `name`, one of FLOAT_NAMES."""
    return _BY_TORCH_NAME[name]


def torch_name(dtype: DType) -> str:
    """What torch calls `dtype`. Raises KeyError for one that torch lacks."""
    return _TORCH_NAMES[dtype]


def torch_dtype(dtype: DType) -> torch.dtype:
    """The torch dtype. Raises KeyError for one that torch lacks."""
    import torch

    return getattr(torch, _TORCH_NAMES[dtype])


def dtype_of(dtype: torch.dtype) -> DType:
    """The safetensors dtype of a torch dtype. Raises KeyError for one that safetensors lacks."""
    return _BY_TORCH_NAME[str(dtype).removeprefix("torch.")]
