"""`tensor.cast`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import ClassVar, Literal

from surgery.checkpoint.modules import QUANTIZED_PARTS, Module
from surgery.graph import Rule
from surgery.numerics.cast import Cast, cast_of_cast
from surgery.numerics.dtypes import FLOAT_NAMES, float_dtype, torch_name
from surgery.op import Finished, Op, Rewrite, Selects, Site, doc


@dataclass(frozen=True, slots=True)
class CastTensor(Op):
    """Tensors in another float dtype, rounded to nearest even.

    Reads    a float tensor of any shape
    Writes   the same in `dtype`
             config.json  `dtype`, where most of the model's floats are cast
    Error    half a unit in the last place of `dtype`; max and RMS of each tensor are in the manifest
    Mind     a 4-bit model keeps the dtypes on disk: give norms, embeddings and plain Linears one dtype, or its
             forward meets two; a plain model is loaded in config.json's `dtype` whatever the tensors' own
    Raises   OpError for an integer tensor, a part of a quantized weight, or a finite value that
             `dtype` cannot hold (the tensor and the index are named)
    """

    selects: ClassVar[Selects] = "tensors"
    rules: ClassVar[tuple[Rule, ...]] = (cast_of_cast,)

    dtype: Literal["float32", "float16", "bfloat16", "float64", "float8_e4m3fn", "float8_e5m2"] = field(
        metadata=doc("The dtype to cast to, by torch's name.", examples=("bfloat16",))
    )

    def rewrite(self, site: Site) -> Rewrite:
        """The tensor in `dtype`."""
        is_weight = site.path == f"{site.module.path}.weight" and site.module.is_quantized
        if is_weight or QUANTIZED_PARTS.fullmatch(site.path):
            raise site.refuse("is a part of a quantized weight", "cast before quantizing, or `quantize.dequantize` it")
        try:
            (node,) = site.graph.apply(Cast(float_dtype(self.dtype)), site.nodes[site.path])
        except ValueError as error:
            fix = "take it away with `except`, or narrow `tensors`"
            raise site.refuse(f"cannot be cast: {error}", fix) from None
        return Rewrite((site.path,), {site.path: node})

    def config(self, config: Mapping[str, object], finished: Finished) -> Mapping[str, object]:
        """`dtype`, and `torch_dtype` where it stands, name what most floats are in."""
        main = _main_dtype(finished.modules)
        if main is None:
            return config
        keys = ["dtype", *(["torch_dtype"] if "torch_dtype" in config else [])]
        return {**config, **dict.fromkeys(keys, main)}


def _main_dtype(modules: Mapping[str, Module]) -> str | None:
    counts: dict[str, int] = {}
    for module in modules.values():
        for type_ in () if module.is_quantized else module.tensors.values():
            if type_.dtype.is_float and torch_name(type_.dtype) in FLOAT_NAMES:
                counts[torch_name(type_.dtype)] = counts.get(torch_name(type_.dtype), 0) + type_.num_elements
    return max(counts, key=lambda name: counts[name]) if counts else None
