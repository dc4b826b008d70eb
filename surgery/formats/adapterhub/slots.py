"""Where the `adapters` library puts bottlenecks: a table of data, two slots for the layers of each stack.

Why: AdapterHub's config says `mh_adapter` and `output_adapter`, and the model's class decides what these are: under
which name the tensors lie, which module gives the sublayer's output h, and where the residual x can be seen. Both the
ops, which write tensors by name, and the runtime, which computes, read it here.

Left out: Gemma, whose norms the library takes from the last layer for all of them; ALBERT, whose layers are one;
models whose dropout no module does (BART); models that add attention and feed-forward at once (GPT-J, Phi).

Source: adapters 1.3.0, `adapters/models/*/mixin_*.py`, `modeling_*.py`, `adapters/wrappers/interfaces.py`.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from surgery.errors import OpError, Problem

__all__ = ["Family", "Slot", "Stack", "family_of", "layers_of"]


@dataclass(frozen=True, slots=True)
class Slot:
    """One place in a layer. Paths are within the layer, and "" is the layer itself."""

    path: str  # tensors lie under `<layer>.<path>.adapters.<name>`
    output: str  # the module that gives h, alone or first of a tuple
    residual: str  # the module that is called with x
    argument: tuple[int, str] = (0, "hidden_states")  # as which of its arguments
    norm: str = ""  # of models that normalise h + x: the LayerNorm


@dataclass(frozen=True, slots=True)
class Stack:
    """Layers that are alike, `<layers>.<N>`."""

    layers: str
    attention: Slot
    output: Slot


@dataclass(frozen=True, slots=True)
class Family:
    """One family of `model_type`s. The library counts layers through all stacks."""

    model_types: tuple[str, ...]
    prefix: str  # the base model inside a model with a head; "" where such a model has none
    stacks: tuple[Stack, ...]

    def bare(self, path: str) -> str:
        """`path` as it is in the base model."""
        return path.removeprefix(f"{self.prefix}.") if self.prefix else path


def _post_norm(prefix: str, *model_types: str) -> Family:
    def slot(path: str) -> Slot:
        return Slot(path, f"{path}.dropout", path, (1, "input_tensor"), f"{path}.LayerNorm")

    return Family(model_types, prefix, (Stack("encoder.layer", slot("attention.output"), slot("output")),))


def _t5_stack(stack: str, feedforward: int) -> Stack:
    def slot(index: int) -> Slot:
        return Slot(f"layer.{index}", f"layer.{index}.dropout", f"layer.{index}.layer_norm")

    return Stack(f"{stack}.block", slot(0), slot(feedforward))


TABLE = (
    Family(
        ("llama", "mistral", "qwen2", "qwen3"), "model",
        (Stack(
            "layers",
            Slot("attention_adapters", "self_attn", "input_layernorm"),
            Slot("output_adapters", "mlp", "post_attention_layernorm"),
        ),),
    ),
    Family(
        ("gpt2",), "transformer",
        (Stack("h", Slot("attention_adapters", "attn", "ln_1"), Slot("output_adapters", "mlp", "ln_2")),),
    ),
    _post_norm("bert", "bert"),
    _post_norm("roberta", "roberta", "xlm-roberta"),
    _post_norm("electra", "electra"),
    _post_norm("deberta", "deberta-v2"),
    Family(
        ("distilbert",), "distilbert",
        (Stack(
            "transformer.layer",
            Slot("attention_adapters", "attention", "", norm="sa_layer_norm"),
            Slot("output_adapters", "ffn", "ffn", norm="output_layer_norm"),
        ),),
    ),
    Family(("t5", "mt5"), "", (_t5_stack("encoder", 1), _t5_stack("decoder", 2))),
)  # fmt: skip


def family_of(model_type: object) -> Family:
    """The row for `model_type`. Raises OpError if there is none."""
    found = next((row for row in TABLE if model_type in row.model_types), None)
    if found is not None:
        return found
    known = ", ".join(name for row in TABLE for name in row.model_types)
    fix = f"it is for {known}; adapters at single Linears, named by `modules`, go with any model"
    raise OpError(Problem(f"where the adapters library puts bottlenecks in `{model_type}` is not known", fix=fix))


def layers_of(family: Family, paths: Iterable[str]) -> Mapping[str, tuple[int, Stack]]:
    """The layers that hold any of the modules `paths`, by path, with their number through all stacks, and their stack.

    Raises OpError if a layer is missing between others.
    """
    prefix = rf"(?:{re.escape(family.prefix)}\.)?" if family.prefix else ""
    paths = list(paths)
    found: dict[str, tuple[int, Stack]] = {}
    for stack in family.stacks:
        key = re.compile(rf"(?P<layer>{prefix}{re.escape(stack.layers)}\.(?P<index>\d+))\..+")
        matches = [match for path in paths if (match := key.fullmatch(path))]
        layers = dict(sorted((int(match["index"]), match["layer"]) for match in matches))
        if list(layers) != list(range(len(layers))):
            raise OpError(
                Problem(f"some layers of `{stack.layers}` are missing: there are {', '.join(map(str, layers))}")
            )
        first = len(found)
        found |= {layer: (first + index, stack) for index, layer in layers.items()}
    return found
