"""`Selection`: an edit bound to the sites that its regexes matched."""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from operator import itemgetter

from surgery.checkpoint.architecture import Architecture
from surgery.checkpoint.modules import Module
from surgery.errors import Problem, SpecError
from surgery.regexes import Limit, Regex, flaw, matching
from surgery.spec import ALL_LINEAR, Edit

__all__ = ["Match", "Selection", "select"]

MOST_UNMATCHED = 20  # regexes that are explained; more of them are read by nobody
MOST_COMPARED = 1000  # families of names; comparing texts takes time
LONGEST_COMPARED = 300


@dataclass(frozen=True, slots=True)
class Match:
    """One site: a module path or a tensor name, its module, and the match of the regex that found it."""

    path: str
    module: Module
    match: re.Match[str] | None


@dataclass(frozen=True, slots=True)
class Selection:
    """The sites of one edit, in order of the checkpoint; none for an op on the whole checkpoint."""

    edit: Edit
    matches: tuple[Match, ...]


def select(edit: Edit, modules: Mapping[str, Module], architecture: Architecture) -> Selection:
    """The sites that `edit` names. Raises SpecError for a regex without a match, or a broken `expect`."""
    if edit.op.selects == "checkpoint":
        return Selection(edit, ())
    candidates = _candidates(edit, modules)
    matches, problems = _match(edit, candidates, architecture)
    excepted, except_problems = _excepted(edit, candidates, [match.path for match in matches])
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
    if not edit.patterns.regexes:
        return [Match(path, module, None) for path, module in candidates.items()], []
    regexes = _limited(edit.patterns.regexes, edit.pattern_place)
    unused, hits_of = dict.fromkeys(regexes), _finder(regexes)
    matches: list[Match] = []
    for path, module in candidates.items():
        hits = hits_of(path)
        if hits:
            matches.append(Match(path, module, hits[0][1]))
        for regex, _ in hits:
            unused.pop(regex, None)
    return matches, _explained(unused, edit.pattern_place, lambda regex: _no_match(edit, regex, candidates))


def _excepted(edit: Edit, candidates: Mapping[str, Module], selected: list[str]) -> tuple[set[str], list[Problem]]:
    regexes = _limited(edit.patterns.excepts, edit.except_place) if selected else []
    unused, hits_of = dict.fromkeys(regexes), _finder(regexes)
    excepted: set[str] = set()
    for path in selected:
        for regex, _ in hits_of(path):
            unused.pop(regex, None)
            excepted.add(path)
    return excepted, _explained(unused, edit.except_place, lambda regex: _no_except(edit, regex, candidates, selected))


def _no_except(edit: Edit, regex: Regex, candidates: Iterable[str], selected: list[str]) -> Problem:
    others = sum(regex.fullmatch(path) is not None for path in candidates)
    what = f"`except` `{regex.pattern}` takes nothing away from the {len(selected)} {edit.op.selects} selected"
    what += f": none of the {others} that it matches is among them" if others else ""
    return Problem(what, edit.except_place, _nearest(regex.pattern, selected, edit.op.selects))


def _explained(unused: Iterable[Regex], place: str, problem: Callable[[Regex], Problem]) -> list[Problem]:
    """A problem for each of the first, and how many there are beyond."""
    regexes = list(unused)
    left = len(regexes) - MOST_UNMATCHED
    more = [Problem(f"and {left} more regexes that match nothing", place)] if left > 0 else []
    return [*map(problem, regexes[:MOST_UNMATCHED]), *more]


def _finder(regexes: Iterable[Regex]) -> Callable[[str], list[tuple[Regex, re.Match[str]]]]:
    """What gives the regexes that match a name, in order. Plain names, of which there can be many, are looked up."""
    named: dict[str, list[tuple[int, Regex]]] = {}
    others: list[tuple[int, Regex]] = []
    for item in enumerate(regexes):
        for name in item[1].literals:
            named.setdefault(name, []).append(item)
        if not item[1].literals:
            others.append(item)

    def hits_of(name: str) -> list[tuple[Regex, re.Match[str]]]:
        tried = sorted([*named[name], *others], key=itemgetter(0)) if name in named else others
        return [(regex, match) for _, regex in tried if (match := regex.fullmatch(name))]

    return hits_of


def _limited(regexes: Iterable[re.Pattern[str]], place: str) -> list[Regex]:
    """The same regexes, under one limit of time."""
    limit = Limit(at=place, error=SpecError)
    return [Regex(regex.pattern, limit) for regex in dict.fromkeys(regexes)]


def _no_match(edit: Edit, regex: Regex, candidates: Iterable[str]) -> Problem:
    names, noun = list(candidates), edit.op.selects
    what = f"`{regex.pattern}` matches none of {len(names)} {noun}"
    fix = _slip(regex.pattern, names) if noun == "modules" else ""
    return Problem(what, edit.pattern_place, fix or _nearest(regex.pattern, names, noun))


def _slip(pattern: str, modules: list[str]) -> str:
    """How to mend what is almost right: an end of paths as in PEFT, a tensor's name, or a misspelt `all-linear`."""
    if difflib.get_close_matches(pattern, [ALL_LINEAR], 1, 0.8):
        return f"did you mean `{ALL_LINEAR}`?"
    ends = sum(path.endswith(f".{pattern}") for path in modules)
    if ends:
        return f"a regex matches a path in full: did you mean `.*\\.{re.escape(pattern)}` ({ends} modules)?"
    without = re.sub(r"(\\?\.|\.\*)?(weight|bias)$", "", pattern)
    count = 0 if without == pattern or flaw(without) else len(matching(without, modules))
    return f"these are names of tensors; their modules are `{without}` ({count} modules)" if count else ""


def _nearest(pattern: str, names: list[str], noun: str) -> str:
    families: dict[str, int] = {}
    for name in names:
        family = re.sub(r"(?<![^.])\d+(?![^.])", r"\\d+", re.escape(name).replace(r"\.", "."))
        families[family] = families.get(family, 0) + 1
    written = {re.sub(r"(?<!\\)\.", r"\\.", family): count for family, count in families.items()}
    likely = [family for family in written if len(family) <= LONGEST_COMPARED][:MOST_COMPARED]
    near = difflib.get_close_matches(pattern[:LONGEST_COMPARED], likely, 1, 0.3)
    if not near:
        return f"`surgery inspect` lists the {noun}"
    count = written[near[0]]
    return f"did you mean `{near[0]}` ({count} {noun if count > 1 else noun[:-1]})?"
