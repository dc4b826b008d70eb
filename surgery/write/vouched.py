"""What of an earlier run may be gone on from: nothing that was made of bytes which no hash holds.

A file on the Hub that is needed whole is held against the sha256 that is listed. If the run was stopped before that,
the hash goes on where it was put down, so that it is one of the very bytes that were used, in whatever runs. What was
made of bytes behind that place is made again, and the place is moved back to where bytes are missing.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass

from surgery.checkpoint import SourceFile
from surgery.checkpoint.midstate import can_go_on
from surgery.checkpoint.remote import RemoteFile
from surgery.graph import Source, toposort
from surgery.layout import Placed
from surgery.plan import Plan
from surgery.stream import NOTHING, Begun, Earlier
from surgery.write.journal import Done

__all__ = ["vouched"]


@dataclass(slots=True)
class _Evaluation:
    """Outputs of one evaluation, and the bytes of unchecked files that they are made of: place, start, stop."""

    file: str
    outputs: list[Placed]
    extents: list[tuple[str, int, int]]
    is_there: bool


def vouched(done: Done, plan: Plan, hashed: Collection[str]) -> tuple[Done, Earlier]:
    """What of `done` was made of bytes that a hash holds, or will; and where that goes on.

    `hashed`: the models of which every file is hashed, also one that is needed in part.
    """
    if not done.tensors:
        return done, Earlier(done.checked)
    evaluations = list(_evaluations(done, plan, hashed))
    noted = done.hashed if can_go_on() else {}
    states = {place: sorted(noted.get(place, [])) for item in evaluations for place, _, _ in item.extents}
    begun = {place: found[-1] if found else NOTHING for place, found in states.items()}
    while True:
        for item in evaluations:
            for place, start, _ in item.extents if not item.is_there else ():
                begun[place] = _last(states[place], min(start, begun[place][0]))
        lost = [item for item in evaluations if item.is_there and not _is_held(item, begun)]
        if not lost:
            break
        for item in lost:
            item.is_there = False
    kept = Done(checked=done.checked, hashed={place: [state] for place, state in begun.items() if state[0]})
    for item in evaluations:
        if item.is_there:
            records = done.tensors[item.file]
            there = {placed.name: records[placed.name] for placed in item.outputs if placed.name in records}
            kept.tensors.setdefault(item.file, {}).update(there)
    for file, sha256 in done.sha256.items():
        if len(kept.tensors.get(file, {})) == len(done.tensors.get(file, {})):
            kept.sha256[file] = sha256
    return kept, Earlier(done.checked, {place: state for place, state in begun.items() if state[0]})


def _evaluations(done: Done, plan: Plan, hashed: Collection[str]) -> Iterator[_Evaluation]:
    sources = {
        (file.name, call): [node.kernel for node in toposort([outputs[0].node]) if isinstance(node.kernel, Source)]
        for file in plan.layout.files
        for call, outputs in file.by_call().items()
    }
    unchecked = _unchecked(done, plan, hashed, {(item.model, item.name) for used in sources.values() for item in used})
    for file in plan.layout.files:
        records = done.tensors.get(file.name, {})
        for call, outputs in file.by_call().items():
            entries = [plan.checkpoints[item.model].tensors[item.name] for item in sources[file.name, call]]
            extents = [(str(entry.file.place), entry.start, entry.stop) for entry in entries]
            is_there = all(placed.name in records for placed in outputs if placed.start < placed.stop)
            yield _Evaluation(file.name, outputs, [extent for extent in extents if extent[0] in unchecked], is_there)


def _unchecked(done: Done, plan: Plan, hashed: Collection[str], needed: Collection[tuple[str, str]]) -> set[str]:
    """The places of files that are to be held against their hashes, and were not."""

    def is_to_be(model: str, file: SourceFile) -> bool:
        return model in hashed or all((model, tensor) in needed for tensor in file.header.tensors)

    return {
        str(file.place)
        for model in plan.streamed
        for file in plan.checkpoints[model].files
        if isinstance(file.place, RemoteFile) and str(file.place) not in done.checked and is_to_be(model, file)
    }


def _last(states: list[Begun], position: int) -> Begun:
    """The last state of a hash that goes no further than `position`."""
    index = bisect_right(states, position, key=lambda state: state[0])
    return states[index - 1] if index else NOTHING


def _is_held(item: _Evaluation, begun: Mapping[str, Begun]) -> bool:
    return all(stop <= begun[place][0] for place, _, stop in item.extents)
