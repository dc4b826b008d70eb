"""Threading names through the edits: what every name stands for after each edit."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from surgery.checkpoint import Checkpoint
from surgery.checkpoint.architecture import Architecture, architecture_of
from surgery.checkpoint.modules import Module, modules_of
from surgery.errors import OpError, Problem, SurgeryError, most, problems_of
from surgery.graph import Graph, Node, Source
from surgery.op import SOURCE, Attach, Model, Rewrite, Scene, Site
from surgery.select import Match, select
from surgery.spec import Edit, Spec

__all__ = ["Attachment", "Entry", "Names", "open_models", "run_edits"]


@dataclass(frozen=True, slots=True)
class Entry:
    """What a name stands for: a node, and the indices of the edits that made it so."""

    node: Node
    edits: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class Attachment:
    """An adapter that an edit writes: the edit, what it saw, and the adapter's tensors by name in its file."""

    edit: Edit
    op: Attach
    scene: Scene
    nodes: Mapping[str, Node]
    given: Mapping[str, Node]  # what the edit left of tensors of the checkpoint that it took from


@dataclass(frozen=True, slots=True)
class Names:
    """Every name of the checkpoint after some edits, in order; and what edits dropped by name, and attached."""

    entries: Mapping[str, Entry]
    dropped: Mapping[tuple[int, str], Node]  # by the edit that dropped it, and its name then
    attachments: tuple[Attachment, ...]
    architecture: Architecture

    def modules(self) -> dict[str, Module]:
        """The module tree of these names."""
        return modules_of({name: entry.node.type for name, entry in self.entries.items()}, self.architecture)


def open_models(checkpoints: Mapping[str, Checkpoint], graph: Graph) -> dict[str, Model]:
    """The source and the further models, every tensor a node."""
    return {
        name: Model(
            name,
            checkpoint,
            {tensor: graph.apply(Source(name, tensor, entry.type))[0] for tensor, entry in checkpoint.tensors.items()},
            architecture_of(checkpoint.config),
        )
        for name, checkpoint in checkpoints.items()
    }


def run_edits(spec: Spec, models: Mapping[str, Model], graph: Graph) -> tuple[Names, list[tuple[Edit, int]]]:
    """The names after all edits, and each edit with how much it matched.

    Raises SpecError or OpError with the problems of every edit.
    """
    source = models[SOURCE]
    names = Names({name: Entry(node) for name, node in source.nodes.items()}, {}, (), source.architecture)
    matched: list[tuple[Edit, int]] = []
    errors: list[SurgeryError] = []
    for edit in spec.edits:
        try:
            names, count = _apply(edit, names, models, graph, spec)
            matched.append((edit, count))
        except SurgeryError as error:
            errors.append(error)
    if errors:
        raise type(errors[0])(*most(problems_of(errors), spec.document.file))
    return names, matched


def _apply(edit: Edit, names: Names, models: Mapping[str, Model], graph: Graph, spec: Spec) -> tuple[Names, int]:
    modules = names.modules()
    selection = select(edit, modules, names.architecture)
    scene = Scene(
        names={name: entry.node for name, entry in names.entries.items()},
        modules=modules,
        config=models[SOURCE].config,
        architecture=names.architecture,
        models=models,
        graph=graph,
        seed=spec.seed,
    )
    scene = replace(scene, sites=[_site(match, edit, names, scene, spec) for match in selection.matches])
    rewrites, problems = _rewrites(edit, scene)
    problems += _collisions(edit, rewrites, names)
    if problems:
        raise OpError(*problems)
    rewritten = _rewritten(edit, rewrites, names)
    if isinstance(edit.op, Attach):
        given = {name: node for rewrite in rewrites for name, node in rewrite.gives.items()}
        attachment = Attachment(edit, edit.op, scene, _added(edit, rewrites), given)
        rewritten = replace(rewritten, attachments=(*names.attachments, attachment))
    if edit.op.selects == "checkpoint":
        return rewritten, sum(len(rewrite.takes) for rewrite in rewrites)
    return rewritten, len(scene.sites)


def _added(edit: Edit, rewrites: Sequence[Rewrite]) -> dict[str, Node]:
    added: dict[str, Node] = {}
    for rewrite in rewrites:
        twice = next((key for key in rewrite.adds if key in added), None)
        if twice is not None:
            raise OpError(Problem(f"`{twice}` would be in the adapter twice", edit.place, "narrow what is selected"))
        added |= rewrite.adds
    if not added:
        raise OpError(Problem("the adapter would hold no tensor", edit.place))
    return added


def _rewrites(edit: Edit, scene: Scene) -> tuple[list[Rewrite], list[Problem]]:
    try:
        if edit.op.selects == "checkpoint":
            return [edit.op.rewrite_all(scene)], []
        rewrite = edit.op.begin(scene)
    except OpError as error:
        return [], [replace(problem, at=problem.at or edit.place) for problem in error.problems]
    rewrites: list[Rewrite] = []
    refusals: list[tuple[str, Problem]] = []
    for site in scene.sites:
        try:
            rewrites.append(rewrite(site))
        except OpError as error:
            refusals += [(site.path, problem) for problem in error.problems]
    return rewrites, list(_folded(refusals, edit))


def _folded(refusals: list[tuple[str, Problem]], edit: Edit) -> Iterator[Problem]:
    """One problem for all sites that are refused for the same reason: a regex can match thousands."""
    reasons: dict[tuple[str, str], list[tuple[str, Problem]]] = {}
    for path, problem in refusals:
        reason = (problem.what.replace(path, ""), problem.fix.replace(path, ""))
        reasons.setdefault(reason, []).append((path, problem))
    for (path, problem), *others in reasons.values():
        more = f" (and {len(others)} more {edit.op.selects} like it)" if others else ""
        yield Problem(problem.what.replace(f"`{path}`", f"`{path}`{more}", 1), edit.place, problem.fix)


def _site(match: Match, edit: Edit, names: Names, scene: Scene, spec: Spec) -> Site:
    held = match.module.tensors if edit.op.selects == "modules" else (match.path,)
    entries = {name: names.entries[name] for name in held}
    return Site(
        path=match.path,
        module=match.module,
        nodes={name: entry.node for name, entry in entries.items()},
        touched_by=_last_edit(entries.values(), spec),
        match=match.match,
        scene=scene,
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
    taken = {name for rewrite in rewrites for name in rewrite.takes}
    given: dict[str, dict[str, Entry]] = {}  # what comes in the place of each name
    touched: dict[tuple[int, ...], tuple[int, ...]] = {}
    for rewrite in rewrites:
        before = {index for name in rewrite.takes for index in names.entries[name].edits}
        edits = (*sorted(before), edit.index)
        edits = touched.setdefault(edits, edits)
        place = rewrite.takes[0] if rewrite.takes else ""
        for name, node in rewrite.gives.items():
            place = name if name in taken else place
            given.setdefault(place, {})[name] = Entry(node, edits)
    entries: dict[str, Entry] = {}
    for name, entry in names.entries.items():
        entries |= given.get(name, {} if name in taken else {name: entry})
    # A name may be dropped, given anew and dropped again: each time it stands for another tensor.
    dropped = {(edit.index, name): names.entries[name].node for rewrite in rewrites for name in rewrite.drops}
    return replace(names, entries=entries, dropped={**names.dropped, **dropped})
