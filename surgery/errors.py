"""Every error surgery raises, as one tree.

    SurgeryError
    ├── SpecError        (ValueError)    the spec does not hold
    ├── CheckpointError  (ValueError)    a source does not hold
    ├── OpError          (ValueError)    an op cannot do what the spec asks of a tensor
    ├── ConservationError(RuntimeError)  a source tensor would vanish
    ├── OutputError      (OSError)       the output cannot be written
    └── VerifyError      (ValueError)    an output differs from its manifest

Why: a message is only of use when it says what is wrong, where, and how to mend it, so an
error is a list of `Problem`s with exactly these three parts, and each class also is the
builtin that callers would expect to catch.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from surgery.escapes import shown

__all__ = [
    "CheckpointError",
    "ConservationError",
    "OpError",
    "OutputError",
    "Problem",
    "SpecError",
    "SurgeryError",
    "VerifyError",
    "most",
    "problems_of",
]

MOST_PROBLEMS = 100  # more of them are read by nobody


@dataclass(frozen=True, slots=True)
class Problem:
    """One thing that is wrong: what, where (`at`), and how to mend it (`fix`)."""

    what: str
    at: str = ""
    fix: str = ""

    def __str__(self) -> str:
        lines = [f"error: {shown(self.what)}"]
        if self.at:
            lines.append(f"  at   {shown(self.at)}")
        if self.fix:
            lines.append(f"  fix  {shown(self.fix)}")
        return "\n".join(lines)


class SurgeryError(Exception):
    """Base of all errors of surgery; `problems` holds every problem found, in order."""

    problems: tuple[Problem, ...]

    def __init__(self, *problems: Problem) -> None:
        super().__init__("\n".join(map(str, problems)))
        self.problems = problems

    def __str__(self) -> str:
        return "\n".join(map(str, self.problems))


class SpecError(SurgeryError, ValueError):
    """The spec does not hold; carries every problem found, each with its line."""


class CheckpointError(SurgeryError, ValueError):
    """A source checkpoint is missing, damaged, or not what its index says."""


class OpError(SurgeryError, ValueError):
    """An op cannot do what the spec asks of a tensor."""


class ConservationError(SurgeryError, RuntimeError):
    """A tensor of the source is neither written, changed, renamed nor dropped by name."""


class OutputError(SurgeryError, OSError):
    """The output cannot be written, or exists already."""


class VerifyError(SurgeryError, ValueError):
    """An output differs from what its manifest says."""


def problems_of(errors: Iterable[SurgeryError]) -> tuple[Problem, ...]:
    """All problems of `errors`, in order."""
    return tuple(problem for error in errors for problem in error.problems)


def most(problems: Sequence[Problem], at: str) -> tuple[Problem, ...]:
    """The first of them, and how many there are beyond."""
    left = len(problems) - MOST_PROBLEMS
    more = [Problem(f"and {left} more problems", at)] if left > 0 else []
    return (*problems[:MOST_PROBLEMS], *more)
