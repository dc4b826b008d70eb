"""Numbers that may change over the depth of a model, or from tensor to tensor.

As mergekit means them: a list is interpolated over the layers of a stack, from its first to its last;
what lies outside of the layers (embeddings, final norm, head) takes the first value.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import cast

from surgery.errors import OpError, Problem
from surgery.regexes import Limit, Regex, flaw

__all__ = ["SCHEDULE_SCHEMA", "Depths", "Schedule"]

LAYER = re.compile(r"(?P<stack>(?:.*?\.)?)(?P<index>\d+)\..*")

RANGES = {"density": (0.0, 1.0), "gamma": (0.0, 1.0), "epsilon": (0.0, 1.0), "select_topk": (0.0, 1.0)}

_NUMBERS: dict[str, object] = {"type": "array", "items": {"type": "number"}, "minItems": 1}
SCHEDULE_SCHEMA: dict[str, object] = {
    "anyOf": [
        {"type": "number"},
        _NUMBERS,
        {"type": "object", "minProperties": 1, "additionalProperties": {"anyOf": [{"type": "number"}, _NUMBERS]}},
    ]
}


class Depths:
    """Where each tensor lies in its stack of layers: 0 in the first, 1 in the last."""

    def __init__(self, names: Iterable[str]) -> None:
        self._last: dict[str, int] = {}
        for name in names:
            layer = LAYER.fullmatch(name)
            if layer:
                self._last[layer["stack"]] = max(self._last.get(layer["stack"], 0), int(layer["index"]))

    def of(self, name: str) -> float:
        """The depth of tensor `name`; 0 outside of the layers, 1 in the only layer of a stack."""
        layer = LAYER.fullmatch(name)
        if layer is None:
            return 0.0
        last = self._last.get(layer["stack"], 0)
        return int(layer["index"]) / last if last else 1.0


@dataclass(slots=True)
class Schedule:
    """A number, a gradient over depth, or either by a regex that matches the tensor's name in full."""

    label: str  # as an error names it
    default: float | None
    rules: list[tuple[Regex | None, tuple[float, ...]]]
    unused: set[str] = field(default_factory=set[str])

    @classmethod
    def parse(cls, label: str, value: object, default: float | None = None) -> Schedule:
        """From the value in the spec; None is the default. Raises OpError for what is no regex, or no number."""
        found = cls._parse(label, value, default)
        least, most = RANGES.get(label.rpartition(".")[2], (-math.inf, math.inf))
        for _, numbers in found.rules:
            for number in numbers:
                if not math.isfinite(number) or not least <= number <= most:
                    wanted = f"from {least:g} to {most:g}" if math.isfinite(most) else "finite"
                    raise OpError(Problem(f"`{label}` is {number}", fix=f"give a number that is {wanted}"))
        return found

    @classmethod
    def _parse(cls, label: str, value: object, default: float | None) -> Schedule:
        if value is None:
            return cls(label, default, [])
        if not isinstance(value, Mapping):
            return cls(label, default, [(None, _numbers(value))])
        rules: list[tuple[Regex | None, tuple[float, ...]]] = []
        limit = Limit(f" of `{label}`")
        for regex, entry in cast("Mapping[str, object]", value).items():
            if reason := flaw(regex):
                fix = "escape dots as `\\.`, and put the regex in single quotes"
                raise OpError(Problem(f"`{regex}` of `{label}` is no regex: {reason}", fix=fix))
            rules.append((Regex(regex, limit), _numbers(entry)))
        return cls(label, default, rules, {regex.pattern for regex, _ in rules if regex})

    def at(self, name: str, depth: float) -> float:
        """The number for tensor `name`: of the first regex that matches. Raises OpError if there is none."""
        for regex, numbers in self.rules:
            if regex is None or regex.fullmatch(name):
                self.unused.discard(regex.pattern if regex else "")
                return _interpolate(numbers, depth)
        if self.default is None:
            what = f"`{name}` has no `{self.label}`: none of its regexes matches"
            raise OpError(Problem(what, fix="add `'.*': NUMBER` as the last one, for the rest"))
        return self.default

    def see(self, name: str) -> None:
        """Note which regexes match `name`, first or not: one that matches nothing is a mistake."""
        if self.unused:
            self.unused -= {regex.pattern for regex, _ in self.rules if regex and regex.fullmatch(name)}

    def check_used(self) -> None:
        """Raises OpError for a regex that matched no tensor."""
        problems = [
            Problem(f"`{pattern}` of `{self.label}` matches no tensor of this edit", fix=_fix(pattern))
            for pattern in sorted(self.unused)
        ]
        if problems:
            raise OpError(*problems)


def _fix(pattern: str) -> str:
    if re.fullmatch(r"[\w.]+", pattern):
        return f"a regex must match the name in full: write `'.*{re.escape(pattern)}.*'` for names that contain it"
    return "correct it, or take it away; `surgery inspect` lists the tensors"


def _numbers(value: object) -> tuple[float, ...]:
    if isinstance(value, list):
        return tuple(float(cast(float, item)) for item in cast("list[object]", value))
    return (float(cast(float, value)),)


def _interpolate(numbers: tuple[float, ...], depth: float) -> float:
    if len(numbers) == 1:
        return numbers[0]
    scaled = depth * (len(numbers) - 1)
    first = int(scaled)
    second = min(len(numbers) - 1, first + 1)
    share = scaled - first
    return (1 - share) * numbers[first] + share * numbers[second]
