"""What config.json says of the layers of a stack: how many there are, and what each of them is.

Why: a model with other layers is not only renamed tensors. The config counts the layers, and may say of every
single one what it is (its attention, its experts, its number of heads): by a list, by a list of indices, by a
threshold, by a period. The keys are data, those of transformers 5.23.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import cast

from surgery.checkpoint.traits import Trait, traits_of

__all__ = ["LayerConfig", "config_for", "layer_config", "shared_layers"]

PLAIN_COUNTS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers", "depth")
COUNTS = ("encoder_layers", "num_encoder_layers", *PLAIN_COUNTS)
DECODER_COUNTS = ("decoder_layers", "num_decoder_layers")
SIDES = ("encoder", "decoder")
PREDICTING = "num_nextn_predict_layers"  # layers behind the last that guess further tokens; not in the count

WORDS = {"vision": ("vision", "visual"), "audio": ("audio", "speech")}  # of a stack, by the config that is for it

QUANTIZATION = "quantization_config"
SKIPPED = "llm_int8_skip_modules"  # of bitsandbytes: made anew from what is quantized

# Layers that use what another layer holds: none of them can be moved alone.
SHARING_KEYS = ("num_kv_shared_layers", "use_cla", "share_layers")
SHARING_TYPES = ("albert", "zamba", "zamba2", "phi4flash")


def shared_layers(config: Mapping[str, object]) -> str:
    """What in the config says that layers use each other's tensors or caches; empty if nothing does."""
    model_type = config.get("model_type")
    if model_type in SHARING_TYPES:
        return f"model_type {model_type!r}"
    for _, scope in _scopes(config):
        key = next((key for key in SHARING_KEYS if scope.get(key)), None)
        if key:
            return f"{key}: {scope[key]}"
    return ""


@dataclass(frozen=True, slots=True)
class LayerConfig:
    """What a config says of the layers of one stack: how many, and what each is."""

    scope: tuple[str, ...]  # the keys of the part of the config that speaks of this stack
    counts: tuple[str, ...]
    pinned: tuple[str, ...]  # counts of another stack that follow this one unless they are written down
    num_layers: int
    num_predicting: int
    traits: tuple[Trait, ...]

    def layer(self, config: Mapping[str, object], index: int) -> dict[str, object]:
        """What the config says of layer `index`, by key. Raises ValueError where it does not say that."""
        part = _part(config, self.scope)
        return {trait.key: _read(trait, part, index) for trait in self.traits}

    def rewritten(self, config: Mapping[str, object], layers: Sequence[Mapping[str, object]]) -> dict[str, object]:
        """`config` for `layers`, each as `layer` gave it. Raises ValueError for what a key cannot say."""
        part = dict(_part(config, self.scope))
        part |= dict.fromkeys(self.pinned, self.num_layers)
        part |= dict.fromkeys(self.counts, len(layers))
        for trait in self.traits:
            value = trait.write(part, [layer[trait.key] for layer in layers])
            part |= {trait.key: value} if trait.key in part else {}
        return _with_part(config, self.scope, part)


def _read(trait: Trait, config: Mapping[str, object], index: int) -> object:
    try:
        return trait.read(config, index)
    except (LookupError, TypeError, ValueError):  # whatever stands there instead of what transformers writes
        said = f"`{trait.key}: {config.get(trait.key)!r:.100}`"
        raise ValueError(f"config.json says {said}, which does not tell what layer {index} is") from None


def layer_config(config: Mapping[str, object], stack: str, num_layers: int | None = None) -> LayerConfig | None:
    """What `config` says of the layers of `stack`; None if it says nothing.

    `num_layers` is how many there are on disk, if that is known. Raises ValueError where the config disagrees.
    """
    found = [item for item in _configs(config, stack) if num_layers is None or _agrees(item, num_layers)]
    if found:
        return found[0]
    others = [item for item in _configs(config, stack) if item.counts]
    if others:
        said = " and ".join(f"{'.'.join((*item.scope, item.counts[0]))}: {item.num_layers}" for item in others)
        raise ValueError(f"config.json says {said}, but `{stack}` has {num_layers} layers")
    if config and num_layers is not None:
        known = ", ".join((*COUNTS, *DECODER_COUNTS))
        raise ValueError(f"config.json does not say how many layers there are: it has none of {known}")
    return None


def _agrees(item: LayerConfig, num_layers: int) -> bool:
    return num_layers in (item.num_layers, item.num_layers + item.num_predicting)


def _configs(config: Mapping[str, object], stack: str) -> Iterator[LayerConfig]:
    for keys, scope in _scopes(config):
        counts, pinned = _count_keys(scope, stack)
        said = [scope[key] for key in (*counts, *PLAIN_COUNTS) if _is_count(scope.get(key))]
        if counts and said and _speaks_of(keys, stack):
            predicting = scope.get(PREDICTING)
            extra = cast(int, predicting) if _is_count(predicting) else 0
            num_layers = cast(int, said[0])
            yield LayerConfig(keys, counts, pinned, num_layers, extra, traits_of(scope, num_layers))


