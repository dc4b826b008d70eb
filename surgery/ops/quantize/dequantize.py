"""`quantize.dequantize`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import ClassVar, Literal

from surgery.checkpoint.architecture import Architecture
from surgery.checkpoint.modules import Module
from surgery.formats.bitsandbytes.config import patch_config
from surgery.formats.bitsandbytes.edit import dequantized
from surgery.graph import Rule
from surgery.numerics.dtypes import float_dtype
from surgery.numerics.transpose import transpose_of_transpose
from surgery.op import Finished, Op, Rewrite, Site, doc


@dataclass(frozen=True, slots=True)
class Dequantize(Op):
    """bitsandbytes 4-bit weights back to floats.

    Reads    weight and its parts, as `quantize.nf4` and `quantize.fp4` write them
    Writes   weight  `dtype` [out, in]; a Conv1D's is turned back to [in, out]
             config.json  llm_int8_skip_modules grows; without a quantized weight left, the
             quantization_config goes
    Exact    code * absmax in f32, rounded to the dtype that the quant_state names, then cast to `dtype`:
             what bitsandbytes' `dequantize_4bit` and transformers' `dequantize(dtype)` give (but for the AVX512
             kernel of bitsandbytes 0.50, which departs from it where rows are no multiple of the block)
    Raises   OpError for a module that is not quantized, or whose parts do not fit each other
    Source   bitsandbytes 0.50, `dequantize_4bit`
    """

    rules: ClassVar[tuple[Rule, ...]] = (transpose_of_transpose,)

    dtype: Literal["float32", "float16", "bfloat16"] | None = field(
        default=None, metadata=doc("The dtype to write; by default the one that the weight had before.")
    )

    def in_all_linear(self, module: Module, architecture: Architecture) -> bool:
        """Every module that is quantized."""
        return module.is_quantized

    def rewrite(self, site: Site) -> Rewrite:
        """The weight of `site` as floats."""
        return dequantized(site, float_dtype(self.dtype) if self.dtype else None)

    def config(self, config: Mapping[str, object], finished: Finished) -> Mapping[str, object]:
        """The quantization_config of what is left quantized."""
        return patch_config(config, finished, {})
