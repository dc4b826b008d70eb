"""`Selection`: an edit bound to the sites that its regexes matched."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from surgery.checkpoint.architecture import Architecture
from surgery.checkpoint.modules import Module
from surgery.errors import Problem, SpecError
from surgery.spec import Edit

__all__ = ["Match", "Selection", "select"]


@dataclass(frozen=True, slots=True)
class Match:
    """One site: a module path or a tensor name, its module, and the match of the regex that found it."""

    path: str
    module: Module
    match: re.Match[str] | None


@dataclass(frozen=True, slots=True)
class Selection:
    """The sites of one edit, in order of the checkpoint."""

    edit: Edit
    matches: tuple[Match, ...]


def select(edit: Edit, modules: Mapping[str, Module], architecture: Architecture) -> Selection:
    """The sites that `edit` names. Raises SpecError for a regex without a match, or a broken `expect`."""
    candidates = _candidates(edit, modules)
    matches, problems = _match(edit, candidates, architecture)
    excepted, except_problems = _excepted(edit, candidates)
    problems += except_problems
    kept = tuple(match for match in matches if match.path not in excepted)
    if not problems and not kept:
        what = f"`except` takes away all {len(matches)} {edit.op.selects} that were selected"
        problems.append(Problem(what, edit.pattern_place, "narrow `except`"))
    expect = edit.patterns.expect
    if not problems and expect is not None and len(kept) != expect:
        what = f"expected {expect} {edit.op.selects}, matched {len(kept)}: {_examples(kept)}"
        problems.append(Problem(what, edit.pattern_place, f"correct the regex, or write `expect: {len(kept)}`"))
    if problems:
        raise SpecError(*problems)
    return Selection(edit, kept)


def _examples(matches: tuple[Match, ...]) -> str:
    names = [match.path for match in matches]
    return ", ".join(names[:3]) + (" ..." if len(names) > 3 else "")


def _candidates(edit: Edit, modules: Mapping[str, Module]) -> Mapping[str, Module]:
    if edit.op.selects == "modules":
        return modules
    return {tensor: module for module in modules.values() for tensor in module.tensors}


def _match(
    edit: Edit, candidates: Mapping[str, Module], architecture: Architecture
) -> tuple[list[Match], list[Problem]]:
    if edit.patterns.all_linear:
        found = [
            Match(path, module, None)
            for path, module in candidates.items()
            if edit.op.in_all_linear(module, architecture)
        ]
        problem = Problem("`all-linear` matches nothing: no Linear that this op takes is left", edit.pattern_place)
        return found, [] if found else [problem]
    unused = dict.fromkeys(edit.patterns.regexes)
    matches: list[Match] = []
    for path, module in candidates.items():
        hits = [(regex, match) for regex in edit.patterns.regexes if (match := regex.fullmatch(path))]
        if hits:
            matches.append(Match(path, module, hits[0][1]))
        for regex, _ in hits:
            unused.pop(regex, None)
    return matches, [_no_match(edit, regex, candidates) for regex in unused]


def _excepted(edit: Edit, candidates: Mapping[str, Module]) -> tuple[set[str], list[Problem]]:
    excepted: set[str] = set()
    problems: list[Problem] = []
    for regex in edit.patterns.excepts:
        hits = {path for path in candidates if regex.fullmatch(path)}
        excepted |= hits
        if not hits:
            problems.append(_no_match(edit, regex, candidates, "`except` "))
    return excepted, problems


def _no_match(edit: Edit, regex: re.Pattern[str], candidates: Iterable[str], kind: str = "") -> Problem:
    names = list(candidates)
    what = f"{kind}`{regex.pattern}` matches none of {len(names)} {edit.op.selects}"
    return Problem(
        what, edit.except_place if kind else edit.pattern_place, _nearest(regex.pattern, names, edit.op.selects)
    )


def _nearest(pattern: str, names: list[str], noun: str) -> str:
    families: dict[str, int] = {}
    for name in names:
        family = re.sub(r"(?<![^.])\d+(?![^.])", r"\\d+", re.escape(name).replace(r"\.", "."))
        families[family] = families.get(family, 0) + 1
    written = {family: re.sub(r"(?<!\\)\.", r"\\.", family) for family in families}
    near = difflib.get_close_matches(pattern, list(written.values()), 1, 0.3)
    if not near:
        return f"`surgery inspect` lists the {noun}"
    count = next(families[family] for family, text in written.items() if text == near[0])
    singular = noun[:-1] if count == 1 else noun
    return f"did you mean `{near[0]}` ({count} {singular})?"
