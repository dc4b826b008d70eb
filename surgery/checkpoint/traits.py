"""What config.json says of each single layer, key by key, in the ways that transformers 5.23 writes it.

A trait reads what its key says of layer i, and writes the key anew for another choice of layers. Where a key
cannot say it (a period, a threshold), `write` raises ValueError: a layer would be taken for what it is not.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import cast

__all__ = ["Trait", "traits_of"]

Config = Mapping[str, object]

# Lists with an entry for each layer. So is every other list of that length whose key says `layer`.
LISTS = (
    "layer_types", "mlp_layer_types", "layers_block_type", "no_rope_layers", "attention_layers", "attn_type_list",
    "num_attention_heads", "num_key_value_heads", "num_query_heads", "ffn_multipliers", "intermediate_size",
    "activation_sparsity_pattern", "block_configs",
)  # fmt: skip

# Lists of layers that are different from the others.
INDICES = (
    "mlp_only_layers", "full_attn_idxs", "attn_layer_indices", "cross_attention_layers", "hybrid_layer_ids",
    "moe_layers", "local_layer_ids", "fullatt_block_indexes", "window_block_indices", "global_attn_indexes",
    "ple_layer_ids",
)  # fmt: skip

# Layers below this index are one thing, the others another; a list with the second key has the last word.
THRESHOLDS = {
    "first_k_dense_replace": "mlp_layer_types",
    "num_dense_layers": "mlp_layer_types",
    "moe_layer_start_index": "mlp_layer_types",
    "max_window_layers": "layer_types",
}

# Every n-th layer, counted with this shift (or from the layer that a key names); a list has the last word.
PERIODS: dict[str, tuple[int | str, str]] = {
    "decoder_sparse_step": (1, "mlp_layer_types"),
    "moe_layer_freq": (0, "mlp_layer_types"),
    "moe_layer_interval": (1, "mlp_layer_types"),
    "interleave_moe_layer_step": (1, "moe_layers"),
    "no_rope_layer_interval": (1, "no_rope_layers"),
    "sliding_window_pattern": (1, "layer_types"),
    "_sliding_window_pattern": (1, "layer_types"),
    "full_attention_interval": (1, "layer_types"),
    "global_attn_every_n_layers": (0, "layer_types"),
    "attn_layer_period": ("attn_layer_offset", "layers_block_type"),
    "expert_layer_period": ("expert_layer_offset", ""),
}

# What a config that was written before `layer_types` leaves unsaid.
UNSAID = {
    "gemma2": ("sliding_window_pattern", 2),
    "gemma3_text": ("sliding_window_pattern", 6),
    "cohere2": ("sliding_window_pattern", 4),
    "qwen3_next": ("full_attention_interval", 4),
    "modernbert": ("global_attn_every_n_layers", 3),
    "smollm3": ("no_rope_layer_interval", 4),
    "llama4_text": ("no_rope_layer_interval", 4),
}

# Lists that say `layer` and are not about the layers of a stack.
NOT_PER_LAYER = ("feature_layer", "mtp_", "deepstack")


@dataclass(frozen=True, slots=True)
class Trait(ABC):
    """What one key of the config says of each layer."""

    key: str

    @abstractmethod
    def read(self, config: Config, index: int) -> object:
        """What it says of layer `index`."""

    @abstractmethod
    def write(self, config: Config, layers: Sequence[object]) -> object:
        """The key's value for layers of which it says this. Raises ValueError if it cannot."""

    def refusal(self, config: Config, index: int) -> ValueError:
        """The error for a layer that would land at `index`."""
        return ValueError(f"config.json says by `{self.key}: {config.get(self.key)}` what each layer is, by its index: "
                          f"the new layer {index} would be taken for what it is not")  # fmt: skip


def traits_of(config: Config, num_layers: int) -> tuple[Trait, ...]:
    """Every trait that `config`, which counts `num_layers` layers, speaks of."""
    found = {trait.key: trait for trait in _traits(config, num_layers)}
    return tuple(found.values())


def _traits(config: Config, num_layers: int) -> Iterator[Trait]:
    for key, value in config.items():
        items = cast("list[object] | None", value if isinstance(value, list) else None)
        if key in INDICES and items is not None:
            yield Indices(key)
        elif key == "attention_types":
            yield Runs(key)
        elif key == "hybrid_override_pattern" and isinstance(value, str):
            yield Letters(key)
        elif key == "block_types" and value:
            yield Cycle(key)
        elif items is not None and len(items) == num_layers and _is_per_layer(key):
            yield PerLayer(key)
        elif key in THRESHOLDS and _is_positive(config[key]):
            yield (Clipped if _is_without_effect(key, config) else Threshold)(key)
    yield from _periods(config)


