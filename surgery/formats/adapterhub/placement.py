"""Which Linears the `adapters` library adapts, and as what: a table of data, one row for each architecture.

Why: PEFT names the modules that it adapts one by one; AdapterHub's config only says `attn_matrices`,
`intermediate_lora`, `output_lora` and which layers are left out, and the model's class decides where
that is. So an adapter can be said in both only if it covers whole layers, and which modules those
are must be known. In Llama and Mistral the library calls `down_proj` intermediate and `up_proj` output.

ModernBERT is left out: adapters 1.3.0 gives its Wqkv a bias of random numbers, so that no adapter of
its is known to compute anything.

Source: adapters 1.3.0, `adapters/models/*/mixin_*.py` and `adapters/wrappers/interfaces.py`.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from surgery.errors import OpError, Problem

__all__ = ["ATTENTION", "FUSED", "Coverage", "Place", "Placement", "Stack", "coverage", "place_all", "placements_of"]

ATTENTION = ("q", "k", "v")
FUSED = "qkv"


@dataclass(frozen=True, slots=True)
class Stack:
    """Layers that are alike: `<layers>.<N>.<path>` is a Linear that the library adapts, for each path of `slots`."""

    layers: str
    num_layers: tuple[str, ...]  # where config.json says how many; the first key that holds a number
    slots: Mapping[str, str]  # path in the layer → q, k, v, qkv (in one matrix), intermediate, output
    # down → up, where down reads up's output times a gate: scaling the one is scaling the other
    gated: Mapping[str, str] = field(default_factory=dict[str, str])
    # PEFT targets that are not the last part of the path; "" where every suffix matches other modules too
    targets: Mapping[str, str] = field(default_factory=dict[str, str])

    def target(self, path: str) -> str:
        """The shortest PEFT target that matches `path` in every layer and nothing else; "" if there is none."""
        return self.targets.get(path, path.rpartition(".")[2])


@dataclass(frozen=True, slots=True)
class Placement:
    """What the library adapts in one family of `model_type`s. Layers are counted through all stacks."""

    model_types: tuple[str, ...]
    prefix: str  # the base model inside a model with a head
    stacks: tuple[Stack, ...]
    conv1d: bool = False  # weights are stored [in, out]
    bare: bool = False  # transformers' own models with a head have no `prefix`
    feedforward: str = ""  # regex: the `feed_forward_proj` of config.json that this row is for

    def find(self, path: str) -> Place | None:
        """Where the module at `path` is; None if the library does not adapt it."""
        inner = path.removeprefix(f"{self.prefix}.")
        for index, stack in enumerate(self.stacks):
            match = re.fullmatch(rf"{re.escape(stack.layers)}\.(\d+)\.(.+)", inner)
            if match and match[2] in stack.slots:
                return Place(path, index, stack, int(match[1]), match[2])
        return None


@dataclass(frozen=True, slots=True)
class Place:
    """A module that the library adapts: layer `layer` of stack number `index`, at `inner` in the layer."""

    path: str
    index: int
    stack: Stack
    layer: int
    inner: str

    @property
    def slot(self) -> str:
        """What the library takes it for."""
        return self.stack.slots[self.inner]

    def sibling(self, inner: str) -> str:
        """The full path of another module of the same layer."""
        return self.path.removesuffix(self.inner) + inner


@dataclass(frozen=True, slots=True)
class Coverage:
    """Whole layers, as AdapterHub's config says them."""

    slots: frozenset[str]
    leave_out: tuple[int, ...]


_DECODER = {f"self_attn.{slot}_proj": slot for slot in ATTENTION}
_BERT = {"attention.self.query": "q", "attention.self.key": "k", "attention.self.value": "v"}
_DENSE = {"intermediate.dense": "intermediate", "output.dense": "output"}
_DENSE_TARGETS = {"intermediate.dense": "intermediate.dense", "output.dense": ""}  # attention.output.dense is another
_GATED = {"mlp.down_proj": "mlp.up_proj"}


def _t5_stack(stack: str, keys: tuple[str, ...], attentions: Mapping[str, str], up: str) -> Stack:
    feedforward = f"layer.{len(attentions)}.DenseReluDense"
    slots = {f"{name}.{slot}": slot for name in attentions.values() for slot in ATTENTION}
    gated = {f"{feedforward}.wo": f"{feedforward}.wi_1"} if up == "wi_1" else {}
    slots |= {f"{feedforward}.{up}": "intermediate", f"{feedforward}.wo": "output"}
    return Stack(f"{stack}.block", keys, slots, gated)


def _t5(up: str) -> Placement:
    attention = {"self": "layer.0.SelfAttention"}
    stacks = (
        _t5_stack("encoder", ("num_layers",), attention, up),
        _t5_stack(
            "decoder", ("num_decoder_layers", "num_layers"), {**attention, "cross": "layer.1.EncDecAttention"}, up
        ),
    )
    feedforward = "gated-.*" if up == "wi_1" else "(?!gated-).*"
    return Placement(("t5", "mt5"), "transformer", stacks, bare=True, feedforward=feedforward)


def _bart_stack(stack: str, *attentions: str) -> Stack:
    slots = {f"{name}.{slot}_proj": slot for name in attentions for slot in ATTENTION}
    return Stack(f"{stack}.layers", (f"{stack}_layers",), {**slots, "fc1": "intermediate", "fc2": "output"})


