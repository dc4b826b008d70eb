"""Bottleneck adapters, whatever their layout: A(z) = up(act(down z)), from H features to b and back.

The layout here is surgery's own, for adapters at single Linears, which neither AdapterHub nor PEFT can say (Hu et al.,
arXiv 2304.01933): `adapter_config.json` with `adapter_type: surgery`, and `adapter_model.safetensors` with
`<module>.adapter_down.weight` [b, in], `<module>.adapter_up.weight` [out, b] and their biases, modules by their path
in the live model. Without `peft_type` and `config` in it, PEFT and AdapterHub refuse it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, NoReturn, cast, get_args

from surgery.errors import OpError, Problem

__all__ = [
    "ACTIVATIONS",
    "ADAPTER_TYPE",
    "PARTS",
    "VERSION",
    "ModulesConfig",
    "Placement",
    "Sizes",
    "finite",
    "known_activation",
    "modules_config",
    "modules_keys",
    "read_modules_config",
    "refuse",
]

ADAPTER_TYPE = "surgery"
VERSION = 1
METHOD = "bottleneck"
Placement = Literal["before", "after", "parallel"]

# Without parameters of their own, of transformers 4.57's ACT2FN, by which AdapterHub reads them, and its `leakyrelu`.
ACTIVATIONS = (
    "gelu", "gelu_10", "gelu_accurate", "gelu_fast", "gelu_new", "gelu_python", "gelu_pytorch_tanh", "laplace",
    "leaky_relu", "leakyrelu", "linear", "mish", "quick_gelu", "relu", "relu2", "relu6", "sigmoid", "silu", "swish",
    "tanh",
)  # fmt: skip

PARTS = ("adapter_down.weight", "adapter_down.bias", "adapter_up.weight", "adapter_up.bias")


@dataclass(frozen=True, slots=True)
class ModulesConfig:
    """An adapter in surgery's own layout: the same at each of `modules`.

    Legend: y = Linear(x), s the scaling.
    before: Linear(x + s·A(x)); after: y + s·A(y); parallel: y + s·A(x).
    """

    placement: Placement
    modules: tuple[str, ...]
    width: int
    activation: str
    scaling: float
    bias: bool


def modules_config(config: ModulesConfig, name: str, base: Mapping[str, object]) -> dict[str, object]:
    """adapter_config.json of the adapter called `name`; `base` is what it says of the checkpoint it is for."""
    return {
        "adapter_type": ADAPTER_TYPE,
        "version": VERSION,
        "name": name,
        "method": METHOD,
        "placement": config.placement,
        "modules": list(config.modules),
        "width": config.width,
        "activation": config.activation,
        "scaling": config.scaling,
        "bias": config.bias,
        **base,
    }


def read_modules_config(config: Mapping[str, object]) -> ModulesConfig:
    """What adapter_config.json says. Raises OpError for anything that it cannot mean."""
    version, method = config.get("version"), config.get("method")
    if isinstance(version, bool) or version != VERSION or method != METHOD:
        refuse("adapter_config.json", f"is version {version} of `{method}`, not known here")
    placement, width, bias = config.get("placement"), config.get("width"), config.get("bias")
    if placement not in get_args(Placement):
        refuse("placement", f"is `{placement}`, none of {', '.join(get_args(Placement))}")
    if not isinstance(width, int) or isinstance(width, bool) or width < 1:
        refuse("width", f"is {width}, no positive integer")
    scaling = finite(config.get("scaling"))
    if scaling is None:
        refuse("scaling", f"is {config.get('scaling')}, no finite number")
    if not isinstance(bias, bool):
        refuse("bias", f"is {bias}, neither true nor false")
    paths, activation = _paths(config.get("modules")), known_activation(config.get("activation"))
    return ModulesConfig(cast(Placement, placement), paths, width, activation, scaling, bias)


def _paths(modules: object) -> tuple[str, ...]:
    items = cast("list[object]", modules) if isinstance(modules, list) else []
    paths = tuple(item for item in items if isinstance(item, str))
    if not paths or len(paths) != len(items):
        refuse("modules", f"is {modules}, no list of module paths")
    if len(set(paths)) != len(paths):
        refuse("modules", f"names `{next(path for path in paths if paths.count(path) > 1)}` more than once")
    return paths


def modules_keys(path: str, *, bias: bool) -> dict[str, str]:
    """The names of the tensors at the module `path`, by part."""
    return {part: f"{path}.{part}" for part in PARTS if bias or not part.endswith(".bias")}


def known_activation(value: object) -> str:
    """`value`, in lower case as the peers read it. Raises OpError if it is none of ACTIVATIONS."""
    name = value.lower() if isinstance(value, str) else ""
    if name not in ACTIVATIONS:
        refuse("activation", f"is `{value}`, which is not known", f"give one of {', '.join(ACTIVATIONS)}")
    return name


def finite(value: object) -> float | None:
    """`value`, or None if it is no number, or none that a float holds."""
    if not isinstance(value, int | float) or isinstance(value, bool):
        return None
    try:
        number = float(value)
    except OverflowError:
        return None
    return number if math.isfinite(number) else None


def refuse(subject: str, what: str, fix: str = "") -> NoReturn:
    """Raises OpError."""
    raise OpError(Problem(f"`{subject}` {what}", fix=fix))


@dataclass(frozen=True, slots=True)
class Sizes:
    """Features in, within, and out."""

    inputs: int
    width: int
    outputs: int

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """By part, biases among them."""
        down, up = (self.width, self.inputs), (self.outputs, self.width)
        return {
            "adapter_down.weight": down,
            "adapter_down.bias": down[:1],
            "adapter_up.weight": up,
            "adapter_up.bias": up[:1],
        }
