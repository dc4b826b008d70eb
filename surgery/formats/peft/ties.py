"""Tied pairs: an embedding and an output head that share one tensor, of which an adapter changes one side.

Why a choice: PEFT's merge changes the shared tensor, so both sides; while it was trained, the adapter changed its
own side only. Neither is right for everyone, so neither happens unasked.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Literal

from surgery.errors import OpError, Problem
from surgery.formats.peft.base import Base
from surgery.formats.peft.method import Change
from surgery.formats.peft.patch import AnyStep, Patch, Replacement

__all__ = ["Tied", "tied_patches"]

Tied = Literal["refuse", "both", "untie"]
FIX = (
    "`tied: both` changes the shared tensor, as PEFT's merge does; `tied: untie` writes the head as a tensor of its own"
    " and changes only the side that was trained"
)


def tied_patches(
    changes: Iterable[Change], head_changes: Iterable[Change], base: Base, tied: Tied, *, same: bool
) -> dict[str, Patch]:
    """Patches by tensor. `same`: the adapter was trained as one for both sides, so that it is folded once.

    Raises OpError if one side of a tied pair would be changed and `tied` does not say what is meant.
    """
    steps, head_steps = _steps(changes), list(head_changes)
    pair = base.tied_pair()
    if pair is None:
        return _patches(steps)
    shared, head = pair
    both = [change for change in steps.get(shared, ()) if change.ties] or [
        change for change in head_steps if change.ties
    ]
    own = [change for change in steps.get(shared, ()) if not change.ties]
    of_head = [change for change in head_steps if not change.ties]
    if same and own:
        of_head = []
    elif own or of_head:
        _refuse_unasked(head if of_head else shared, shared, tied)
        if tied == "both" and _replaces(own) and _replaces(of_head):
            what = f"the adapter stores both `{shared}` and `{head}`, which the base ties: one would be lost"
            raise OpError(Problem(what, fix="write `tied: untie`: the head becomes a tensor of its own"))
        if tied == "untie":
            return {
                **_patches(_with(steps, shared, [*own, *both])),
                head: Patch(head, _ordered([*of_head, *both]), shared),
            }
    return _patches(_with(steps, shared, [*own, *of_head, *both]))


def _replaces(changes: Sequence[Change]) -> bool:
    return any(isinstance(change.step, Replacement) and not change.step.restores for change in changes)


def _with(steps: Mapping[str, Sequence[Change]], tensor: str, changes: Sequence[Change]) -> dict[str, Sequence[Change]]:
    return {**steps, tensor: changes} if changes else dict(steps)


def _refuse_unasked(side: str, shared: str, tied: Tied) -> None:
    if tied == "refuse":
        what = f"`{side}` is changed by the adapter, and the base ties `{shared}` to its output head"
        raise OpError(Problem(what, fix=FIX))


def _steps(changes: Iterable[Change]) -> dict[str, list[Change]]:
    steps: dict[str, list[Change]] = {}
    for change in changes:
        steps.setdefault(change.tensor, []).append(change)
    return steps


def _patches(steps: Mapping[str, Sequence[Change]]) -> dict[str, Patch]:
    return {tensor: Patch(tensor, _ordered(changes)) for tensor, changes in steps.items()}


def _ordered(changes: Sequence[Change]) -> tuple[AnyStep, ...]:
    """What the adapter was trained on comes before what it trained."""
    return tuple(sorted((change.step for change in changes), key=_turn))


def _turn(step: AnyStep) -> int:
    return (0 if step.restores else 1) if isinstance(step, Replacement) else 2
