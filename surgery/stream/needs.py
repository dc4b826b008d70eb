"""What a run will read, in the order in which it will: known from the plan, so that it can be fetched ahead."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from surgery.checkpoint import Checkpoint
from surgery.checkpoint.remote import RemoteFile
from surgery.stream.ranges import Wanted

__all__ = ["Name", "Step", "kept_for_later", "wanted_of"]

Name = tuple[str, str]  # the model, and the tensor in it


@dataclass(frozen=True, slots=True)
class Step:
    """The reads for one group of outputs."""

    tensors: tuple[Name, ...]  # read side by side, after those that are needed whole
    again: bool  # whether they are read more than once
    num_written: int  # bytes


def wanted_of(steps: Sequence[Step], checkpoints: Mapping[str, Checkpoint], cut: int) -> list[Wanted]:
    """What is read of files on the Hub, in pieces of at most `cut` bytes: of each tensor at its first reading."""
    wanted: list[Wanted] = []
    seen: set[Name] = set()
    for number, step in enumerate(steps):
        pieces: list[tuple[float, int, tuple[str, str], int, int]] = []
        for place, name in enumerate(dict.fromkeys(step.tensors)):
            entry = checkpoints[name[0]].tensors[name[1]]
            if name in seen or not isinstance(entry.file.place, RemoteFile):
                continue
            seen.add(name)
            for start in range(entry.start, entry.stop, cut):
                stop = min(start + cut, entry.stop)
                share = (start - entry.start) / (entry.stop - entry.start)
                pieces.append((share, place, (name[0], entry.file.name), start, stop))
        for _, _, key, start, stop in sorted(pieces):
            wanted.append(Wanted(key, start, stop, len(wanted), number))
    return wanted


def kept_for_later(
    steps: Sequence[Step], checkpoints: Mapping[str, Checkpoint], memory: int, most_files: int
) -> dict[Name, int]:
    """The tensors on the Hub that are written to scratch when they are first read, with the last step that reads them.

    Scratch and what is written of the output by then never take more than the output and `memory` bytes; what does
    not fit, or would be more than `most_files` at a time, is fetched again.
    """
    uses: dict[Name, list[int]] = {}
    for number, step in enumerate(steps):
        for name in step.tensors:
            if isinstance(checkpoints[name[0]].tensors[name[1]].file.place, RemoteFile):
                uses.setdefault(name, []).append(number)
    left = [0] * (len(steps) + 1)  # bytes of the output that are not written before a step is over
    for number in range(len(steps) - 1, -1, -1):
        left[number] = left[number + 1] + steps[number].num_written
    kept: dict[Name, int] = {}
    active: list[tuple[int, int]] = []  # last step, bytes
    for name, numbers in uses.items():
        if len(numbers) == 1 and not steps[numbers[0]].again:
            continue
        num_bytes = checkpoints[name[0]].tensors[name[1]].type.num_bytes
        active = [(last, size) for last, size in active if last >= numbers[0]]
        if sum(size for _, size in active) + num_bytes <= memory + left[numbers[-1] + 1] and len(active) < most_files:
            kept[name] = numbers[-1]
            active.append((numbers[-1], num_bytes))
    return kept
