"""Which value of `rank_pattern` or `alpha_pattern` counts at a module.

Why an index: such a map may name every module of a model, and so would every one be held against every other.
"""

from __future__ import annotations

from collections.abc import Mapping

from surgery.regexes import Limit, Regex, as_literals

__all__ = ["Patterns", "ending_in"]


class Patterns:
    """Values by regexes that match a module's path or its end, as PEFT means them: the first that matches counts.

    Source: PEFT 0.21, `get_pattern_key`. Raises OpError for what is no regex, or one that takes too long to match.
    """

    def __init__(self, values: Mapping[str, object], limit: Limit) -> None:
        self._values = list(values.items())
        self._whole: dict[str, int] = {}
        self._ends: dict[str, int] = {}
        self._regexes: list[tuple[int, Regex]] = []
        for place, (pattern, _) in enumerate(self._values):
            anchored = pattern.startswith("^")
            names = as_literals(pattern[1:] if anchored else pattern)
            if not names or (anchored and len(names) > 1):
                self._regexes.append((place, Regex(ending_in(pattern), limit)))
                continue
            for name in names:
                (self._whole if anchored else self._ends).setdefault(name, place)

    def value(self, path: str) -> tuple[object] | None:
        """What the first pattern that matches gives the module `path`; None where none does."""
        places = [self._whole.get(path), self._ends.get(path)]
        places += [self._ends.get(path[dot + 1 :]) for dot, char in enumerate(path) if char == "."]
        first = min((place for place in places if place is not None), default=len(self._values))
        for place, regex in self._regexes:
            if place > first:
                break
            if regex.fullmatch(path):
                first = place
                break
        return (self._values[first][1],) if first < len(self._values) else None


def ending_in(pattern: str) -> str:
    """The regex for a path that `pattern` matches, or the end of it does."""
    return rf"(.*\.)?({pattern})"