TABLE = (
    Placement(
        ("llama", "mistral"), "model",
        (Stack(
            "layers", ("num_hidden_layers",),
            {**_DECODER, "mlp.down_proj": "intermediate", "mlp.up_proj": "output"}, _GATED,
        ),),
    ),
    Placement(
        ("qwen2", "qwen3", "gemma2", "gemma3_text"), "model",
        (Stack(
            "layers", ("num_hidden_layers",),
            {**_DECODER, "mlp.up_proj": "intermediate", "mlp.down_proj": "output"}, _GATED,
        ),),
    ),
    Placement(
        ("phi",), "model",
        (Stack("layers", ("num_hidden_layers",), {**_DECODER, "mlp.fc1": "intermediate", "mlp.fc2": "output"}),),
    ),
    Placement(
        ("gpt2",), "transformer",
        (Stack(
            "h", ("n_layer", "num_hidden_layers"),
            {"attn.c_attn": FUSED, "mlp.c_fc": "intermediate", "mlp.c_proj": "output"},
            targets={"mlp.c_proj": "mlp.c_proj"},
        ),),
        conv1d=True,
    ),
    Placement(
        ("gptj",), "transformer",
        (Stack(
            "h", ("n_layer", "num_hidden_layers"),
            {**{f"attn.{slot}_proj": slot for slot in ATTENTION}, "mlp.fc_in": "intermediate", "mlp.fc_out": "output"},
        ),),
    ),
    *(
        Placement(
            types, prefix,
            (Stack("encoder.layer", ("num_hidden_layers",), {**_BERT, **_DENSE}, targets=_DENSE_TARGETS),),
        )
        for types, prefix in (
            (("bert",), "bert"),
            (("roberta", "xlm-roberta"), "roberta"),
            (("electra",), "electra"),
        )
    ),
    Placement(
        ("deberta-v2",), "deberta",
        (Stack(
            "encoder.layer", ("num_hidden_layers",),
            {**{f"{path}_proj": slot for path, slot in _BERT.items()}, **_DENSE}, targets=_DENSE_TARGETS,
        ),),
    ),
    Placement(
        ("distilbert",), "distilbert",
        (Stack(
            "transformer.layer", ("n_layers", "num_hidden_layers"),
            {**{f"attention.{slot}_lin": slot for slot in ATTENTION}, "ffn.lin1": "intermediate", "ffn.lin2": "output"},
        ),),
    ),
    _t5("wi"),
    _t5("wi_1"),
    Placement(
        ("bart", "mbart", "plbart"), "model",
        (_bart_stack("encoder", "self_attn"), _bart_stack("decoder", "self_attn", "encoder_attn")),
    ),
)  # fmt: skip


def placements_of(config: Mapping[str, object]) -> list[Placement]:
    """The rows for `model_type` of `config`, a config.json or AdapterHub's own. Raises OpError if there is none."""
    model_type, feedforward = config.get("model_type"), config.get("feed_forward_proj")
    rows = [row for row in TABLE if model_type in row.model_types]
    if not rows:
        known = ", ".join(dict.fromkeys(name for row in TABLE for name in row.model_types))
        what = f"where the adapters library places LoRA in `{model_type}` is not known"
        raise OpError(Problem(what, fix=f"convert adapters of {known}"))
    fitting = [row for row in rows if isinstance(feedforward, str) and re.fullmatch(row.feedforward, feedforward)]
    return fitting or rows


def place_all(paths: Iterable[str], config: Mapping[str, object]) -> tuple[Placement, list[Place]]:
    """Every module of `paths` in the row that holds them all. Raises OpError for one that no row holds."""
    paths = list(paths)
    rows = placements_of(config)
    row = max(rows, key=lambda row: sum(row.find(path) is not None for path in paths))
    places = [(path, row.find(path)) for path in paths]
    stray = [path for path, place in places if place is None]
    if stray:
        more = f" (and {len(stray) - 1} more modules)" if len(stray) > 1 else ""
        what = f"`{stray[0]}`{more} is adapted, which the adapters library never does in `{config['model_type']}`"
        inner = sorted({path for stack in row.stacks for path in stack.slots})
        raise OpError(Problem(what, fix=f"it knows {', '.join(inner)}"))
    return row, [place for _, place in places if place is not None]


def coverage(row: Placement, places: Sequence[Place], config: Mapping[str, object]) -> Coverage:
    """What `places` cover in the model that `config` describes.

    Raises OpError if a layer has some of what other layers have: AdapterHub adapts the same in all
    layers but those left out.
    """
    slots = frozenset(place.slot for place in places)
    had: dict[tuple[int, int], set[str]] = {}
    for place in places:
        had.setdefault((place.index, place.layer), set()).add(place.inner)
    leave_out: list[int] = []
    first = 0
    for index, stack in enumerate(row.stacks):
        num_layers = _num_layers(stack, config)
        wanted = {inner for inner, slot in stack.slots.items() if slot in slots}
        for layer in range(num_layers):
            if not (found := had.pop((index, layer), set())):
                leave_out.append(first + layer)
            elif missing := sorted(wanted - found):
                raise _partial(f"{stack.layers}.{layer}", missing[0], min(found))
        first += num_layers
    if had:
        _, layer = min(had)
        raise OpError(Problem(f"layer {layer} is adapted, but the base has {first} layers", fix="name the right base"))
    return Coverage(slots, tuple(leave_out))


def _partial(layer: str, missing: str, found: str) -> OpError:
    what = (
        f"`{layer}.{found}` is adapted and `{layer}.{missing}` is not, though its like is elsewhere: "
        "AdapterHub's config leaves out whole layers only"
    )
    return OpError(Problem(what))


def _num_layers(stack: Stack, config: Mapping[str, object]) -> int:
    values = [config.get(key) for key in stack.num_layers]
    number = next((value for value in values if isinstance(value, int)), None)
    if number is None:
        what = f"the base's config.json does not say `{stack.num_layers[0]}`, how many layers it has"
        raise OpError(Problem(what, fix="name the checkpoint that the adapter was trained on as `base`"))
    return number
