"""Bottleneck adapters as the `adapters` library has them: `seq_bn`, `double_seq_bn`, `par_bn`, and what lies between.

With h what a sublayer gives, x the residual, LN the norm after them where a model has one, and
A(z) = s·up(act(down z)):

    double_seq_bn   h + A(h)          Houlsby et al., arXiv 1902.00751
    seq_bn          h + A(LN(h + x))  Pfeiffer et al., arXiv 2005.00247
    par_bn          h + A(x)          He et al., arXiv 2110.04366

and then, as ever, + x and LN.

Source: adapters 1.3.0, `methods/bottleneck.py`, `methods/modeling.py`, `configuration/adapter_config.py`.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Literal, cast

from surgery.formats.adapterhub.hub import RESERVED, VERSION, hidden_size
from surgery.formats.adapterhub.slots import Slot, Stack
from surgery.formats.bottleneck.layout import finite, known_activation, refuse
from surgery.formats.bottleneck.values import Init

__all__ = [
    "KEY",
    "PRESETS",
    "Bottleneck",
    "Preset",
    "check_name",
    "hub_bottleneck_config",
    "hub_keys",
    "read_hub_bottleneck",
    "reduction_factor",
    "slots_of",
    "width_of",
]

KEY = re.compile(r"(?P<slot>.+)\.adapters\.(?P<name>[^.]+)\.(?P<part>(adapter_down\.0|adapter_up)\.(weight|bias))")
_PARTS = {
    "adapter_down.weight": "adapter_down.0.weight",
    "adapter_down.bias": "adapter_down.0.bias",
    "adapter_up.weight": "adapter_up.weight",
    "adapter_up.bias": "adapter_up.bias",
}
_RENAMED = {"gelu": "gelu_new", "gelu_orig": "gelu"}  # what the library reads in a config without `version`


@dataclass(frozen=True, slots=True)
class Bottleneck:
    """What an AdapterHub config says: which slots are filled, and what each computes."""

    attention: bool
    output: bool
    reads: Literal["h", "h + x", "x"]
    activation: str
    scaling: float
    dropout: float = 0.0
    leave_out: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class Preset:
    """One of the library's configurations: where it stands, and its defaults."""

    attention: bool
    reads: Literal["h", "h + x", "x"]
    activation: str
    reduction_factor: float
    scaling: float
    init: Init


PRESETS = {
    "double_seq_bn": Preset(True, "h", "swish", 16, 1.0, "bert"),
    "seq_bn": Preset(False, "h + x", "relu", 16, 1.0, "bert"),
    "par_bn": Preset(False, "x", "relu", 2, 4.0, "zero"),
}


def read_hub_bottleneck(config: Mapping[str, object]) -> Bottleneck:
    """What adapter_config.json says. Raises OpError for what is not done here."""
    inner = config.get("config")
    if not isinstance(inner, Mapping):
        refuse("adapter_config.json", "has no `config` with the adapter's options", "save it again with adapters 1.x")
    options = cast("Mapping[str, object]", inner)
    if options.get("architecture") is not None:
        what = f"is an adapter of architecture `{options['architecture']}`, no bottleneck"
        refuse("adapter_config.json", what, "AdapterHub's library loads it")
    for key, plain in _PLAIN.items():
        if options.get(key, plain) not in (plain, None):
            fix = "AdapterHub's library loads it"
            refuse("adapter_config.json", f"says `{key}: {options[key]}`, which is not done here", fix)
    activation = options.get("non_linearity")
    if "version" not in config and isinstance(activation, str):
        activation = _RENAMED.get(activation, activation)
    parallel, sums = _flag(options, "is_parallel"), _flag(options, "original_ln_before")
    return Bottleneck(
        attention=_flag(options, "mh_adapter"),
        output=_flag(options, "output_adapter"),
        reads="x" if parallel else "h + x" if sums else "h",
        activation=known_activation(activation),
        scaling=_number(options, "scaling", 1.0),
        dropout=_dropout(options),
        leave_out=_leave_out(options),
    )


# What is computed here, whatever else the library can: an option may have this value, or be absent.
_PLAIN: Mapping[str, object] = {
    "original_ln_after": True,
    "residual_before_ln": True,
    "ln_before": False,
    "ln_after": False,
    "cross_adapter": False,
    "use_gating": False,
    "phm_layer": False,
    "inv_adapter": None,
    "stochastic_depth": 0.0,
}


def _number(options: Mapping[str, object], key: str, default: float) -> float:
    value = finite(options.get(key, default))
    if value is None:
        refuse(
            "adapter_config.json", f"says `{key}: {options[key]}`, which is not done here", "only finite numbers are"
        )
    return value


