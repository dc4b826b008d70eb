"""Threading names through the edits: what every name stands for after each edit."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

from surgery.checkpoint import Checkpoint
from surgery.checkpoint.architecture import Architecture, architecture_of
from surgery.checkpoint.modules import Module, modules_of
from surgery.errors import OpError, Problem, SurgeryError, problems_of
from surgery.graph import Graph, Node, Source
from surgery.op import Rewrite, Site
from surgery.select import Match, Selection, select
from surgery.spec import Edit, Spec

__all__ = ["Entry", "Names", "run_edits"]

SOURCE = "source"


@dataclass(frozen=True, slots=True)
class Entry:
    """What a name stands for: a node, and the indices of the edits that made it so."""

    node: Node
    edits: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class Names:
    """Every name of the checkpoint after some edits, in order; and what edits dropped by name."""

    entries: Mapping[str, Entry]
    dropped: Mapping[str, Node]
    architecture: Architecture

    def modules(self) -> dict[str, Module]:
        """The module tree of these names."""
        return modules_of({name: entry.node.type for name, entry in self.entries.items()}, self.architecture)


def run_edits(spec: Spec, checkpoint: Checkpoint, graph: Graph) -> tuple[Names, list[Selection]]:
    """The names after all edits. Raises SpecError or OpError with the problems of every edit."""
    names = _initial(checkpoint, graph)
    selections: list[Selection] = []
    errors: list[SurgeryError] = []
    for edit in spec.edits:
        try:
            selection = select(edit, names.modules(), names.architecture)
            names = _apply(selection, names, checkpoint, graph, spec)
            selections.append(selection)
        except SurgeryError as error:
            errors.append(error)
    if errors:
        raise type(errors[0])(*problems_of(errors))
    return names, selections


def _initial(checkpoint: Checkpoint, graph: Graph) -> Names:
    entries = {
        name: Entry(graph.apply(Source(SOURCE, name, entry.type))[0]) for name, entry in checkpoint.tensors.items()
    }
    return Names(entries, {}, architecture_of(checkpoint.config))


def _apply(selection: Selection, names: Names, checkpoint: Checkpoint, graph: Graph, spec: Spec) -> Names:
    edit = selection.edit
    rewrites: list[Rewrite] = []
    refusals: list[tuple[str, Problem]] = []
    for match in selection.matches:
        try:
            rewrites.append(edit.op.rewrite(_site(match, edit, names, checkpoint, graph, spec)))
        except OpError as error:
            refusals += [(match.path, problem) for problem in error.problems]
    problems = [*_folded(refusals, edit), *_collisions(edit, rewrites, names)]
    if problems:
        raise OpError(*problems)
    return _rewritten(edit, rewrites, names)


def _folded(refusals: list[tuple[str, Problem]], edit: Edit) -> Iterator[Problem]:
    """One problem for all sites that are refused for the same reason: a regex can match thousands."""
    reasons: dict[tuple[str, str], list[tuple[str, Problem]]] = {}
    for path, problem in refusals:
        reason = (problem.what.replace(path, ""), problem.fix.replace(path, ""))
        reasons.setdefault(reason, []).append((path, problem))
    for (path, problem), *others in reasons.values():
        more = f" (and {len(others)} more {edit.op.selects} like it)" if others else ""
        yield Problem(problem.what.replace(f"`{path}`", f"`{path}`{more}", 1), edit.place, problem.fix)


def _site(match: Match, edit: Edit, names: Names, checkpoint: Checkpoint, graph: Graph, spec: Spec) -> Site:
    held = match.module.tensors if edit.op.selects == "modules" else (match.path,)
    entries = {name: names.entries[name] for name in held}

    def read_record(node: Node) -> bytes:
        if not isinstance(node.kernel, Source):
            raise OpError(Problem(f"{node.type} is not on disk yet"))
        return checkpoint.read_record(node.kernel.name)

    return Site(
        path=match.path,
        module=match.module,
        nodes={name: entry.node for name, entry in entries.items()},
        graph=graph,
        architecture=names.architecture,
        config=checkpoint.config or {},
        read_record=read_record,
        touched_by=_last_edit(entries.values(), spec),
        match=match.match,
    )


def _last_edit(entries: Iterable[Entry], spec: Spec) -> str:
    touching = {index for entry in entries for index in entry.edits}
    last = next((edit for edit in reversed(spec.edits) if edit.index in touching), None)
    return f"{last} at {last.place}" if last else ""


def _collisions(edit: Edit, rewrites: list[Rewrite], names: Names) -> list[Problem]:
    taken = {name for rewrite in rewrites for name in rewrite.takes}
    given: set[str] = set()
    collisions: list[tuple[str, str]] = []
    for rewrite in rewrites:
        for name in rewrite.gives:
            if name in given or (name in names.entries and name not in taken):
                collisions.append((rewrite.takes[0], name))
            given.add(name)
    more = f" (and {len(collisions) - 1} more like it)" if len(collisions) > 1 else ""
    what = [f"`{old}` would become `{new}`, a name that another tensor has{more}" for old, new in collisions[:1]]
    return [Problem(text, edit.place, "rename or drop the other one first") for text in what]


def _rewritten(edit: Edit, rewrites: list[Rewrite], names: Names) -> Names:
    by_first = {rewrite.takes[0]: rewrite for rewrite in rewrites}
    taken = {name for rewrite in rewrites for name in rewrite.takes}
    entries: dict[str, Entry] = {}
    for name, entry in names.entries.items():
        if name in by_first:
            rewrite = by_first[name]
            before = {index for taken_name in rewrite.takes for index in names.entries[taken_name].edits}
            edits = (*sorted(before), edit.index)
            entries |= {given: Entry(node, edits) for given, node in rewrite.gives.items()}
        elif name not in taken:
            entries[name] = entry
    dropped = {name: names.entries[name].node for rewrite in rewrites for name in rewrite.drops}
    return Names(entries, {**names.dropped, **dropped}, names.architecture)