def _is_per_layer(key: str) -> bool:
    return key in LISTS or ("layer" in key and not any(word in key for word in NOT_PER_LAYER))


def _is_without_effect(key: str, config: Config) -> bool:
    if config.get(THRESHOLDS[key]):
        return True
    return key == "max_window_layers" and not config.get("use_sliding_window")


def _is_positive(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


def _periods(config: Config) -> Iterator[Trait]:
    unsaid = UNSAID.get(str(config.get("model_type")))
    said = {**({unsaid[0]: unsaid[1]} if unsaid and not config.get(unsaid[0]) else {}), **config}
    for key, (shift, shadow) in PERIODS.items():
        period = said.get(key)
        if _is_positive(period) and not said.get(shadow):
            offset = said.get(shift, 0) if isinstance(shift, str) else -shift
            yield Period(key, cast(int, period), cast(int, offset))


@dataclass(frozen=True, slots=True)
class PerLayer(Trait):
    """A list with one entry for each layer."""

    def read(self, config: Config, index: int) -> object:
        """The entry."""
        return cast(list[object], config[self.key])[index]

    def write(self, config: Config, layers: Sequence[object]) -> object:
        """The entries."""
        return list(layers)


@dataclass(frozen=True, slots=True)
class Letters(Trait):
    """A text with one letter for each layer."""

    def read(self, config: Config, index: int) -> object:
        """The letter."""
        return cast(str, config[self.key])[index]

    def write(self, config: Config, layers: Sequence[object]) -> object:
        """The letters."""
        return "".join(map(str, layers))


@dataclass(frozen=True, slots=True)
class Indices(Trait):
    """A list of the layers that are different."""

    def read(self, config: Config, index: int) -> object:
        """Whether the layer is in the list."""
        return index in cast(list[object], config[self.key])

    def write(self, config: Config, layers: Sequence[object]) -> object:
        """Where those layers are now."""
        return [index for index, inside in enumerate(layers) if inside]


@dataclass(frozen=True, slots=True)
class Runs(Trait):
    """GPT-Neo's list of [cycle of types, how often]."""

    def read(self, config: Config, index: int) -> object:
        """The layer's type."""
        for types, times in cast("list[tuple[list[object], int]]", config[self.key]):
            length = len(types) * max(times, 0)  # never written out: a file may say that it is 10¹²
            if index < length:
                return types[index % len(types)]
            index -= length
        raise IndexError(index)

    def write(self, config: Config, layers: Sequence[object]) -> object:
        """One run of all of them."""
        return [[list(layers), 1]]


@dataclass(frozen=True, slots=True)
class Clipped(Trait):
    """A threshold without effect, which must not be above the number of layers."""

    def read(self, config: Config, index: int) -> object:
        """Nothing."""
        return None

    def write(self, config: Config, layers: Sequence[object]) -> object:
        """At most the number of layers."""
        return min(cast(int, config[self.key]), len(layers))


@dataclass(frozen=True, slots=True)
class Threshold(Trait):
    """The first k layers are one thing, the others another."""

    def read(self, config: Config, index: int) -> object:
        """Whether the layer is among the first."""
        return index < cast(int, config[self.key])

    def write(self, config: Config, layers: Sequence[object]) -> object:
        """How many of the first kind come first. Raises ValueError if another one comes later."""
        first = next((index for index, below in enumerate(layers) if not below), len(layers))
        late = next((index for index, below in enumerate(layers) if below and index > first), None)
        if late is not None:
            raise self.refusal(config, late)
        return first


@dataclass(frozen=True, slots=True)
class Cycle(Trait):
    """A list of types that begins again at its end (RecurrentGemma)."""

    def read(self, config: Config, index: int) -> object:
        """The layer's type."""
        types = cast(list[object], config[self.key])
        return types[index % len(types)]

    def write(self, config: Config, layers: Sequence[object]) -> object:
        """The same list. Raises ValueError for layers that it does not describe."""
        for index, layer in enumerate(layers):
            if self.read(config, index) != layer:
                raise self.refusal(config, index)
        return config[self.key]


@dataclass(frozen=True, slots=True)
class Period(Trait):
    """Every `period`-th layer, from layer `offset` on."""

    period: int
    offset: int

    def read(self, config: Config, index: int) -> object:
        """Whether the layer is one of these."""
        return index % self.period == self.offset % self.period

    def write(self, config: Config, layers: Sequence[object]) -> object:
        """The same period. Raises ValueError for layers that it does not describe."""
        for index, layer in enumerate(layers):
            if self.read(config, index) != layer:
                raise self.refusal(config, index)
        return config.get(self.key)