def _dropout(options: Mapping[str, object]) -> float:
    value = _number(options, "dropout", 0.0)
    if not 0 <= value <= 1:
        refuse(
            "adapter_config.json",
            f"says `dropout: {options['dropout']}`, which is no probability",
            "give one from 0 to 1",
        )
    return value


def _flag(options: Mapping[str, object], key: str) -> bool:
    value = options.get(key)
    if not isinstance(value, bool | None):
        refuse("adapter_config.json", f"says `{key}: {value}`, which is neither true nor false")
    return bool(value)


def _leave_out(options: Mapping[str, object]) -> tuple[int, ...]:
    value = options.get("leave_out")
    items = cast("list[object]", value) if isinstance(value, list) else []
    layers = tuple(item for item in items if isinstance(item, int) and not isinstance(item, bool) and item >= 0)
    if len(layers) != len(items) or not isinstance(value, list | None):
        fix = "layers are counted from 0"
        refuse("adapter_config.json", f"says `leave_out: {value}`, which is no list of layer numbers", fix)
    return layers


def slots_of(bottleneck: Bottleneck, layers: Mapping[str, tuple[int, Stack]]) -> Iterator[tuple[str, Slot]]:
    """The slots that are filled, each with the path of its layer; `layers` as `slots.layers_of` gives them."""
    for layer, (number, stack) in layers.items():
        if number not in bottleneck.leave_out:
            if bottleneck.attention:
                yield layer, stack.attention
            if bottleneck.output:
                yield layer, stack.output


def hub_keys(slot: str, name: str) -> dict[str, str]:
    """The names of the tensors of the adapter `name` at the slot, by part."""
    return {part: f"{slot}.adapters.{name}.{written}" for part, written in _PARTS.items()}


def width_of(hidden: int, factor: float) -> int:
    """b as the library computes it. Raises OpError if it would be none, or more than H."""
    width = int(hidden // factor)
    if not 1 <= width <= hidden:
        refuse("reduction_factor", f"{factor:g} makes {width} of {hidden} features", f"give one between 1 and {hidden}")
    return width


def reduction_factor(hidden: int, width: int) -> float:
    """What the library divides H by to get b. Raises OpError for a width that is none, or larger than H."""
    if not 1 <= width <= hidden:
        refuse("width", f"{width} is no bottleneck of {hidden} features", f"give one between 1 and {hidden}")
    return hidden // width if hidden % width == 0 else hidden / (width + 0.25)


def check_name(name: str) -> None:
    """Raises OpError for a name that torch's ModuleDict cannot hold."""
    if "." in name or name in RESERVED:
        refuse(name, "cannot be an adapter's name: torch keeps it for itself, or it has a dot", "give another `name`")


def hub_bottleneck_config(
    chosen: Bottleneck, init: Init, factor: float, name: str, base: Mapping[str, object], base_name: str | None
) -> dict[str, object]:
    """adapter_config.json as the library saves it; `base` is the checkpoint's config.json."""
    return {
        "config": _inner(chosen, init, factor),
        "hidden_size": hidden_size(base),
        "model_class": _class_name(base),
        "model_name": base_name,
        "model_type": base.get("model_type"),
        "name": name,
        "version": VERSION,
    }


def _class_name(base: Mapping[str, object]) -> object:
    classes = base.get("architectures")
    return cast("list[object]", classes)[0] if isinstance(classes, list) and classes else None


def _inner(chosen: Bottleneck, init: Init, factor: float) -> dict[str, object]:
    return {
        "adapter_residual_before_ln": False,
        "cross_adapter": False,
        "dropout": chosen.dropout,
        "factorized_phm_W": True,
        "factorized_phm_rule": False,
        "hypercomplex_nonlinearity": "glorot-uniform",
        "init_weights": "mam_adapter" if init == "zero" else "bert",
        "init_weights_seed": None,
        "inv_adapter": None,
        "inv_adapter_reduction_factor": None,
        "is_parallel": chosen.reads == "x",
        "learn_phm": True,
        "leave_out": list(chosen.leave_out),
        "ln_after": False,
        "ln_before": False,
        "mh_adapter": chosen.attention,
        "non_linearity": chosen.activation,
        "original_ln_after": True,
        "original_ln_before": chosen.reads == "h + x",
        "output_adapter": chosen.output,
        "phm_bias": True,
        "phm_c_init": "normal",
        "phm_dim": 4,
        "phm_init_range": 0.0001,
        "phm_layer": False,
        "phm_rank": 1,
        "reduction_factor": factor,
        "residual_before_ln": True,
        "scaling": chosen.scaling,
        "shared_W_phm": False,
        "shared_phm_rule": True,
        "stochastic_depth": 0.0,
        "use_gating": False,
    }
