"""From PEFT to AdapterHub and back: the tensors, and adapter_config.json.

Why: apart from one case nothing is computed, so that an adapter comes back as it went; the case is
a matrix that holds query, key and value at once (see `fused`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from surgery.formats.adapterhub.adapter import Adapter, refuse
from surgery.formats.adapterhub.fused import Blocks, Filled, Repeated
from surgery.formats.adapterhub.hub import (
    enabled_thirds,
    hidden_size,
    hub_config,
    hub_name,
    left_out,
    read_hub,
    read_hub_parts,
)
from surgery.formats.adapterhub.peft import peft_config, peft_name, read_peft, read_peft_parts
from surgery.formats.adapterhub.placement import ATTENTION, FUSED, Place, Placement, coverage, place_all
from surgery.graph import Graph, Node
from surgery.numerics.transpose import Transpose
from surgery.types import TensorType

__all__ = ["hub_config_of", "peft_config_of", "to_hub", "to_peft"]


def to_hub(
    names: Mapping[str, Node], config: Mapping[str, object], base: Mapping[str, object], name: str, graph: Graph
) -> dict[str, Node]:
    """The tensors of a PEFT adapter under AdapterHub's names. Raises OpError for what it cannot say."""
    adapter = read_peft(_types(names), config)
    if not base:
        refuse("the base has no config.json", "name the checkpoint that the adapter was trained on as `base`")
    row, places = place_all(adapter.parts, base)
    given: dict[str, Node] = {}
    for place in places:
        for part, tensor in adapter.parts[place.path].items():
            path, node = _to_hub(place, part, names[tensor], graph)
            if hub_name(path, name, part) in given:
                refuse(f"`{path}` is scaled twice: what it gives, and again where that is read")
            given[hub_name(path, name, part)] = node
    _check_width(adapter, places, names, base)
    coverage(row, place_all(_hub_paths(given), base)[1], base)
    return given


def _to_hub(place: Place, part: str, node: Node, graph: Graph) -> tuple[str, Node]:
    if part == "l" and node.type.shape[0] == 1 and node.type.num_elements > 1:
        return _output_scale(place, node, graph)
    if place.slot == FUSED and part == "A":
        return place.path, graph.apply(Repeated(len(ATTENTION)), node)[0]
    return place.path, node


def _output_scale(place: Place, node: Node, graph: Graph) -> tuple[str, Node]:
    """(IA)³ on what a module reads, as AdapterHub can have it: on what the module before it gives."""
    up = place.stack.gated.get(place.inner)
    if up is None:
        refuse(
            f"(IA)³ scales what `{place.path}` reads, and AdapterHub's scales what a Linear gives",
            "only behind a gated up projection, as in Llama, are they the same",
        )
    return place.sibling(up), graph.apply(Transpose(), node)[0]


def _check_width(
    adapter: Adapter, places: Sequence[Place], names: Mapping[str, Node], base: Mapping[str, object]
) -> None:
    width = hidden_size(base)
    for place in places if adapter.method == "lora" else ():
        type_ = names[adapter.parts[place.path]["A"]].type
        if place.slot in (*ATTENTION, FUSED) and isinstance(width, int) and type_.shape[1] != width:
            refuse(f"`{place.path}` reads {type_.shape[1]} features, but the base has {width}", "name the right base")


def hub_config_of(
    types: Mapping[str, TensorType], config: Mapping[str, object], base: Mapping[str, object], name: str
) -> dict[str, object]:
    """AdapterHub's adapter_config.json for tensors in its names; `config` is PEFT's."""
    row, places = place_all(_hub_paths(types), base)
    model_name = config.get("base_model_name_or_path")
    return hub_config(read_peft({}, config), coverage(row, places, base), name, base, model_name)


def _hub_paths(types: Mapping[str, object]) -> list[str]:
    return list(read_hub_parts(types, ()))


def to_peft(names: Mapping[str, Node], config: Mapping[str, object], graph: Graph) -> dict[str, Node]:
    """The tensors of an AdapterHub adapter under PEFT's names. Raises OpError for what it cannot say."""
    adapter = read_hub(_types(names), config)
    row, places = place_all(adapter.parts, config)
    given: dict[str, Node] = {}
    for place in places:
        _check_shapes(place, adapter, names, config)
        for part, tensor in adapter.parts[place.path].items():
            path, node = _to_peft(place, part, names[tensor], adapter, config, graph)
            given[peft_name(_bare(path, row), part)] = node
    return given


def _check_shapes(place: Place, adapter: Adapter, names: Mapping[str, Node], config: Mapping[str, object]) -> None:
    """Rank and number of thirds are as the config says."""
    held = {part: names[tensor].type for part, tensor in adapter.parts[place.path].items()}
    thirds = sum(enabled_thirds(config)) if place.slot == FUSED else 1
    ranks = {"A": thirds * adapter.rank, "B": adapter.rank, "l": 1}
    for part, type_ in held.items():
        if len(type_.shape) != 2 or type_.shape[0 if part == "A" else 1] != ranks[part]:
            refuse(f"`{adapter.parts[place.path][part]}` is {type_}, but adapter_config.json says `r: {adapter.rank}`")


def _to_peft(
    place: Place, part: str, node: Node, adapter: Adapter, config: Mapping[str, object], graph: Graph
) -> tuple[str, Node]:
    if place.slot == FUSED and part != "A":
        enabled = enabled_thirds(config)
        kernel = Filled(enabled) if part == "l" else Blocks(enabled)
        try:
            return place.path, graph.apply(kernel, node)[0]
        except ValueError as error:
            refuse(f"`{place.path}` does not fit `attn_matrices` of adapter_config.json: {error}")
    down = next((down for down, up in place.stack.gated.items() if up == place.inner), None)
    if part == "l" and down is not None and place.sibling(down) not in adapter.parts:
        return place.sibling(down), graph.apply(Transpose(), node)[0]
    return place.path, node


def _bare(path: str, row: Placement) -> str:
    return path.removeprefix(f"{row.prefix}.") if row.bare else path


def peft_config_of(types: Mapping[str, TensorType], config: Mapping[str, object]) -> dict[str, object]:
    """PEFT's adapter_config.json for tensors in its names; `config` is AdapterHub's."""
    read = read_hub({}, config)
    adapter = Adapter(read.method, read_peft_parts(types, read.method), read.rank, read.alpha, read.dropout)
    row, places = place_all(adapter.parts, config)
    return peft_config(adapter, types, row, places, config, all_layers=not left_out(config))


def _types(names: Mapping[str, Node]) -> dict[str, TensorType]:
    return {name: node.type for name, node in names.items()}
