"""Which LoRAs of single experts PEFT can load: on disk each expert has its Linears, in the live model they are fused.

PEFT makes one LoRA of fused experts out of those of single experts, with the first two matrices as one. It goes by the
last part of a target's path, and so takes the experts of all layers, and takes any Linear of that name for an expert.

Source: PEFT 0.21.2, `utils/transformers_weight_conversion.py`; transformers 5.23. Every model type of the table was
measured: an adapter of single experts gives what its products added to their weights give.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping

from surgery.checkpoint.architecture import Kind
from surgery.errors import Problem
from surgery.formats.peft.patterns import ending_in
from surgery.op import Scene, Site
from surgery.regexes import matching

__all__ = ["can_adapt_experts", "expert_problems", "is_taken_for_expert"]

# The Linears of an expert: those that become one, then the other. By model type.
_W = (("w1", "w3"), ("w2",))
_PROJ = (("gate_proj", "up_proj"), ("down_proj",))
MERGED: Mapping[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    **dict.fromkeys(("mixtral", "minimax", "minimax_m2"), _W),
    **dict.fromkeys(
        ("afmoe", "deepseek_v2", "deepseek_v3", "dots1", "ernie4_5_moe", "exaone_moe", "flex_olmo", "glm4_moe",
         "glm4_moe_lite", "hunyuan_v1_moe", "olmoe", "qwen3_moe", "solar_open"),
        _PROJ,
    ),
}  # fmt: skip
# PEFT converts these too, but no adapter of single experts was seen to load.
_ALSO_CONVERTED = ("cohere2_moe", "longcat_flash", "mellum", "qwen3_next")


def can_adapt_experts(scene: Scene) -> bool:
    """Whether an adapter of single experts becomes one of the live model's fused experts."""
    return _model_type(scene) in MERGED


def is_taken_for_expert(site: Site) -> bool:
    """Whether PEFT would take this Linear, which is none of an expert, for one."""
    model_type = _model_type(site.scene)
    pairs = MERGED.get(model_type) or (_PROJ if model_type in _ALSO_CONVERTED else ())
    return site.module.kind is not Kind.EXPERT and site.path.rpartition(".")[2] in {n for names in pairs for n in names}


def expert_problems(scene: Scene, patterns: Iterable[str], settings: Mapping[str, bool]) -> Iterator[Problem]:
    """Why the experts among `scene.sites` cannot be adapted so.

    `patterns` are those that give some modules another rank or alpha; of `settings`, none may be true.
    """
    selected = {site.path for site in scene.sites if site.module.kind is Kind.EXPERT}
    if not selected or not can_adapt_experts(scene):
        return
    yield from _parts_of_all(selected, scene)
    for name, is_set in settings.items():
        if is_set:
            yield Problem(f"`{name}` is not for experts, which PEFT fuses", fix="attach two adapters, or do without it")
    for pattern in patterns:
        if matching(ending_in(pattern), selected):
            yield Problem(f"`{pattern}` gives experts a rank or alpha of their own, and PEFT fuses them all into one")


def _parts_of_all(selected: set[str], scene: Scene) -> Iterator[Problem]:
    experts = [path for path, module in scene.modules.items() if module.kind is Kind.EXPERT]
    for names in MERGED[_model_type(scene)]:
        wanted = {path for path in experts if path.rpartition(".")[2] in names}
        missing = sorted(wanted - selected)
        if missing and wanted & selected:
            more = f" (and {len(missing) - 1} more like it)" if len(missing) > 1 else ""
            what = f"`{missing[0]}`{more} is not selected: PEFT adapts the {' and '.join(names)} of all experts or none"
            yield Problem(what, fix="select those of all experts of all layers")


def _model_type(scene: Scene) -> str:
    return str(scene.config.get("model_type"))
