"""What attaching a PEFT adapter needs to know of a checkpoint: how PEFT will call its modules, and its task.

PEFT names modules as they are in the live model. That is the class that config.json names in `architectures`; its
paths are those on disk, but for the base model's prefix where a checkpoint was saved without its head, or with it,
and for what transformers 5 calls otherwise than the checkpoints of a family do.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Literal, cast

from surgery.checkpoint.architecture import Kind
from surgery.checkpoint.inventory.order import live_order
from surgery.formats.lora import PREFIX
from surgery.formats.peft.live_names import live_name
from surgery.op import Scene, Site

__all__ = [
    "Task",
    "class_name",
    "in_live_order",
    "is_tied",
    "key",
    "parents",
    "runtime_path",
    "target_modules",
    "task_type",
]

INPUT_EMBEDDINGS = re.compile(r"(.*\.)?(embed_tokens|tok_embeddings|wte|word_embeddings|embed_in|shared)")
LONGEST_SUFFIX = 3  # parts of a path; a target that names more is given in full
Task = Literal["CAUSAL_LM", "SEQ_2_SEQ_LM", "SEQ_CLS", "TOKEN_CLS", "QUESTION_ANS", "FEATURE_EXTRACTION"]
TASKS = {
    "ForCausalLM": "CAUSAL_LM",
    "LMHeadModel": "CAUSAL_LM",
    "ForSequenceClassification": "SEQ_CLS",
    "ForTokenClassification": "TOKEN_CLS",
    "ForQuestionAnswering": "QUESTION_ANS",
}
_SEQ_2_SEQ = re.compile(
    r"(T5|MT5|UMT5|LongT5|SwitchTransformers|Bart|MBart|Pegasus|PegasusX|BigBirdPegasus|LED|M2M100|NllbMoe|Blenderbot"
    r"|BlenderbotSmall|Plbart|PLBart|ProphetNet)ForConditionalGeneration|MarianMTModel"
)
_BASE_MODEL = re.compile(r".*(?<!LMHead)(?<!DoubleHeads)(?<!MT)Model")


def class_name(config: Mapping[str, object]) -> str:
    """The class that config.json names first; empty without one."""
    architectures = config.get("architectures")
    return str(cast("list[object]", architectures)[0]) if isinstance(architectures, list) and architectures else ""


def task_type(config: Mapping[str, object]) -> str | None:
    """PEFT's name for the task of the class that config.json names; None for a model that has none."""
    name = class_name(config)
    if _SEQ_2_SEQ.fullmatch(name):
        return "SEQ_2_SEQ_LM"
    task = next((task for ending, task in TASKS.items() if name.endswith(ending)), None)
    reads_text_alone = "vocab_size" in config and "vision_config" not in config
    return task or ("FEATURE_EXTRACTION" if _BASE_MODEL.fullmatch(name) and reads_text_alone else None)


def runtime_path(path: str, scene: Scene) -> str:
    """What the module `path` on disk is called in the live model."""
    return live_name(_with_prefix(path, scene), scene.config)


def _with_prefix(path: str, scene: Scene) -> str:
    prefix, name = scene.architecture.prefix, class_name(scene.config)
    if not prefix or not name:
        return path
    if _BASE_MODEL.fullmatch(name):
        return path.removeprefix(f"{prefix}.")
    has_head = any(name.startswith(f"{prefix}.") or held.kind is Kind.HEAD for name, held in scene.modules.items())
    return path if has_head or path in scene.architecture.heads else f"{prefix}.{path}"


def key(path: str, suffix: str, scene: Scene) -> str:
    """The name in a PEFT adapter of what it holds for the module `path` on disk."""
    return f"{PREFIX}{runtime_path(path, scene)}.{suffix}"


def in_live_order(sites: Sequence[Site], scene: Scene) -> list[Site]:
    """`sites` as the live model goes through its modules."""
    ordered, _ = live_order(scene.names, scene.config)
    rank = {name: place for place, name in enumerate(ordered)}
    first = {site.path: min(rank[name] for name in site.nodes) for site in sites}
    return sorted(sites, key=lambda site: first[site.path])


def target_modules(paths: Iterable[str], scene: Scene) -> list[str] | str:
    """`target_modules` of a PEFT config that stand for the modules `paths` on disk, and no others.

    Ends of paths where all modules with that end are meant, else paths in full; one regex where PEFT would take a
    full path for the end of another one.
    """
    wanted = {runtime_path(path, scene) for path in paths}
    there = {runtime_path(path, scene) for path in scene.modules} | set(scene.architecture.heads)
    there |= {parent for path in there for parent in parents(path)}
    counts = _suffix_counts(there), _suffix_counts(wanted)
    targets = list(dict.fromkeys(_target(path, *counts) for path in sorted(wanted)))
    longer = {suffix for path in there - wanted for suffix in _suffixes(path, 0)}
    if any(target in wanted and target in longer for target in targets):
        return "|".join(map(re.escape, sorted(wanted)))
    return targets


def is_tied(path: str, scene: Scene) -> bool:
    """Whether `path` is the input embedding or the output head, and both are one tensor."""
    heads = scene.architecture.heads
    on_disk = any(f"{head}.weight" in scene.names for head in heads)
    if on_disk or not scene.architecture.is_tied(scene.config):
        return False
    return path in heads or INPUT_EMBEDDINGS.fullmatch(path) is not None


def parents(path: str) -> list[str]:
    """The modules that `path` is in, the outermost first."""
    parts = path.split(".")
    return [".".join(parts[:count]) for count in range(1, len(parts))]


def _suffixes(path: str, longest: int = LONGEST_SUFFIX) -> list[str]:
    parts = path.split(".")
    return [".".join(parts[-count:]) for count in range(1, (longest or len(parts)) + 1) if count <= len(parts)]


def _suffix_counts(paths: Iterable[str]) -> Mapping[str, int]:
    counts: dict[str, int] = {}
    for path in paths:
        for suffix in _suffixes(path):
            counts[suffix] = counts.get(suffix, 0) + 1
    return counts


def _target(path: str, there: Mapping[str, int], wanted: Mapping[str, int]) -> str:
    """The shortest end of `path` that no other module has; the whole path if there is none."""
    ends = (suffix for suffix in _suffixes(path) if there.get(suffix) == wanted[suffix])
    return next((suffix for suffix in ends if not suffix.split(".")[0].isdigit()), path)
