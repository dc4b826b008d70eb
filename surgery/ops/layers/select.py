"""`layers.select`.

Why one op: keeping, dropping, repeating and interleaving layers are all a list of layers of models, in the order
in which they will stand; `keep` and `drop` are short for such a list.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import ClassVar, Literal, cast

from surgery.checkpoint.architecture import Kind
from surgery.checkpoint.layer_config import LayerConfig, config_for, layer_config, shared_layers
from surgery.checkpoint.layers import Stack, stack_at, stacks_of
from surgery.checkpoint.modules import modules_of
from surgery.errors import OpError, Problem
from surgery.formats.bitsandbytes import is_bitsandbytes, patch_config
from surgery.graph import Node
from surgery.numerics.scale import Scale
from surgery.op import SOURCE, Finished, Model, Op, Rewrite, Scene, doc
from surgery.regexes import Limit, Regex, flaw, matching
from surgery.types import TensorType

Indices = list[int | list[int]]

MOST_LAYERS = 10_000  # a range beyond it is a slip
_RANGE = {
    "type": "array",
    "items": {"type": "integer"},
    "minItems": 2,
    "maxItems": 2,
    "description": "A range of layers: [first, one past the last].",
}
_INDICES = {
    "type": "array",
    "minItems": 1,
    "items": {
        "anyOf": [{"type": "integer"}, _RANGE],
        "description": "A layer, -1 the last; or a range [first, one past the last].",
    },
}
_SLICES = {
    "type": "array",
    "minItems": 1,
    "items": {
        "type": "object",
        "description": "Layers of one model, in order.",
        "required": ["layers"],
        "additionalProperties": False,
        "properties": {
            "model": {"type": "string", "default": SOURCE, "description": "A name under `models`, or `source`."},
            "layers": _RANGE,
            "scale": {
                "type": "object",
                "minProperties": 1,
                "description": "Factors by regex, matched in full against tensor names in the model; the first counts.",
                "additionalProperties": {"type": "number"},
            },
        },
    },
}

# Two models whose layers compute the same from the same tensors agree in these.
ALIKE = (
    "model_type", "num_attention_heads", "n_head", "num_heads", "num_key_value_heads", "head_dim", "hidden_act",
    "activation_function", "num_experts_per_tok",
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Layer:
    """One layer of the result: which of whose layers it is, and by what its tensors are multiplied."""

    model: str
    index: int
    scales: tuple[tuple[str, float], ...] = ()


@dataclass(frozen=True, slots=True)
class Select(Op):
    """Layers kept, dropped, repeated, or taken from several models (mergekit's slices and passthrough).

    Exactly one of `keep`, `drop` and `slices`. A range is [first, one past the last], as mergekit's layer_range is:
    `keep: [[0, 24]]` keeps layers 0 to 23, while `keep: [0, 24]` keeps two layers. In `slices` the order is that
    of the result, and a layer may come more than once.

    Reads    the layers of the source after the edits before, and of other models as they are on disk
    Writes   the same tensors under their new numbers; whatever is outside the layers is the source's, but with
             `head: NAME` the final norm and the output head are that model's
             config.json  the layer count, and what it says of single layers: lists (`layer_types`), lists of
             indices (`mlp_only_layers`), thresholds (`first_k_dense_replace`); names in quantization_config
    Error    none; with `scale`, one rounding to the tensor's dtype
    Mind     T5's relative attention bias lies in the first layer for all of them: it stays in the first layer, and
             is the source's. What the config says of all layers at once (rope_theta, norm eps) is the source's.
             Layers of multi-token prediction behind the last layer stay behind the last.
    Raises   OpError for a layer that is not there; layers of two models that differ in tensors, types, model_type or
             heads; an adapter; a model whose layers share tensors or caches (ALBERT, Gemma 3n, Zamba); a config
             that tells layers apart by a period (Jamba, Gemma 2 without `layer_types`) which the new order breaks
    Source   mergekit 0.1.5, `merge_method: passthrough`
    """

    selects: ClassVar[Literal["modules", "tensors", "checkpoint"]] = "checkpoint"

    keep: Indices | None = field(
        default=None,
        metadata=doc(
            "The layers that stay, in ascending order: indices (-1 is the last) and ranges [first, one past the last].",
            schema=_INDICES,
            examples=([[0, 24], -1],),
        ),
    )
    drop: Indices | None = field(
        default=None, metadata=doc("The layers that go, written as in `keep`.", schema=_INDICES, examples=([[20, 28]],))
    )
    slices: list[dict[str, object]] | None = field(
        default=None,
        metadata=doc(
            "The layers of the result, in its order: `layers: [first, one past the last]` of a `model` "
            "(default `source`), with `scale: {regex: factor}` for its tensors.",
            schema=_SLICES,
            examples=([{"layers": [0, 16]}, {"model": "math", "layers": [8, 24]}],),
        ),
    )
    stack: str = field(
        default="",
        metadata=doc(
            "The path of the layers (`encoder.block`); needed where there is more than one stack of them.",
            examples=("encoder.block",),
        ),
    )
    head: str = field(
        default=SOURCE,
        metadata=doc("The model whose final norm and output head follow the layers.", examples=("math",)),
    )

    def check(self, patterns: tuple[re.Pattern[str], ...]) -> str:
        """Exactly one way to say it, ranges that are ranges, and regexes that are regexes."""
        given = [f"`{key}`" for key in ("keep", "drop", "slices") if getattr(self, key) is not None]
        if len(given) > 1:
            return f"{' and '.join(given)} exclude each other"
        if not given:
            return "one of `keep`, `drop` and `slices` is missing"
        ranges = [item for item in (*(self.keep or ()), *(self.drop or ())) if isinstance(item, list)]
        for first, stop in [*ranges, *(_range(piece) for piece in self.slices or ())]:
            if stop > MOST_LAYERS:
                return f"[{first}, {stop}] is no range of layers: no model has {stop}"
            if not 0 <= first < stop:
                return f"[{first}, {stop}] is no range: it goes from the first layer to one past the last"
        broken = (_broken(regex) for piece in self.slices or () for regex in _scales(piece))
        return next(filter(None, broken), "")

    def model_names(self) -> Iterable[str]:
        """Those of the slices, and the head's."""
        return dict.fromkeys([*(_model(piece) for piece in self.slices or ()), self.head])

    def rewrite_all(self, scene: Scene) -> Rewrite:
        """Every layer under its new number; layers of the source that are in none are dropped."""
        return _Selection(self, scene).rewrite()

    def config(self, config: Mapping[str, object], finished: Finished) -> Mapping[str, object]:
        """The layers as config.json counts and describes them."""
        found = _stack_path(self.stack, finished)
        settings = layer_config(config, found)
        if settings is None:
            return config
        layers = self.layers(settings.num_layers)
        config = _patched(config, found, layers, finished.models)
        return patch_config(config, finished, {}) if is_bitsandbytes(config) else config

    def layers(self, num_layers: int) -> list[Layer]:
        """The layers of the result, if the source has `num_layers`. Raises OpError for one that is not there."""
        if self.slices is not None:
            return [layer for piece in self.slices for layer in _layers_of_slice(piece)]
        listed = list(_listed(self.keep or self.drop or [], num_layers))
        if self.drop is not None:
            dropped = set(listed)
            listed = [index for index in range(num_layers) if index not in dropped]
        if not listed:
            raise OpError(Problem("no layer is left", fix="drop fewer"))
        return [Layer(SOURCE, index) for index in listed]


def _broken(regex: str) -> str:
    reason = flaw(regex)
    return f"`{regex}` is no regex: {reason}" if reason else ""


def _model(piece: Mapping[str, object]) -> str:
    return str(piece.get("model", SOURCE))


def _range(piece: Mapping[str, object]) -> tuple[int, int]:
    first, stop = cast("list[int]", piece["layers"])
    return first, stop


def _scales(piece: Mapping[str, object]) -> Mapping[str, float]:
    return cast("Mapping[str, float]", piece.get("scale", {}))


def _layers_of_slice(piece: Mapping[str, object]) -> Iterator[Layer]:
    scales = tuple(_scales(piece).items())
    return (Layer(_model(piece), index, scales) for index in range(*_range(piece)))


def _listed(items: Indices, num_layers: int) -> Iterator[int]:
    """Indices in ascending order, each once."""
    last = -1
    for item in items:
        for index in range(*item) if isinstance(item, list) else (item,):
            found = index + num_layers if index < 0 else index
            if not 0 <= found < num_layers:
                raise OpError(Problem(f"there is no layer {index}: the source has {num_layers}, 0 to {num_layers - 1}"))
            if found <= last:
                what = f"layer {index} does not come after layer {last}"
                raise OpError(Problem(what, fix="list layers once and in order; `slices` repeats and reorders them"))
            last = found
            yield found


def _stack_path(wanted: str, finished: Finished) -> str:
    """The path of the stack, found again in the finished checkpoint, or in the source if it was renamed since."""
    for names in (finished.nodes, finished.models[SOURCE].nodes):
        found = [path for path, stack in stacks_of(names).items() if stack.is_of_layers]
        if wanted or len(found) == 1:
            return wanted or found[0]
    raise OpError(Problem("which layers config.json counts is not clear", fix="say it by `stack`"))


def _patched(
    config: Mapping[str, object], stack: str, layers: Sequence[Layer], models: Mapping[str, Model]
) -> Mapping[str, object]:
    """config.json for `layers`. Raises OpError for what it cannot say."""
    others = {name: models[name].config for name in {layer.model for layer in layers} - {SOURCE}}
    try:
        return config_for(config, stack, [(layer.model, layer.index) for layer in layers], others)
    except ValueError as error:
        raise OpError(Problem(str(error), fix="choose layers that config.json can describe")) from None


class _Selection:
    """One application of the op: what the scene holds, checked, and the names that come of it."""

    def __init__(self, op: Select, scene: Scene) -> None:
        self.op = op
        self.scene = scene
        self._limit = Limit(" of `scale`")
        self._regexes: dict[str, Regex] = {}
        self._refuse_adapters()
        self._refuse_sharing()
        self.stack = stack_at(op.stack, scene.names)
        self.num_layers, self.settings = self._counted()
        self.layers = op.layers(self.num_layers)
        self.stacks = {name: self._stack_of(name) for name in dict.fromkeys(layer.model for layer in self.layers)}

    def rewrite(self) -> Rewrite:
        """The names, after all checks."""
        for name, stack in self.stacks.items():
            self._check_alike(name, stack)
        if self.settings:
            _patched(self.scene.config, self.stack.path, self.layers, self.scene.models)
        gives = {f"{self.stack.path}.0.{name}": self.scene.names[full] for name, full in self.stack.shared.items()}
        for index, layer in enumerate(self.layers):
            gives |= self._layer(index, layer)
        for offset, layer in enumerate(self.stack.layers[self.num_layers :]):
            prefix = f"{self.stack.path}.{len(self.layers) + offset}"
            gives |= {f"{prefix}.{name}": self.scene.names[full] for name, full in layer.items()}
        self._check_scales()
        head = self._head()
        taken = {*head, *(name for layer in (self.stack.shared, *self.stack.layers) for name in layer.values())}
        takes = tuple(name for name in self.scene.names if name in taken)
        return Rewrite(takes, {**gives, **head}, drops=(*self._dropped(), *head))

    def _refuse_adapters(self) -> None:
        for name in (SOURCE, *self.op.model_names()):
            if self.scene.models[name].checkpoint.is_adapter:
                fix = "fold it into its base first, and select from the result"
                raise OpError(Problem(f"`{name}` is an adapter: it has no layers of its own", fix=fix))

    def _refuse_sharing(self) -> None:
        shared = shared_layers(self.scene.config)
        if shared:
            what = f"the layers of this model use each other's tensors or caches ({shared}): none can be moved alone"
            raise OpError(Problem(what))

    def _counted(self) -> tuple[int, LayerConfig | None]:
        """The layers, and what the config says of them if no edit before has changed them."""
        held = len(self.stack.layers)
        on_disk = stacks_of(self.scene.models[SOURCE].nodes).get(self.stack.path, self.stack)
        try:
            settings = layer_config(self.scene.config, self.stack.path, len(on_disk.layers))
        except ValueError as error:
            raise OpError(Problem(str(error), fix="mend config.json, or name another `stack`")) from None
        if settings is None or len(on_disk.layers) == held:
            return (settings.num_layers if settings else held), settings
        return held - (len(on_disk.layers) - settings.num_layers), None

    def _stack_of(self, name: str) -> Stack:
        if name == SOURCE:
            return self.stack
        found = stacks_of(self.scene.models[name].nodes).get(self.stack.path)
        if found is None:
            raise OpError(Problem(f"`{name}` has no layers at `{self.stack.path}`, where the source has them"))
        return found

    def _nodes(self, name: str) -> Mapping[str, Node]:
        return self.scene.names if name == SOURCE else self.scene.models[name].nodes

    def _types(self, name: str, layer: Mapping[str, str]) -> dict[str, TensorType]:
        nodes = self._nodes(name)
        return {inner: nodes[full].type for inner, full in layer.items()}

    def _check_alike(self, name: str, stack: Stack) -> None:
        """Every layer that is asked for is there, and is like one of the source's."""
        for index in sorted({layer.index for layer in self.layers if layer.model == name}):
            if index >= (self.num_layers if name == SOURCE else len(stack.layers)):
                count = self.num_layers if name == SOURCE else len(stack.layers)
                raise OpError(Problem(f"there is no layer {index}: `{name}` has {count}, 0 to {count - 1}"))
            if name != SOURCE:
                self._check_layer(name, index, self._types(name, stack.layers[index]))
        if name != SOURCE:
            self._check_configs(name)

    def _check_layer(self, name: str, index: int, types: Mapping[str, TensorType]) -> None:
        ours = [self._types(SOURCE, layer) for layer in self.stack.layers[: self.num_layers]]
        if types not in ours:
            nearest = min(ours, key=lambda layer: len(layer.items() ^ types.items()))
            raise OpError(Problem(f"layer {index} of `{name}` is unlike every layer of the source: "
                                  f"{_difference(types, nearest)}", fix="take layers of models of one architecture "
                                  "and dtype (`tensor.cast` mends a dtype of the source)"))  # fmt: skip

    def _check_configs(self, name: str) -> None:
        """Heads and activations are in no tensor's type."""
        scope = self.settings.scope if self.settings else ()
        ours, theirs = (_inner(config, scope) for config in (self.scene.config, self.scene.models[name].config))
        for key in ALIKE:
            a, b = ours.get(key), theirs.get(key)
            if ours and theirs and a != b and not isinstance(a, list):
                what = f"the layers of `{name}` compute otherwise: its config.json says {key}: {b}, the source's {a}"
                raise OpError(Problem(what, fix="take layers of models of one architecture"))

    def _layer(self, index: int, layer: Layer) -> dict[str, Node]:
        nodes, tensors = self._nodes(layer.model), self.stacks[layer.model].layers[layer.index]
        return {
            f"{self.stack.path}.{index}.{name}": self._scaled(full, nodes[full], layer.scales)
            for name, full in tensors.items()
        }

    def _scaled(self, name: str, node: Node, scales: tuple[tuple[str, float], ...]) -> Node:
        factor = next((factor for regex, factor in scales if self._regex(regex).fullmatch(name)), 1)
        if factor == 1:
            return node
        try:
            return self.scene.graph.apply(Scale(float(factor)), node)[0]
        except ValueError as error:
            raise OpError(Problem(f"`{name}` cannot be scaled: {error}", fix="narrow the regex of `scale`")) from None

    def _regex(self, pattern: str) -> Regex:
        if pattern not in self._regexes:
            self._regexes[pattern] = Regex(pattern, self._limit)
        return self._regexes[pattern]

    def _check_scales(self) -> None:
        """No regex without a tensor: its factor would be lost."""
        for piece in self.op.slices or ():
            layers = [self.stacks[_model(piece)].layers[index] for index in range(*_range(piece))]
            names = [full for layer in layers for full in layer.values()]
            for regex in _scales(piece):
                if not matching(regex, names):
                    what = f"`{regex}` of `scale` matches no tensor of these layers"
                    raise OpError(Problem(what, fix=f"it is matched in full against names such as `{names[0]}`"))

    def _head(self) -> dict[str, Node]:
        """What follows the layers, where another model gives it: all outside of them but the embeddings."""
        if self.op.head == SOURCE:
            return {}
        model = self.scene.models[self.op.head]
        theirs, ours = _outside(model.nodes, model), _outside(self.scene.names, self.scene.models[SOURCE])
        types = [{name: nodes[name].type for name in names}
                 for names, nodes in ((theirs, model.nodes), (ours, self.scene.names))]  # fmt: skip
        if types[0] != types[1]:
            what = f"norm and head of `{model.name}` are unlike the source's: {_difference(*types)}"
            raise OpError(Problem(what, fix="leave `head` out"))
        return {name: model.nodes[name] for name in ours}

    def _dropped(self) -> Iterator[str]:
        used = {layer.index for layer in self.layers if layer.model == SOURCE}
        for index, layer in enumerate(self.stack.layers[: self.num_layers]):
            if index not in used:
                yield from layer.values()


def _outside(nodes: Mapping[str, Node], model: Model) -> list[str]:
    stacks = [stack for stack in stacks_of(nodes).values() if stack.is_of_layers]
    inside = {full for stack in stacks for layer in (stack.shared, *stack.layers) for full in layer.values()}
    modules = modules_of({name: node.type for name, node in nodes.items()}, model.architecture)
    return [
        name
        for module in modules.values()
        for name in module.tensors
        if name not in inside and module.kind is not Kind.EMBEDDING
    ]


def _inner(config: Mapping[str, object], scope: tuple[str, ...]) -> Mapping[str, object]:
    for key in scope:
        inner = config.get(key)
        config = cast("Mapping[str, object]", inner) if isinstance(inner, Mapping) else {}
    return config


def _difference(theirs: Mapping[str, TensorType], ours: Mapping[str, TensorType]) -> str:
    """The first thing in which two sets of typed names differ."""
    for name, type_ in theirs.items():
        if name not in ours:
            return f"the source has no `{name}`"
        if ours[name] != type_:
            return f"`{name}` is {type_}, the source's {ours[name]}"
    return f"it has no `{next(name for name in ours if name not in theirs)}`"