def _scopes(config: Mapping[str, object]) -> Iterator[tuple[tuple[str, ...], Mapping[str, object]]]:
    """The parts of the config that may speak of a stack, the innermost first."""
    for key, value in config.items():
        if isinstance(value, Mapping) and (key.endswith("_config") or key in SIDES):
            for keys, scope in _scopes(cast("Mapping[str, object]", value)):
                yield (key, *keys), scope
    yield (), config


def _speaks_of(keys: tuple[str, ...], stack: str) -> bool:
    """Whether a part of the config is for `stack`, by the words in both; the root may be for any."""
    for word, others in WORDS.items():
        if keys and any(word in key for key in keys) != any(other in stack for other in others):
            return False
    return all(key in stack.split(".") for key in keys if key in SIDES)


def _count_keys(scope: Mapping[str, object], stack: str) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """The keys that count the layers of `stack`, and those of the other stack that must be written down."""
    decoders = tuple(key for key in DECODER_COUNTS if _is_count(scope.get(key)))
    two = bool(decoders) or scope.get("is_encoder_decoder") is True
    if two and "decoder" in stack.split("."):
        return decoders or DECODER_COUNTS[-1:], ()
    present = [key for key in COUNTS if _is_count(scope.get(key))]
    counts = tuple(key for key in present if scope[key] == scope[present[0]])
    return counts, DECODER_COUNTS[-1:] if two and not decoders else ()


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def config_for(
    config: Mapping[str, object],
    stack: str,
    layers: Sequence[tuple[str, int]],
    others: Mapping[str, Mapping[str, object]],
) -> Mapping[str, object]:
    """`config` when `stack` holds `layers`: the model of each, and its index there.

    `others` are the configs of the models but the source, by name. Raises ValueError for what cannot be said.
    """
    ours = layer_config(config, stack)
    if ours is None:
        return config
    theirs = {name: _in_terms_of(ours, name, other, stack) for name, other in others.items()}
    said = [
        theirs[name].layer(others[name], index) if name in theirs else ours.layer(config, index)
        for name, index in layers
    ]
    places = [None if name in theirs else index for name, index in layers]
    return _with_named_layers(ours.rewritten(config, said), stack, places)


def _in_terms_of(ours: LayerConfig, name: str, config: Mapping[str, object], stack: str) -> LayerConfig:
    """What the config of another model says of its layers, if it does so by the same keys."""
    theirs = layer_config(config, stack)
    if theirs is None and not ours.traits:
        return ours
    if theirs is None:
        keys = ", ".join(trait.key for trait in ours.traits)
        raise ValueError(f"`{name}` has no config.json that says what its layers are ({keys})")
    differing = {(trait.key, type(trait)) for trait in ours.traits} ^ {(item.key, type(item)) for item in theirs.traits}
    if differing:
        keys = ", ".join(sorted({key for key, _ in differing}))
        raise ValueError(f"the source and `{name}` describe their layers by different keys of config.json: {keys}")
    return theirs


def _with_named_layers(config: Mapping[str, object], stack: str, places: Sequence[int | None]) -> dict[str, object]:
    """`config` with the modules that its quantization_config lists under their new names.

    `places` holds, for each new layer, the layer that it was; None for one of another model. Raises ValueError
    for a name that cannot be followed.
    """
    found = config.get(QUANTIZATION)
    renamed = {QUANTIZATION: _renamed(found, stack, places)} if found else {}
    return {**config, **renamed}


def _renamed(value: object, stack: str, places: Sequence[int | None]) -> object:
    if isinstance(value, Mapping):
        entries = cast("Mapping[str, object]", value)
        return {key: item if key == SKIPPED else _renamed(item, stack, places) for key, item in entries.items()}
    if isinstance(value, list):
        items = cast("list[object]", value)
        return [new for item in items for new in _named_anew(item, stack, places)]
    return value


def _named_anew(item: object, stack: str, places: Sequence[int | None]) -> list[object]:
    if not isinstance(item, str):
        return [_renamed(item, stack, places)]
    last = re.escape(stack.rpartition(".")[2])
    match = re.fullmatch(rf"(?P<stack>(?:[\w.]*\.)?{last})\.(?P<index>\d+)(?P<rest>\..*)?", item)
    if match and _is_suffix(match["stack"], stack):
        old = int(match["index"])
        return [f"{match['stack']}.{new}{match['rest'] or ''}" for new, place in enumerate(places) if place == old]
    if re.search(rf"(^|\W){last}\\*\.[\[(]*\d", item) and not match:
        raise ValueError(f"config.json's {QUANTIZATION} names layers by `{item}`, which cannot be followed")
    return [item]


def _is_suffix(a: str, b: str) -> bool:
    """Whether two paths are one with and without what stands before: transformers writes both."""
    return f".{a}".endswith(f".{b}") or f".{b}".endswith(f".{a}")


def _part(config: Mapping[str, object], scope: tuple[str, ...]) -> Mapping[str, object]:
    for key in scope:
        config = cast("Mapping[str, object]", config[key])
    return config


def _with_part(config: Mapping[str, object], scope: tuple[str, ...], part: Mapping[str, object]) -> dict[str, object]:
    if not scope:
        return dict(part)
    inner = cast("Mapping[str, object]", config[scope[0]])
    return {**config, scope[0]: _with_part(inner, scope[1:], part)}
