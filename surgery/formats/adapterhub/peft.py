"""LoRA and (IA)³ as PEFT has them on disk.

Source: peft 0.21.2, `tuners/lora/config.py`, `tuners/ia3/config.py`, `utils/save_and_load.py`.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence

from surgery.formats.adapterhub.adapter import Adapter, Method, Parts, integer, number, parts_of, refuse, refuse_set
from surgery.formats.adapterhub.placement import Place, Placement
from surgery.types import TensorType

__all__ = ["POSITIONS", "peft_config", "peft_name", "read_peft", "read_peft_parts"]

PREFIX = "base_model.model."
LORA_KEY = re.compile(r"base_model\.model\.(?P<path>.+)\.lora_(?P<part>[AB])\.weight")
IA3_KEY = re.compile(r"base_model\.model\.(?P<path>.+)\.ia3_(?P<part>l)")

# What no loader needs to compute the same numbers: which modules are adapted is in the tensors' names.
_HARMLESS = (
    "peft_type", "task_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision", "inference_mode",
    "target_modules", "exclude_modules", "fan_in_fan_out",
)  # fmt: skip
_HARMLESS_LORA = (
    *_HARMLESS, "r", "lora_alpha", "lora_dropout", "init_lora_weights", "layers_to_transform", "layers_pattern",
    "megatron_core", "qalora_group_size", "eva_config", "ensure_weight_tying", "runtime_config",
)  # fmt: skip
_HARMLESS_IA3 = (*_HARMLESS, "feedforward_modules", "init_ia3_weights")
_PLAIN_INITS = (True, False, "gaussian", "eva", "orthogonal")  # others leave a base that is not the original

POSITIONS = (
    "the two libraries compute different things from the same prefix: PEFT counts its virtual tokens as positions "
    "(and embeds a prompt as it does words), AdapterHub does not"
)
_OTHERS = {"PREFIX_TUNING": POSITIONS, "PROMPT_TUNING": POSITIONS, "P_TUNING": POSITIONS}


def read_peft(types: Mapping[str, TensorType], config: Mapping[str, object]) -> Adapter:
    """The adapter in a PEFT directory. Raises OpError for what AdapterHub cannot say."""
    match config.get("peft_type"):
        case "LORA":
            return _read_lora(types, config)
        case "IA3":
            refuse_set(config, _HARMLESS_IA3, "which AdapterHub's (IA)³ cannot say")
            return _read_ia3(types)
        case None:
            refuse("adapter_config.json has no `peft_type`: it is no PEFT adapter", "`to: peft` converts AdapterHub's")
        case other:
            why = _OTHERS.get(str(other), "the libraries do not both know it in the same form")
            refuse(f"{other} cannot be converted: {why}", "LORA and IA3 can be")


def _read_lora(types: Mapping[str, TensorType], config: Mapping[str, object]) -> Adapter:
    refuse_set(config, _HARMLESS_LORA, "which AdapterHub's LoRA cannot say")
    init = config.get("init_lora_weights", True)
    if init not in _PLAIN_INITS:
        what = f"was initialized with `{init}`, so that it belongs to a base that PEFT changes when it loads it"
        refuse(what, "save it with PEFT's `path_initial_model_for_weight_conversion` first")
    parts = read_peft_parts(types, "lora")
    rank = integer(config, "r", 8)
    for path, held in parts.items():
        a, b = types[held["A"]], types[held["B"]]
        if len(a.shape) != 2 or len(b.shape) != 2 or not a.shape[0] == b.shape[1] == rank:
            refuse(f"`{path}` has lora_A {a} and lora_B {b}, but adapter_config.json says `r: {rank}`")
    return Adapter("lora", parts, rank, number(config, "lora_alpha", 8), number(config, "lora_dropout", 0.0))


def _read_ia3(types: Mapping[str, TensorType]) -> Adapter:
    parts = read_peft_parts(types, "ia3")
    for path, held in parts.items():
        scale = types[held["l"]]
        if len(scale.shape) != 2 or 1 not in scale.shape:
            refuse(f"`{path}` has ia3_l {scale}, which is neither [out, 1] nor [1, in]")
    return Adapter("ia3", parts)


def read_peft_parts(names: Iterable[str], method: Method) -> Parts:
    """The tensors by module. Raises OpError for others."""
    if method == "ia3":
        return parts_of(names, IA3_KEY, "a PEFT (IA)³", ("l",))
    return parts_of(names, LORA_KEY, "a PEFT LoRA on Linears", ("A", "B"))


def peft_name(path: str, part: str) -> str:
    """The tensor's name in a PEFT adapter."""
    return f"{PREFIX}{path}.ia3_l" if part == "l" else f"{PREFIX}{path}.lora_{part}.weight"


def peft_config(
    adapter: Adapter,
    types: Mapping[str, TensorType],
    row: Placement,
    places: Sequence[Place],
    hub: Mapping[str, object],
    *,
    all_layers: bool,
) -> dict[str, object]:
    """adapter_config.json of `adapter` in PEFT's names; `hub` is AdapterHub's, `all_layers` that it leaves out none."""
    targets = _targets(places, all_layers=all_layers)
    shared: dict[str, object] = {
        "task_type": _task_type(str(hub.get("model_class", ""))),
        "base_model_name_or_path": hub.get("model_name"),
        "inference_mode": True,
        "target_modules": targets,
        "fan_in_fan_out": row.conv1d,
        "modules_to_save": None,
    }
    if adapter.method == "ia3":
        feedforward = [place for place in places if _is_feedforward(types[adapter.parts[place.path]["l"]])]
        return {
            "peft_type": "IA3",
            **shared,
            "feedforward_modules": _targets(feedforward, all_layers=all_layers),
            "init_ia3_weights": True,
        }
    return {
        "peft_type": "LORA",
        **shared,
        **_ranks(adapter, types, places),
        "lora_dropout": adapter.dropout,
        "bias": "none",
        "init_lora_weights": True,
        "use_rslora": False,
        "use_dora": False,
    }


def _is_feedforward(type_: TensorType) -> bool:
    return type_.shape[0] == 1


def _targets(places: Sequence[Place], *, all_layers: bool) -> list[str]:
    """Suffixes where a suffix means these modules and no others, full paths elsewhere."""
    targets = [place.stack.target(place.inner) if all_layers else "" for place in places]
    return list(dict.fromkeys(target or place.path for target, place in zip(targets, places, strict=True)))


def _ranks(adapter: Adapter, types: Mapping[str, TensorType], places: Sequence[Place]) -> dict[str, object]:
    """`r` and `lora_alpha`; a fused matrix that got a pair for each third has multiples of both."""
    times = {place.path: types[adapter.parts[place.path]["A"]].shape[0] // adapter.rank for place in places}
    if len(set(times.values())) == 1:
        (factor,) = set(times.values())
        return {"r": factor * adapter.rank, "lora_alpha": factor * adapter.alpha}
    fused = {place.path: times[place.path] for place in places if times[place.path] > 1}
    return {
        "r": adapter.rank,
        "lora_alpha": adapter.alpha,
        "rank_pattern": {path: factor * adapter.rank for path, factor in fused.items()},
        "alpha_pattern": {path: factor * adapter.alpha for path, factor in fused.items()},
    }


def _task_type(model_class: str) -> str | None:
    """Of a model with a head of its own; a task's head would be trained with PEFT's adapter, and is not here."""
    if model_class.endswith(("ForCausalLM", "LMHeadModel")):
        return "CAUSAL_LM"
    return "SEQ_2_SEQ_LM" if model_class.endswith("ForConditionalGeneration") else None
