"""From an adapter's files to the modules that compute it, held against the live model.

Every tensor of the file is used, and every place that the config speaks of is filled, or it is an error.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Literal, cast

import torch
from torch import Tensor, nn

from surgery.errors import CheckpointError, OpError, Problem
from surgery.formats.adapterhub.bottleneck import KEY, hub_keys, read_hub_bottleneck, slots_of
from surgery.formats.adapterhub.hub import hidden_size
from surgery.formats.adapterhub.slots import Slot, family_of, layers_of
from surgery.formats.bottleneck.layout import (
    ADAPTER_TYPE,
    PARTS,
    ModulesConfig,
    Sizes,
    modules_keys,
    read_modules_config,
)
from surgery.runtime.modules import AtModule, Bottleneck, InSlot, SlotModules

__all__ = ["Layout", "Placed", "build", "layout_of", "modules_of", "own_name"]

Layout = Literal["surgery", "adapterhub"]


@dataclass(frozen=True, slots=True)
class Placed:
    """A bottleneck, and the path that its tensors are named by in the file: a module's or a slot's."""

    path: str
    adapter: Bottleneck

    def keys(self, layout: Layout, name: str) -> Mapping[str, str]:
        """What the file of the adapter `name` calls its tensors, by part."""
        if layout == "adapterhub":
            return hub_keys(self.path, name)
        return modules_keys(self.path, bias="bias" in dict(self.adapter.adapter_down.named_parameters()))


def layout_of(config: Mapping[str, object]) -> Layout:
    """Whose layout adapter_config.json is written in. Raises OpError if it is neither's."""
    if config.get("adapter_type") == ADAPTER_TYPE:
        return "surgery"
    if "peft_type" in config:
        fix = "PEFT loads it: `PeftModel.from_pretrained`"
        raise OpError(Problem(f"this is a PEFT adapter (`peft_type: {config['peft_type']}`), no bottleneck", fix=fix))
    if "config" in config:
        return "adapterhub"
    raise OpError(Problem("adapter_config.json is neither surgery's nor AdapterHub's: it has no `config`"))


def own_name(config: Mapping[str, object], default: str) -> str:
    """What the adapter calls itself; `default` if it does not say. Raises OpError for a name that is no text."""
    name = config.get("name")
    if not isinstance(name, str | None):
        raise OpError(Problem(f"adapter_config.json says `name: {name}`, which is no text"))
    return default if name is None else name


def build(model: nn.Module, config: Mapping[str, object], tensors: Mapping[str, Tensor]) -> list[Placed]:
    """The bottlenecks of an adapter with the values of `tensors`, not hooked yet.

    Raises OpError if they do not fit the model, CheckpointError if they do not fit the config.
    """
    if layout_of(config) == "surgery":
        return _modules(model, read_modules_config(config), tensors)
    return _slots(model, config, tensors)


def _modules(model: nn.Module, config: ModulesConfig, tensors: Mapping[str, Tensor]) -> list[Placed]:
    found = {path: _find(model, path) for path in config.modules}
    _check_distinct(found)
    keys = {path: modules_keys(path, bias=config.bias) for path in found}
    _check_all_used(tensors, keys)
    placed: list[Placed] = []
    for path, module in found.items():
        held = {part: tensors[key] for part, key in keys[path].items()}
        sizes = _sizes(held, path)
        _check_features(module, path, config, sizes)
        adapter = AtModule(sizes, config.activation, config.scaling, config.placement, module, bias=config.bias)
        placed.append(Placed(path, _filled(adapter, held, module, model)))
    return placed


def modules_of(model: nn.Module) -> Mapping[str, nn.Module]:
    """By path, the model itself among them."""
    return dict(cast("Iterable[tuple[str, nn.Module]]", model.named_modules()))


def _find(model: nn.Module, path: str) -> nn.Module:
    """The module at `path`, whether or not the model or the path has the base model's prefix."""
    prefix = getattr(model, "base_model_prefix", "")
    tried = [path, path.removeprefix(f"{prefix}."), f"{prefix}.{path}"] if prefix else [path]
    modules = modules_of(model)
    found = next((modules[candidate] for candidate in tried if candidate in modules), None)
    if found is None:
        fix = "an adapter belongs to one architecture; `named_modules()` lists the paths of a model"
        raise OpError(Problem(f"`{path}`, which the adapter names, is no module of {type(model).__name__}", fix=fix))
    return found


def _check_distinct(found: Mapping[str, nn.Module]) -> None:
    first: dict[nn.Module, str] = {}
    for path, module in found.items():
        if first.setdefault(module, path) != path:
            raise OpError(Problem(f"the adapter names one module twice: `{first[module]}` and `{path}`"))


def _check_features(module: nn.Module, path: str, config: ModulesConfig, sizes: Sizes) -> None:
    inputs = getattr(module, "in_features", getattr(module, "nx", None))
    outputs = getattr(module, "out_features", getattr(module, "nf", None))
    read = outputs if config.placement == "after" else inputs
    given = inputs if config.placement == "before" else outputs
    for there, here in ((read, sizes.inputs), (given, sizes.outputs)):
        if isinstance(there, int) and there != here:
            what = f"`{path}` has {there} features where the adapter has {here}: it was made for another model"
            raise OpError(Problem(what))
    if sizes.width != config.width:
        raise CheckpointError(Problem(f"`{path}` is {sizes.width} wide, but adapter_config.json says {config.width}"))


