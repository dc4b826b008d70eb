"""What `quantize.nf4` and `quantize.fp4` share: all but the codebook."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import ClassVar, Literal

from surgery.checkpoint.architecture import Architecture
from surgery.checkpoint.modules import Module
from surgery.formats.bitsandbytes.config import patch_config
from surgery.formats.bitsandbytes.dequantize import quantize_of_dequantize
from surgery.formats.bitsandbytes.edit import quantized, weight_may_be_quantized
from surgery.formats.bitsandbytes.quantize import Quantize4bit
from surgery.graph import Rule
from surgery.numerics.cast import transpose_of_cast
from surgery.numerics.transpose import transpose_of_transpose
from surgery.op import Finished, Op, Rewrite, Site, doc

__all__ = ["Bitsandbytes4bit"]


@dataclass(frozen=True, slots=True)
class Bitsandbytes4bit(Op):
    """A 4-bit format of bitsandbytes; a subclass names its codebook."""

    quant_type: ClassVar[str]
    rules: ClassVar[tuple[Rule, ...]] = (quantize_of_dequantize, transpose_of_transpose, transpose_of_cast)

    block_size: Literal[32, 64, 128, 256, 512, 1024, 2048, 4096] = field(
        default=64,
        metadata=doc("Weights that share one absmax. transformers itself always writes 64."),
    )
    double_quant: bool = field(
        default=True,
        metadata=doc("Quantize the absmax values too, to 8 bits in blocks of 256: 4.127 instead of 4.5 bits a weight."),
    )
    compute_dtype: Literal["float32", "float16", "bfloat16"] = field(
        default="bfloat16",
        metadata=doc("The dtype that the loader computes in; written to config.json, changes no weight."),
    )

    def in_all_linear(self, module: Module, architecture: Architecture) -> bool:
        """Every Linear that transformers would quantize."""
        return weight_may_be_quantized(module, architecture)

    def rewrite(self, site: Site) -> Rewrite:
        """The weight of `site` in 4 bits."""
        return quantized(site, Quantize4bit(self.quant_type, self.block_size, self.double_quant))

    def config(self, config: Mapping[str, object], finished: Finished) -> Mapping[str, object]:
        """The quantization_config that loads the output as it is."""
        options = {
            "bnb_4bit_quant_type": self.quant_type,
            "bnb_4bit_use_double_quant": self.double_quant,
            "bnb_4bit_compute_dtype": self.compute_dtype,
        }
        return patch_config(config, finished, options)

    def conflicts(self, other: Op) -> str:
        """config.json has room for one compute dtype."""
        if isinstance(other, Bitsandbytes4bit) and other.compute_dtype != self.compute_dtype:
            return f"compute_dtype is {self.compute_dtype} here and {other.compute_dtype} there; a checkpoint has one"
        return ""
