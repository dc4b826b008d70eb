"""LoRA and (IA)³ as the `adapters` library has them on disk.

Source: adapters 1.3.0, `methods/lora.py`, `configuration/adapter_config.py`, `loading.py`.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import cast

from surgery.formats.adapterhub.adapter import Adapter, Parts, integer, number, parts_of, refuse, refuse_set
from surgery.formats.adapterhub.peft import POSITIONS
from surgery.formats.adapterhub.placement import ATTENTION, FUSED, Coverage
from surgery.types import TensorType

__all__ = [
    "RESERVED",
    "enabled_thirds",
    "hidden_size",
    "hub_config",
    "hub_name",
    "left_out",
    "read_hub",
    "read_hub_parts",
]

VERSION = "adapters.1.3.0"  # whose meaning of the fields is written
KEY = re.compile(r"(?P<path>.+)\.loras\.(?P<name>[^.]+)\.lora_(?P<part>[AB])")

# Attributes of torch's ModuleDict, which cannot hold a module of such a name.
_ATTRIBUTES = """
T_destination add_module apply bfloat16 buffers call_super_init children clear compile cpu cuda double
dump_patches eval extra_repr float forward get_buffer get_extra_state get_parameter get_submodule half ipu
items keys load_state_dict modules mtia named_buffers named_children named_modules named_parameters parameters
pop register_backward_hook register_buffer register_forward_hook register_forward_pre_hook
register_full_backward_hook register_full_backward_pre_hook register_load_state_dict_post_hook
register_load_state_dict_pre_hook register_module register_parameter register_state_dict_post_hook
register_state_dict_pre_hook requires_grad_ set_extra_state set_submodule share_memory smart_apply state_dict to
to_empty train training type update values xpu zero_grad
"""
RESERVED = frozenset(_ATTRIBUTES.split())

_HARMLESS = (
    "architecture", "selfattn_lora", "intermediate_lora", "output_lora", "leave_out", "r", "alpha", "dropout",
    "attn_matrices", "composition_mode", "init_weights", "init_weights_seed", "dtype",
)  # fmt: skip
_OTHERS = {
    None: "PEFT has no bottleneck adapters",
    "prefix_tuning": POSITIONS,
    "prompt_tuning": POSITIONS,
    "union": "PEFT has no adapter of several methods",
    "mtl_lora": "PEFT has no LoRA for several tasks",
    "reft": "PEFT has none in this form",
}


def read_hub(types: Mapping[str, TensorType], config: Mapping[str, object]) -> Adapter:
    """The adapter in an AdapterHub directory. Raises OpError for what PEFT cannot say."""
    if "peft_type" in config:
        refuse("adapter_config.json has a `peft_type`: it is a PEFT adapter already", "`to: adapterhub` converts it")
    inner = _inner(config)
    architecture = inner.get("architecture")
    if architecture != "lora":
        why = _OTHERS.get(cast("str | None", architecture), "it is not known")
        refuse(f"an adapter of architecture `{architecture}` cannot be converted: {why}", "LoRA and (IA)³ can be")
    refuse_set(inner, _HARMLESS, "which PEFT's LoRA and (IA)³ cannot say")
    rank = integer(inner, "r", 8)
    alpha = _alpha(config, rank)
    if inner.get("composition_mode", "add") == "add":
        parts = read_hub_parts(types, ("A", "B"))
        return Adapter("lora", parts, rank, alpha, number(inner, "dropout", 0.0))
    if alpha != 1:
        refuse(f"this (IA)³ scales by alpha {alpha} too, which PEFT's cannot say")
    parts = read_hub_parts(types, ("B",))
    for held in parts.values():
        if "A" in held:
            refuse(f"`{held['A']}` is no part of an (IA)³", "drop it first with `tensor.drop`, if it is not needed")
    return Adapter("ia3", {path: {"l": held["B"]} for path, held in parts.items()})


def read_hub_parts(names: Iterable[str], wanted: tuple[str, ...]) -> Parts:
    """The tensors of the one adapter. Raises OpError if there are two, or others."""
    parts = parts_of(names, KEY, "an AdapterHub LoRA", wanted)
    adapters = sorted({match["name"] for name in names if (match := KEY.fullmatch(name))})
    if len(adapters) > 1:
        refuse(f"the file holds {len(adapters)} adapters, {' and '.join(adapters[:2])}", "drop all but one of them")
    return parts


def _inner(config: Mapping[str, object]) -> Mapping[str, object]:
    inner = config.get("config")
    if not isinstance(inner, Mapping):
        refuse("adapter_config.json has no `config` with the adapter's options", "save it again with adapters 1.x")
    return cast("Mapping[str, object]", inner)


def _alpha(config: Mapping[str, object], rank: int) -> float:
    """Versions before 1.1.0 did not scale by alpha; the library loads theirs with alpha = r."""
    written = re.fullmatch(r"adapters\.(\d+)\.(\d+).*", str(config.get("version", "")))
    if written and (int(written[1]), int(written[2])) < (1, 1):
        return rank
    return number(_inner(config), "alpha", 8)


def left_out(config: Mapping[str, object]) -> bool:
    """Whether some layers are not adapted."""
    return bool(_inner(config).get("leave_out"))


def enabled_thirds(config: Mapping[str, object]) -> tuple[bool, ...]:
    """Which of query, key and value of a fused matrix are adapted."""
    matrices = _inner(config).get("attn_matrices", ["q", "v"])
    held = cast("list[object]", matrices) if isinstance(matrices, list) else []
    return tuple(slot in held for slot in ATTENTION)


def hub_name(path: str, name: str, part: str) -> str:
    """The tensor's name in an AdapterHub adapter; (IA)³ is kept as a `lora_B`."""
    return f"{path}.loras.{name}.lora_{'B' if part == 'l' else part}"


def hub_config(
    adapter: Adapter, cover: Coverage, name: str, base: Mapping[str, object], model_name: object
) -> dict[str, object]:
    """adapter_config.json for the adapter called `name` of the model that `base`, its config.json, describes."""
    architectures = base.get("architectures")
    classes = cast("list[object]", architectures) if isinstance(architectures, list) else []
    return {
        "config": {
            "architecture": "lora",
            "selfattn_lora": not cover.slots.isdisjoint((*ATTENTION, FUSED)),
            "intermediate_lora": "intermediate" in cover.slots,
            "output_lora": "output" in cover.slots,
            "leave_out": list(cover.leave_out),
            "r": adapter.rank,
            "alpha": adapter.alpha,
            "dropout": adapter.dropout,
            "attn_matrices": [slot for slot in ATTENTION if slot in cover.slots or FUSED in cover.slots],
            "composition_mode": "scale" if adapter.method == "ia3" else "add",
            "init_weights": adapter.method,
            "init_weights_seed": None,
            "use_gating": False,
            "use_dora": False,
            "vera_d": None,
            "vera_b": None,
            "dtype": None,
        },
        "hidden_size": hidden_size(base),
        "model_class": classes[0] if classes else None,
        "model_name": model_name,
        "model_type": base.get("model_type"),
        "name": name,
        "version": VERSION,
    }


def hidden_size(base: Mapping[str, object]) -> object:
    """The width of the model, under whichever key its config.json has it."""
    return next((base[key] for key in ("hidden_size", "d_model", "n_embd", "dim") if key in base), None)