def _slots(model: nn.Module, config: Mapping[str, object], tensors: Mapping[str, Tensor]) -> list[Placed]:
    bottleneck = read_hub_bottleneck(config)
    base = _config_of(model)
    family = family_of(base.get("model_type"))
    if config.get("model_type") not in (None, base.get("model_type")):
        what = f"the adapter is for `{config['model_type']}`, and the model is `{base.get('model_type')}`"
        raise OpError(Problem(what))
    modules = modules_of(model)
    layers = layers_of(family, modules)
    if not layers:
        what = f"{type(model).__name__} has no `{family.stacks[0].layers}`"
        raise OpError(Problem(what, fix="attach to the model as transformers makes it, not to one that wraps it"))
    there, name = _hub_slots(tensors)
    slots = {family.bare(f"{layer}.{slot.path}"): (layer, slot) for layer, slot in slots_of(bottleneck, layers)}
    written = {family.bare(path): path for path in there}
    _check_all_used(tensors, {path: hub_keys(written.get(path, path), name) for path in slots})
    placed: list[Placed] = []
    for path, (layer, slot) in slots.items():
        held = {part: tensors[key] for part, key in hub_keys(written[path], name).items()}
        sizes = _sizes(held, path)
        _check_hidden(path, sizes, hidden_size(base))
        made = _slot_modules(modules, layer, slot)
        options = bottleneck.activation, bottleneck.scaling, bottleneck.dropout, bottleneck.reads
        placed.append(Placed(written[path], _filled(InSlot(sizes, *options, made), held, modules[layer], model)))
    return placed


def _config_of(model: nn.Module) -> Mapping[str, object]:
    config = getattr(model, "config", None)
    if config is None or not hasattr(config, "to_dict"):
        what = f"{type(model).__name__} has no transformers config, so where AdapterHub's slots are cannot be known"
        raise OpError(Problem(what, fix="adapters at single Linears (`adapter_type: surgery`) go with any module"))
    return cast("Mapping[str, object]", config.to_dict())


def _hub_slots(tensors: Iterable[str]) -> tuple[list[str], str]:
    matches = [(key, KEY.fullmatch(key)) for key in tensors]
    stray = [key for key, match in matches if match is None]
    if stray:
        raise CheckpointError(Problem(f"`{stray[0]}` is no tensor of a bottleneck adapter"))
    names = sorted({match["name"] for _, match in matches if match})
    if len(names) != 1:
        raise CheckpointError(Problem(f"the file holds {len(names)} adapters: {', '.join(names)}"))
    return list(dict.fromkeys(match["slot"] for _, match in matches if match)), names[0]


def _slot_modules(modules: Mapping[str, nn.Module], layer: str, slot: Slot) -> SlotModules:
    def at(path: str) -> nn.Module:
        full = f"{layer}.{path}" if path else layer
        if full not in modules:
            raise OpError(Problem(f"the model has no `{full}`, where AdapterHub's slot `{slot.path}` is"))
        return modules[full]

    return SlotModules(at(slot.output), at(slot.residual), slot.argument, at(slot.norm) if slot.norm else None)


def _check_hidden(path: str, sizes: Sizes, hidden: object) -> None:
    if not sizes.inputs == sizes.outputs == hidden:
        what = f"`{path}` has {sizes.inputs} features in and {sizes.outputs} out, and the model {hidden}"
        raise OpError(Problem(what, fix="attach it to the model that it was made for"))


def _check_all_used(tensors: Mapping[str, Tensor], keys: Mapping[str, Mapping[str, str]]) -> None:
    wanted = {key for parts in keys.values() for key in parts.values()}
    missing, unexpected = sorted(wanted - set(tensors)), sorted(set(tensors) - wanted)
    what = [f"the file has no `{missing[0]}` ({len(missing)} of {len(wanted)} are missing)"] if missing else []
    if unexpected:
        what.append(f"`{unexpected[0]}` has no place in the model by adapter_config.json ({len(unexpected)} like it)")
    if what:
        fix = "save the adapter again, or attach it to the model that it was made for"
        raise CheckpointError(*(Problem(text, fix=fix) for text in what))


def _sizes(held: Mapping[str, Tensor], path: str) -> Sizes:
    down, up = held[PARTS[0]], held[PARTS[2]]
    if down.dim() == 2 and up.dim() == 2:
        sizes = Sizes(down.shape[1], down.shape[0], up.shape[0])
        if all(tuple(tensor.shape) == sizes.shapes[part] for part, tensor in held.items()):
            return sizes
    shapes = ", ".join(f"{part} {list(tensor.shape)}" for part, tensor in held.items())
    raise CheckpointError(Problem(f"the tensors of `{path}` do not fit together: {shapes}"))


@torch.no_grad()
def _filled(adapter: Bottleneck, held: Mapping[str, Tensor], module: nn.Module, model: nn.Module) -> Bottleneck:
    """`adapter` with its values, of the dtype of `module` (of the model, if that one is quantized) and its device."""
    dtype = next((p.dtype for p in (*module.parameters(), *model.parameters()) if _is_plain(p)), torch.float32)
    device = next((p.device for p in module.parameters()), torch.device("cpu"))
    adapter.to(device=device, dtype=dtype)
    for part, tensor in held.items():
        adapter.get_parameter(part).copy_(tensor)
    return adapter.train(model.training)


def _is_plain(parameter: nn.Parameter) -> bool:
    return parameter.is_floating_point() and parameter.itemsize > 1 and not hasattr(parameter, "quant_state")
