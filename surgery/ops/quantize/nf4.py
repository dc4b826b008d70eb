"""`quantize.nf4`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from surgery.formats.bitsandbytes.options import Bitsandbytes4bit


@dataclass(frozen=True, slots=True)
class NF4(Bitsandbytes4bit):
    """4-bit NormalFloat, as bitsandbytes stores it and transformers loads it.

    Reads    weight  f32|f16|bf16 [out, in]; a Conv1D's [in, out] is turned first
    Writes   weight                 u8  [(n+1)//2, 1]  two codes a byte, the even element high; n = out*in
             weight.absmax          u8  [ceil(n/block_size)]  (f32 without double_quant)
             weight.nested_absmax   f32 [ceil(blocks/256)]    (with double_quant)
             weight.nested_quant_map f32 [256]                (with double_quant)
             weight.quant_map       f32 [16]
             weight.quant_state.bitsandbytes__nf4  u8  JSON text
             config.json            quantization_config; llm_int8_skip_modules names every Linear left alone
    Error    per block |weight - dequantized| <= 0.152 * absmax, plus the rounding of absmax to 8 bits
             with double_quant; max and RMS of each tensor are in the manifest
    Raises   OpError for what is no Linear, is quantized already, is an MoE expert, is a tied head, or
             holds a NaN or Inf (the tensor and the index are named)
    Source   QLoRA, arXiv 2305.14314, appendix E; the bytes are those of bitsandbytes 0.50 on one CPU thread
    """

    quant_type: ClassVar[str] = "nf4"
