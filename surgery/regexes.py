"""Regexes that others wrote, in a spec or in a downloaded config, matched in bounded time.

Why not `re` alone: it backtracks without a limit, and holds the interpreter's lock meanwhile, so that not even
another thread could stop it. `re` says what is a regex; the package `regex`, of which `re`'s language is a part,
finds the match under a limit of time. Alternatives of plain names, as adapters list them by the thousand, are
looked up instead.

Why a shared clock: a thousand regexes that each end just in time take hours together. It is a context variable, since
regexes are made wherever an op reads its options.
"""

from __future__ import annotations

import math
import re
import time
from collections.abc import Generator, Iterable
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import cast

from surgery.errors import OpError, Problem, SurgeryError

__all__ = ["Limit", "Regex", "as_literals", "flaw", "matching", "shared_time"]

MAX_LENGTH = 4000  # a pattern of so many classes is compiled in seconds, not minutes
MAX_REPEATS = 1000  # `regex` writes repetitions out, and those within others again
MAX_SECONDS = 5.0  # of all regexes of a plan, beyond what simple ones take
SECONDS_PER_MATCH = 2e-5  # what each match adds to that; a simple one takes 5 µs
MOST_ADDED = 115.0
LEAST_SECONDS = 1e-4  # that a match gets when the time is over: simple ones still end

_LITERALS = re.compile(r"(?:[\w/@:;,!\"'<>=% -]|\\[^\w\s])+(?:\|(?:[\w/@:;,!\"'<>=% -]|\\[^\w\s])+)*")
_ANYTHING = re.compile(".*", re.DOTALL)
_ESCAPE = re.compile(r"\\(.)")
_REPEAT = re.compile(r"\{(\d*)(?:,(\d*))?\}")
# What `regex` reads as something of its own, and `re` as plain characters.
_NESTED = re.compile(r"(?<!\\)\[\^?\]?(?:[^\]\\]|\\.)*?(?:\[|--|&&|~~|\|\|)")
_EXTENSIONS = re.compile(r"\[\[:|(?<!\\)\{[^0-9,}]")


@dataclass(slots=True)
class _Clock:
    """Seconds that are left to some regexes, and those that their matches may still add."""

    seconds: float = field(default_factory=lambda: MAX_SECONDS)
    to_add: float = MOST_ADDED

    def add_match(self) -> None:
        """The time of one more match."""
        added = min(SECONDS_PER_MATCH, self.to_add)
        self.to_add -= added
        self.seconds += added

    @contextmanager
    def running(self) -> Generator[None]:
        """Take what the body takes."""
        begun = time.perf_counter()
        try:
            yield
        finally:
            self.seconds -= time.perf_counter() - begun


_shared: ContextVar[_Clock | None] = ContextVar("_shared", default=None)


@contextmanager
def shared_time() -> Generator[None]:
    """All regexes that are read and matched within share one limit of time."""
    token = _shared.set(_Clock())
    try:
        yield
    finally:
        _shared.reset(token)


def _clock() -> _Clock:
    return _shared.get() or _Clock()


def flaw(pattern: str) -> str:
    """Why `pattern` is no regex, or one too many; empty if it can be matched."""
    if as_literals(pattern):
        return ""
    clock = _clock()
    if clock.seconds < 0:
        return f"with the regexes before it, it takes more than {MAX_SECONDS:g} s to read and match"
    with clock.running():
        return _flaw(pattern)


def _flaw(pattern: str) -> str:
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
    """The time that some regexes share, and the error when it is over; `of` says whose they are.

    Within `shared_time` that is the time of all regexes.
    """

    of: str = ""
    at: str = ""
    error: type[SurgeryError] = OpError
    clock: _Clock = field(default_factory=_clock)


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
                with self._limit.clock.running():
                    return cast("re.Pattern[str]", regex.compile(self.pattern))  # pyright: ignore[reportUnknownMemberType]
        except (regex.error, RecursionError, MemoryError) as error:
            reason = str(error)
        raise self._limit.error(Problem(f"`{self.pattern}`{self._limit.of} is no regex: {reason}", self._limit.at))

    @property
    def literals(self) -> frozenset[str]:
        """The names that it is an alternation of; none if it is anything else."""
        return self._literals

    def fullmatch(self, name: str) -> re.Match[str] | None:
        """The match of all of `name`."""
        if self._compiled is None:
            return _ANYTHING.fullmatch(name) if name in self._literals else None
        clock = self._limit.clock
        clock.add_match()
        allowed, begun = max(clock.seconds, LEAST_SECONDS), time.perf_counter()
        try:
            return self._compiled.fullmatch(name, timeout=allowed)  # pyright: ignore
        except (TimeoutError, MemoryError, RecursionError):
            raise self._too_slow(name, allowed) from None
        finally:
            clock.seconds -= time.perf_counter() - begun

    def _too_slow(self, name: str, allowed: float) -> SurgeryError:
        limit = self._limit
        others = "" if allowed > MAX_SECONDS / 2 else ", with the regexes before it,"
        what = f"`{self.pattern}`{limit.of}{others} takes more than {MAX_SECONDS:g} s to match, at `{name}`"
        fix = "write it without one repetition inside of another, such as `(a+)+` or `(.*x.*)*`"
        return limit.error(Problem(what, limit.at, fix))


def matching(pattern: str, names: Iterable[str], limit: Limit | None = None) -> list[str]:
    """Those of `names` that `pattern` matches in full. Raises OpError, or the limit's error, as `Regex` does."""
    regex = Regex(pattern, limit or Limit())
    return [name for name in names if regex.fullmatch(name)]
