"""Regexes that others wrote, in a spec or in a downloaded config, matched in bounded time.

Why not `re` alone: it backtracks without a limit, and holds the interpreter's lock meanwhile, so that not even
another thread could stop it. `re` says what is a regex; the package `regex`, of which `re`'s language is a part,
finds the match under a limit of time. Alternatives of plain names, as adapters list them by the thousand, are
looked up instead.
"""

from __future__ import annotations

import math
import re
import time
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import cast

from surgery.errors import OpError, Problem, SurgeryError

__all__ = ["Limit", "Regex", "as_literals", "flaw", "matching"]

MAX_LENGTH = 4000  # a pattern of so many classes is compiled in seconds, not minutes
MAX_REPEATS = 1000  # `regex` writes repetitions out, and those within others again
MAX_SECONDS = 5.0
SECONDS_PER_MATCH = 1e-4  # what each match adds to that; a simple one takes 5 µs

_LITERALS = re.compile(r"(?:[\w/@:;,!\"'<>=% -]|\\[^\w\s])+(?:\|(?:[\w/@:;,!\"'<>=% -]|\\[^\w\s])+)*")
_ANYTHING = re.compile(".*", re.DOTALL)
_ESCAPE = re.compile(r"\\(.)")
_REPEAT = re.compile(r"\{(\d*)(?:,(\d*))?\}")
# What `regex` reads as something of its own, and `re` as plain characters.
_NESTED = re.compile(r"(?<!\\)\[\^?\]?(?:[^\]\\]|\\.)*?(?:\[|--|&&|~~|\|\|)")
_EXTENSIONS = re.compile(r"\[\[:|(?<!\\)\{[^0-9,}]")


def flaw(pattern: str) -> str:
    """Why `pattern` is no regex; empty if it is one."""
    if as_literals(pattern):
        return ""
    if len(pattern) > MAX_LENGTH:
        return f"it has {len(pattern)} characters, more than {MAX_LENGTH}"
    if found := _EXTENSIONS.search(pattern):
        return f"a plain `{found[0][0]}` is written `\\{found[0][0]}`"
    if _NESTED.search(pattern):
        return r"in a set, `[`, `--`, `&&`, `||` and `~~` are written with a backslash"
    try:
        if _repeats(pattern) > MAX_REPEATS:
            return f"its repetitions multiply to more than {MAX_REPEATS}"
        re.compile(pattern)
    except (re.error, RecursionError, OverflowError, ValueError, FutureWarning) as error:
        return str(error)
    return ""


def _repeats(pattern: str) -> int:
    """At most how often the innermost part is written out: as if each repetition stood within the others."""
    return math.prod(max(1, *(int(count or 1) for count in counts)) for counts in _REPEAT.findall(pattern))


def as_literals(pattern: str) -> frozenset[str]:
    """The names that `pattern` is an alternation of; none if it is anything else."""
    if not _LITERALS.fullmatch(pattern):
        return frozenset()
    return frozenset(_ESCAPE.sub(r"\1", name) for name in pattern.split("|"))


@dataclass(slots=True)
class Limit:
    """The time that some regexes share, and the error when it is over; `of` says whose they are."""

    of: str = ""
    at: str = ""
    error: type[SurgeryError] = OpError
    seconds: float = field(default_factory=lambda: MAX_SECONDS)


class Regex:
    """One regex. Raises the limit's error if it is none, and for a match that takes too long."""

    __slots__ = ("_compiled", "_limit", "_literals", "pattern")

    def __init__(self, pattern: str, limit: Limit) -> None:
        self.pattern = pattern
        self._limit = limit
        self._literals = as_literals(pattern)
        self._compiled = None if self._literals else self._compile()

    def _compile(self) -> re.Pattern[str]:
        import regex  # pyright: ignore[reportMissingTypeStubs]

        reason = flaw(self.pattern)
        try:
            if not reason:
                return cast("re.Pattern[str]", regex.compile(self.pattern))  # pyright: ignore[reportUnknownMemberType]
        except (regex.error, RecursionError, MemoryError) as error:
            reason = str(error)
        raise self._limit.error(Problem(f"`{self.pattern}`{self._limit.of} is no regex: {reason}", self._limit.at))

    def fullmatch(self, name: str) -> re.Match[str] | None:
        """The match of all of `name`."""
        if self._compiled is None:
            return _ANYTHING.fullmatch(name) if name in self._literals else None
        limit = self._limit
        limit.seconds += SECONDS_PER_MATCH
        begun = time.perf_counter()
        try:
            return self._compiled.fullmatch(name, timeout=max(limit.seconds, SECONDS_PER_MATCH))  # pyright: ignore
        except (TimeoutError, MemoryError, RecursionError):
            what = f"`{self.pattern}`{limit.of} takes more than {MAX_SECONDS:g} s to match, at `{name}`"
            fix = "write it without one repetition inside of another, such as `(a+)+` or `(.*x.*)*`"
            raise limit.error(Problem(what, limit.at, fix)) from None
        finally:
            limit.seconds -= time.perf_counter() - begun


def matching(pattern: str, names: Iterable[str], limit: Limit | None = None) -> list[str]:
    """Those of `names` that `pattern` matches in full. Raises OpError, or the limit's error, as `Regex` does."""
    regex = Regex(pattern, limit or Limit())
    return [name for name in names if regex.fullmatch(name)]
