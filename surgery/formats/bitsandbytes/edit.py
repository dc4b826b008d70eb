"""The names that quantizing and dequantizing read and write at one module."""

from __future__ import annotations

from typing import TYPE_CHECKING

from surgery.checkpoint.architecture import Architecture, Kind
from surgery.checkpoint.modules import Module
from surgery.errors import CheckpointError, OpError
from surgery.formats.bitsandbytes.config import other_method
from surgery.formats.bitsandbytes.dequantize import Dequantize4bit
from surgery.formats.bitsandbytes.quantize import Quantize4bit
from surgery.formats.bitsandbytes.record import QuantRecord
from surgery.graph import Node
from surgery.numerics.transpose import Transpose
from surgery.op import SOURCE, Rewrite, Site

if TYPE_CHECKING:
    from surgery.types import DType

__all__ = ["dequantized", "quantized", "weight_may_be_quantized"]


def weight_may_be_quantized(module: Module, architecture: Architecture) -> bool:
    """Whether `all-linear` takes this module: transformers leaves some Linears in float32."""
    return module.is_linear and not architecture.keeps_full_precision(module.path)


def quantized(site: Site, kernel: Quantize4bit) -> Rewrite:
    """`site`'s weight in 4 bits; a Conv1D's is turned to [out, in] first, as transformers does.

    Raises OpError for whatever transformers could not load.
    """
    _refuse_what_will_not_load(site)
    name = f"{site.path}.weight"
    weight = site.nodes[name]
    if site.module.kind is Kind.CONV1D:
        (weight,) = site.graph.apply(Transpose(), weight)
    try:
        ports = site.graph.apply(kernel, weight)
    except ValueError as error:
        raise site.refuse(f"cannot be quantized: {error}", _dtype_fix(site, weight)) from None
    suffixes = kernel.suffixes
    return Rewrite((name,), {name + suffix: port for suffix, port in zip(suffixes, ports, strict=True)})


def _dtype_fix(site: Site, weight: Node) -> str:
    if weight.type.dtype.is_float and len(weight.type.shape) == 2 and weight.type.num_elements:
        return f"cast it first: `op: tensor.cast`, `tensors: '{site.path}.weight'`, `dtype: bfloat16`"
    return "only Linear weights can be quantized: narrow `modules`, or take it away with `except`"


def _refuse_what_will_not_load(site: Site) -> None:
    for refusal in (
        _adapter,
        _other_method,
        _quantized_already,
        _expert,
        _without_weight,
        _no_linear,
        _own_linear,
        _full_precision,
    ):
        refused = refusal(site)
        if refused:
            raise refused


def _adapter(site: Site) -> OpError | None:
    fix = "quantize its base, or fold it first: `adapter.fold` and this op in one spec"
    is_adapter = site.scene.models[SOURCE].checkpoint.is_adapter
    return site.refuse("belongs to an adapter, which no loader reads in 4 bits", fix) if is_adapter else None


def _other_method(site: Site) -> OpError | None:
    method = other_method(site.config)
    what = f"belongs to a checkpoint that is already quantized with {method}"
    return site.refuse(what, "start from the checkpoint before quantization") if method else None


def _quantized_already(site: Site) -> OpError | None:
    if not site.module.is_quantized:
        return None
    by = f" by {site.touched_by}" if site.touched_by else ""
    fix = "take it away from one of the edits with `except`, or run `quantize.dequantize` on it first"
    return site.refuse(f"is already quantized{by}", fix)


def _expert(site: Site) -> OpError | None:
    fix = (
        r"leave the experts alone (`except: '.*\.experts\..*'`), or quantize them with a compressed-tensors scheme"
        " such as W4A16, which transformers and vLLM load expert by expert"
    )
    what = "is an MoE expert: transformers cannot load bitsandbytes 4-bit experts"
    return site.refuse(what, fix) if site.module.kind is Kind.EXPERT else None


def _without_weight(site: Site) -> OpError | None:
    what = f"has no weight; it holds {', '.join(site.nodes)}"
    return None if f"{site.path}.weight" in site.nodes else site.refuse(what, "narrow `modules` to Linears")


def _no_linear(site: Site) -> OpError | None:
    kind = site.module.kind
    is_tied = site.path in site.architecture.heads and site.architecture.is_tied(site.config)
    if site.module.is_linear or (kind is Kind.HEAD and not is_tied):
        return None
    article = "an" if kind in (Kind.EMBEDDING, Kind.HEAD, Kind.ROUTER, Kind.OTHER) else "a"
    named = f"{article} {kind.value}{', tied to the embedding' if is_tied else ''}"
    what = f"is no Linear but {named} ({site.nodes[f'{site.path}.weight'].type}), which bitsandbytes does not quantize"
    fix = "narrow `modules`, or take it away with `except`; `modules: all-linear` finds what can be quantized"
    return site.refuse(what, fix)


def _own_linear(site: Site) -> OpError | None:
    what = "is of an architecture whose Linears are not torch's own, which transformers cannot load quantized"
    fix = "use a format other than bitsandbytes for this model"
    return site.refuse(what, fix) if site.architecture.own_linear else None


def _full_precision(site: Site) -> OpError | None:
    fix = f"take it away with `except: '{site.architecture.full_precision}'`"
    what = "is kept in float32 by transformers, which cannot load it quantized"
    return site.refuse(what, fix) if site.architecture.keeps_full_precision(site.path) else None


def dequantized(site: Site, dtype: DType | None) -> Rewrite:
    """`site`'s weight in `dtype`, or in the dtype it had; stored as the architecture stores it."""
    name = f"{site.path}.weight"
    record_name = next((part for part in site.nodes if part.startswith(f"{name}.quant_state.")), None)
    if record_name is None:
        raise site.refuse("is not quantized with bitsandbytes 4-bit", "`surgery inspect` lists what is")
    record = _record(site, site.nodes[record_name])
    parts = [name + suffix for suffix in record.port_types()]
    missing = [part for part in parts if part not in site.nodes]
    if missing:
        raise site.refuse(f"lacks `{missing[0]}`", "the checkpoint is incomplete: download or write it again")
    kernel = Dequantize4bit(record, dtype or record.weight.dtype)
    try:
        (weight,) = site.graph.apply(kernel, *(site.nodes[part] for part in parts))
    except ValueError as error:
        raise site.refuse(f"does not hold together: {error}", "download or write it again") from None
    if site.module.kind is Kind.CONV1D:
        (weight,) = site.graph.apply(Transpose(), weight)
    return Rewrite(tuple(parts), {name: weight})


def _record(site: Site, node: Node) -> QuantRecord:
    if isinstance(node.kernel, Quantize4bit):
        return node.kernel.record(node.inputs[0].type)
    try:
        return QuantRecord.decode(site.scene.read_record(node))[0]
    except (ValueError, CheckpointError) as error:
        raise site.refuse(f"does not hold together: {error}", "download or write it again") from None
