"""The parts of a spec."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import cast

from surgery.op import Op
from surgery.spec.document import Document

__all__ = ["ALL_LINEAR", "Edit", "Patterns", "Spec"]

ALL_LINEAR = "all-linear"


@dataclass(frozen=True, slots=True)
class Patterns:
    """What an edit selects: regexes matched in full, or `all_linear`; less what `excepts` match.

    Neither of them: everything.
    """

    regexes: tuple[re.Pattern[str], ...]
    all_linear: bool
    excepts: tuple[re.Pattern[str], ...]
    expect: int | None


@dataclass(frozen=True, slots=True)
class Edit:
    """One edit: an op with its options, and what it is applied to."""

    index: int
    op: Op
    patterns: Patterns
    place: str  # `qlora.yaml:7, edits[1]`
    pattern_place: str
    except_place: str

    def __str__(self) -> str:
        return f"edits[{self.index}] ({self.op.name})"


@dataclass(frozen=True, slots=True)
class Spec:
    """A checked spec. `resolved` is its plain data with every parameter replaced."""

    source: str
    models: Mapping[str, str]  # further ones, by the names that edits use
    edits: tuple[Edit, ...]
    shard_bytes: int
    copy_base: bool  # also where no edit changes a weight
    seed: int
    resolved: Mapping[str, object]
    document: Document

    @property
    def options(self) -> list[Mapping[str, object]]:
        """What each edit says beside its op and its selection, as plain data."""
        left = ("op", "modules", "tensors", "except", "expect")
        edits = cast("list[Mapping[str, object]]", self.resolved["edits"])
        return [{key: value for key, value in edit.items() if key not in left} for edit in edits]
