"""What PEFT and AdapterHub both know: LoRA and (IA)³, whatever the names on disk."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Literal, NoReturn

from surgery.errors import OpError, Problem

__all__ = ["Adapter", "Method", "Parts", "integer", "number", "parts_of", "refuse", "refuse_set"]

Method = Literal["lora", "ia3"]
Parts = Mapping[str, Mapping[str, str]]
"""Module path → part (`A` and `B` of LoRA, `l` of (IA)³) → tensor name."""


@dataclass(frozen=True, slots=True)
class Adapter:
    """One rank and one alpha for all modules; (IA)³ has neither."""

    method: Method
    parts: Parts
    rank: int = 1
    alpha: float = 1
    dropout: float = 0.0


def parts_of(names: Iterable[str], key: re.Pattern[str], format_name: str, wanted: tuple[str, ...]) -> Parts:
    """The tensors by module and part. Raises OpError for a name that is not `key`, and for a part that is missing."""
    parts: dict[str, dict[str, str]] = {}
    for name in names:
        match = key.fullmatch(name)
        if match is None:
            refuse(f"`{name}` is no tensor of {format_name}", "drop it first with `tensor.drop`, if it is not needed")
        parts.setdefault(match["path"], {})[match["part"]] = name
    for path, held in parts.items():
        if missing := [part for part in wanted if part not in held]:
            refuse(f"`{path}` has no `{missing[0]}`, one of {' and '.join(wanted)} of {format_name}")
    return parts


def integer(config: Mapping[str, object], key: str, default: int) -> int:
    """A count of the config. Raises OpError if it is none."""
    value = config.get(key, default)
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        refuse(f"adapter_config.json says `{key}: {value}`, which is no positive integer")
    return value


def number(config: Mapping[str, object], key: str, default: float) -> float:
    """A number of the config, as it is written there. Raises OpError if it is none."""
    value = config.get(key, default)
    if not isinstance(value, int | float) or isinstance(value, bool):
        refuse(f"adapter_config.json says `{key}: {value}`, which is no number")
    return value


def refuse_set(config: Mapping[str, object], harmless: Iterable[str], why: str) -> None:
    """Raises OpError for an option that is set and is not known to be `harmless`."""
    known = set(harmless)
    for key, value in config.items():
        if key not in known and value not in (None, False, "none", "", 0, [], {}):
            refuse(f"adapter_config.json says `{key}: {value}`, {why}")


def refuse(what: str, fix: str = "") -> NoReturn:
    """Raises OpError."""
    raise OpError(Problem(what, fix=fix))
