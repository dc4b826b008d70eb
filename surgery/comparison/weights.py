"""What a checkpoint holds by name, with each 4-bit weight as the floats that a loader makes of it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace

from surgery.checkpoint import Checkpoint
from surgery.checkpoint.modules import Module, modules_of
from surgery.comparison.model import Stored
from surgery.errors import OpError
from surgery.formats.bitsandbytes.edit import dequantized
from surgery.graph import Graph, Node, Source
from surgery.op import SOURCE, Model, Scene, Site
from surgery.plan.names import open_models
from surgery.types import DType, TensorType

__all__ = ["BITS_ONLY", "Weight", "weights_of"]

BITS_ONLY = {DType.C64: DType.U64, DType.F4: DType.U8, DType.F6_E2M3: DType.U8, DType.F6_E3M2: DType.U8}
"""Dtypes whose values are not compared, and what their bytes are looked at as."""

TABLES = (".quant_map", ".nested_quant_map")  # the same for every weight


@dataclass(frozen=True, slots=True)
class Weight:
    """A tensor of a checkpoint; of a 4-bit weight `node` is its value, `parts` are the tensors that it is stored in."""

    stored: Stored
    node: Node
    parts: Mapping[str, Node] = field(default_factory=dict[str, Node])


def weights_of(key: str, checkpoint: Checkpoint, graph: Graph) -> dict[str, Weight]:
    """Every tensor of `checkpoint`, which streams know by `key`, in order. Raises OpError for broken 4-bit weights."""
    model = open_models({key: checkpoint}, graph)[key]
    modules = modules_of({name: node.type for name, node in model.nodes.items()}, model.architecture)
    quantized = dict(_quantized(model, modules, graph))
    parts = {part for weight in quantized.values() for part in weight.parts}
    return {
        name: quantized.get(name) or _plain(key, name, node, graph)
        for name, node in model.nodes.items()
        if name in quantized or name not in parts
    }


def _plain(key: str, name: str, node: Node, graph: Graph) -> Weight:
    type_ = node.type
    if type_.dtype in BITS_ONLY:
        seen_as = BITS_ONLY[type_.dtype]
        seen = TensorType(seen_as, (type_.num_bytes * 8 // seen_as.bits,))
        (node,) = graph.apply(Source(key, name, seen))
    return Weight(Stored(type_), node)


def _quantized(model: Model, modules: Mapping[str, Module], graph: Graph) -> Iterator[tuple[str, Weight]]:
    scene = Scene(
        names=model.nodes,
        modules=modules,
        config=model.config,
        architecture=model.architecture,
        models={SOURCE: model, model.name: model},
        graph=graph,
        seed=0,
    )
    for path, module in modules.items():
        if module.is_quantized:
            nodes = {name: model.nodes[name] for name in module.tensors}
            yield f"{path}.weight", _dequantized(Site(path, module, nodes, "", None, scene), model)


def _dequantized(site: Site, model: Model) -> Weight:
    try:
        rewrite = dequantized(site, None)
    except OpError as error:
        raise OpError(*(replace(problem, at=model.checkpoint.identity) for problem in error.problems)) from None
    (node,) = rewrite.gives.values()
    parts = {name: site.nodes[name] for name in rewrite.takes}
    (format_,) = {name.rpartition("__")[2] for name in parts if ".quant_state." in name}
    counted = sum(part.type.num_bytes for name, part in parts.items() if not _is_table(name))
    return Weight(Stored(node.type, format_, 8 * counted / node.type.num_elements), node, parts)


def _is_table(name: str) -> bool:
    return name.endswith(TABLES) or ".quant_state." in name
