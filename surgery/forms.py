"""Whether plain data have the form that is read of them: what comes from a file may be anything.

Why not its JSON Schema: of a hundred thousand tensors that would take as long as hashing gigabytes of them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import cast

__all__ = ["Form", "is_count", "lists_of", "maps_of", "one_of", "record"]

Form = Callable[[object], bool]


def is_count(value: object) -> bool:
    """A natural number that fits 63 bits."""
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 1 << 63


def one_of(*values: object) -> Form:
    """One of these."""
    return lambda value: any(value == allowed and type(value) is type(allowed) for allowed in values)


def lists_of(form: Form) -> Form:
    """A list of such."""
    return lambda value: isinstance(value, list) and all(map(form, cast("list[object]", value)))


def maps_of(form: Form) -> Form:
    """A map of names to such."""
    return lambda value: isinstance(value, dict) and all(map(form, cast("dict[str, object]", value).values()))


def record(required: Mapping[str, Form], optional: Mapping[str, Form] | None = None) -> Form:
    """A map with these keys, and no others."""
    known = {**required, **(optional or {})}

    def is_record(value: object) -> bool:
        if not isinstance(value, dict):
            return False
        fields = cast("dict[str, object]", value)
        return fields.keys() <= known.keys() and all(
            form(fields[key]) if key in fields else key not in required for key, form in known.items()
        )

    return is_record
