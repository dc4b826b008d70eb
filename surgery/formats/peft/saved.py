"""Modules that an adapter holds whole: those asked for, and the head of a task, which PEFT always keeps in the adapter.

Source: PEFT 0.21.2, `peft_model.py`, `utils/other.py`.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

from surgery.checkpoint.architecture import Kind
from surgery.checkpoint.modules import Module
from surgery.errors import OpError, Problem
from surgery.formats.peft.attaching import class_name, key, parents, runtime_path
from surgery.graph import Node
from surgery.op import Scene
from surgery.regexes import Limit, matching

__all__ = ["Saved", "saved_modules"]

HEADS: Mapping[str, tuple[str, ...]] = {
    "SEQ_CLS": ("classifier", "score"),
    "TOKEN_CLS": ("classifier", "score"),
    "QUESTION_ANS": ("qa_outputs",),
}


@dataclass(frozen=True, slots=True)
class Saved:
    """`modules_to_save` of the adapter's config; the modules on disk that they stand for; their tensors."""

    names: tuple[str, ...]
    paths: tuple[str, ...]
    tensors: Mapping[str, Node]  # by name in the adapter's file


def saved_modules(regexes: Iterable[str], scene: Scene, task: str | None, *, is_adapting: bool = True) -> Saved:
    """The modules that `regexes` match, and the head of `task`. Raises OpError with all that is wrong.

    `is_adapting`: modules get factors or vectors of their own, so that none of them can be saved whole too.
    """
    asked, problems = _matches(regexes, scene)
    heads = _heads(task, scene)
    if task in HEADS and not heads:
        what = f"PEFT keeps the head of {class_name(scene.config)} in the adapter, and the checkpoint has none"
        problems.append(Problem(what, fix="save it with its head, or say `task_type: FEATURE_EXTRACTION`"))
    names = [runtime_path(path, scene) for path in asked if path not in heads]
    problems += [problem for path in asked for problem in _swept_along(path, {*asked, *heads}, scene)]
    paths = tuple(dict.fromkeys([*asked, *heads]))
    problems += _adapted([*names, *HEADS.get(task or "", ())], scene) if is_adapting else []
    problems += [problem for path in paths for problem in _unfit(scene.modules[path])]
    if problems:
        raise OpError(*problems)
    tensors = {
        key(path, name[len(path) + 1 :], scene): scene.names[name]
        for path in paths
        for name in scene.modules[path].tensors
    }
    return Saved((*names, *HEADS.get(task or "", ())), paths, tensors)


def _matches(regexes: Iterable[str], scene: Scene) -> tuple[list[str], list[Problem]]:
    found: dict[str, None] = {}
    problems: list[Problem] = []
    for regex in regexes:
        paths = matching(regex, filter(None, scene.modules), Limit(" of `modules_to_save`"))
        found |= dict.fromkeys(paths)
        if not paths:
            fix = "correct the regex; `surgery inspect` lists the modules"
            problems.append(
                Problem(f"`modules_to_save`: `{regex}` matches none of {len(scene.modules)} modules", fix=fix)
            )
    return list(found), problems


def _heads(task: str | None, scene: Scene) -> list[str]:
    """PEFT takes every module whose path ends so, be it in the middle of a word, with all that is in it."""
    ends = HEADS.get(task or "", ())
    lives = {path: runtime_path(path, scene) for path in scene.modules}
    return [path for path, live in lives.items() if ends and any(at.endswith(ends) for at in (*parents(live), live))]


def _swept_along(path: str, saved: set[str], scene: Scene) -> Iterator[Problem]:
    end = runtime_path(path, scene)
    for other in scene.modules:
        live = runtime_path(other, scene)
        if other not in saved and any(at.endswith(end) for at in (*parents(live), live)):
            what = f"`{path}` saved whole takes `{other}` with it: PEFT goes by how a path ends"
            yield Problem(what, fix="let `modules_to_save` match both")
            return


def _adapted(names: Iterable[str], scene: Scene) -> Iterator[Problem]:
    regexes = [re.compile(rf"(.*\.)?{re.escape(name)}(\..*)?") for name in names]
    for site in scene.sites:
        live = runtime_path(site.path, scene)
        if any(regex.fullmatch(live) for regex in regexes):
            yield Problem(f"`{site.path}` is both adapted and saved whole", fix="take it away from one")


def _unfit(module: Module) -> Iterator[Problem]:
    if module.is_quantized:
        what = f"`{module.path}` is quantized, and cannot be saved whole to be trained"
        yield Problem(what, fix="dequantize it, or narrow the regex")
    if module.kind is Kind.EXPERT:
        what = f"`{module.path}` is an expert, which the live model has fused with others, and cannot be saved whole"
        yield Problem(what, fix="narrow the regex")
