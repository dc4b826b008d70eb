"""bitsandbytes 4-bit (NF4, FP4) as transformers loads it: its tensors, its config, its kernels.

A weight `P.weight` of n elements becomes `P.weight` (u8 [(n+1)//2, 1]), `P.weight.absmax`,
`P.weight.quant_map`, `P.weight.quant_state.bitsandbytes__nf4` (JSON text as u8) and, with double
quantization, `P.weight.nested_absmax` and `P.weight.nested_quant_map`.
Source: bitsandbytes 0.50, `QuantState.as_dict`; QLoRA, arXiv 2305.14314.
"""

from surgery.formats.bitsandbytes.config import is_bitsandbytes, patch_config
from surgery.formats.bitsandbytes.dequantize import Dequantize4bit, quantize_of_dequantize
from surgery.formats.bitsandbytes.edit import dequantized, quantized, weight_may_be_quantized
from surgery.formats.bitsandbytes.quantize import Quantize4bit
from surgery.formats.bitsandbytes.record import QuantRecord

__all__ = [
    "Dequantize4bit",
    "QuantRecord",
    "Quantize4bit",
    "dequantized",
    "is_bitsandbytes",
    "patch_config",
    "quantize_of_dequantize",
    "quantized",
    "weight_may_be_quantized",
]
