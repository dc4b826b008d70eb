"""The layers of a checkpoint: which tensors repeat by a number."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from surgery.errors import OpError, Problem

__all__ = ["Stack", "stack_at", "stacks_of"]

LAYER = re.compile(r"(?P<stack>(?:[^.\d][^.]*\.)*?[^.\d][^.]*)\.(?P<index>\d+)\.(?P<name>.+)")
STACK_NAMES = ("layers", "layer", "h", "block", "blocks", "resblocks")

# What the first layer holds for the whole stack (T5, WavLM); umT5 has one in every layer.
FIRST_ONLY = re.compile(r"(.*\.)?(relative_attention_bias|rel_attn_embed)\.weight")


@dataclass(frozen=True, slots=True)
class Stack:
    """Layers 0, 1, ... under one path: of each, its tensors by their name within the layer."""

    path: str
    layers: tuple[Mapping[str, str], ...]  # name within the layer → full name
    shared: Mapping[str, str]  # what the first layer holds for all of them

    @property
    def is_of_layers(self) -> bool:
        """Whether its name is one that models have for their layers, not for a few Linears in a row."""
        return self.path.rpartition(".")[2] in STACK_NAMES


def stacks_of(names: Iterable[str]) -> dict[str, Stack]:
    """Every stack by path: the outermost number of a name is its layer, and the layers are 0, 1, ... without a gap."""
    found: dict[str, dict[int, dict[str, str]]] = {}
    for full in names:
        match = LAYER.fullmatch(full)
        if match:
            found.setdefault(match["stack"], {}).setdefault(int(match["index"]), {})[match["name"]] = full
    return {
        path: _stack(path, [layers[index] for index in sorted(layers)])
        for path, layers in found.items()
        if max(layers) == len(layers) - 1
    }


def _stack(path: str, layers: list[dict[str, str]]) -> Stack:
    shared = {
        name: full
        for name, full in layers[0].items()
        if FIRST_ONLY.fullmatch(name) and not any(name in layer for layer in layers[1:])
    }
    return Stack(path, ({key: layers[0][key] for key in layers[0] if key not in shared}, *layers[1:]), shared)


def stack_at(wanted: str, names: Iterable[str]) -> Stack:
    """The stack at the path `wanted`, or the only one if that is empty. Raises OpError with those that there are."""
    found = stacks_of(names)
    if wanted in found:
        return found[wanted]
    usual = [stack for stack in found.values() if stack.is_of_layers]
    if len(usual) == 1 and not wanted:
        return usual[0]
    there = ", ".join(f"`{stack.path}` ({len(stack.layers)} layers)" for stack in usual) or "none"
    if wanted:
        raise OpError(Problem(f"there are no layers at `{wanted}`", fix=f"stacks of layers: {there}"))
    if usual:
        raise OpError(Problem("there is more than one stack of layers", fix=f"say which by `stack`: {there}"))
    raise OpError(Problem("there is no stack of layers", fix="name the path of the layers by `stack`"))
