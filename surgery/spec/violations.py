"""What a violation of the schema means to the person who wrote the spec."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, cast

if TYPE_CHECKING:
    from jsonschema import ValidationError

__all__ = ["Violation", "explain"]

PYTHON_NAMES: dict[type, str] = {bool: "a boolean", int: "an integer", float: "a number", str: "a string",
                                 list: "a list", dict: "a map"}  # fmt: skip
JSON_NAMES = {"string": "a string", "integer": "an integer", "number": "a number", "boolean": "true or false",
              "array": "a list", "object": "a map", "null": "null"}  # fmt: skip
SELECTING = ("modules", "tensors")


@dataclass(frozen=True, slots=True)
class Violation:
    """What is wrong, how to mend it, and at which key below the value that the schema speaks of."""

    what: str
    fix: str = ""
    below: tuple[str | int, ...] = ()


def explain(error: ValidationError) -> Iterator[Violation]:
    """The violations that one error of the validator stands for."""
    value, allowed = cast(object, error.instance), cast(object, error.validator_value)
    if error.validator == "additionalProperties" and allowed is False:
        yield from _unknown_keys(cast(Mapping[str, object], value), cast(Mapping[str, object], error.schema))
    elif error.validator == "required":
        key = str(error.message).split("'")[1]  # the validator reports each missing key by itself
        yield Violation(f"`{key}` is missing", f"add `{key}:`")
    elif error.validator == "enum":
        yield _no_choice(value, cast(list[object], allowed))
    elif error.validator == "type":
        given = PYTHON_NAMES.get(type(value), "nothing")
        yield Violation(f"{value!r} is {given}, not {_type_names(allowed)}")
    elif error.validator == "const":
        yield Violation(f"{value!r} is not {allowed!r}", f"write {allowed}")
    elif error.validator == "anyOf" and (nearest := _nearest_choice(error)):
        for nested in nearest:
            path = tuple(cast("Iterable[str | int]", nested.relative_path))
            yield from (Violation(each.what, each.fix, (*path, *each.below)) for each in explain(nested))
    elif error.validator == "anyOf" and _is_filtered(value):
        yield Violation("is mergekit's list of filters", "write a map: {'.*self_attn.*': 0.3, '.*': 0.5}")
    elif error.validator == "anyOf":
        yield Violation(
            f"{value!r} does not fit here", str(cast(Mapping[str, object], error.schema).get("description", ""))
        )
    elif error.validator in ("maxProperties", "maxItems", "minProperties"):
        bound = "at least" if error.validator == "minProperties" else "at most"
        count = len(cast("list[object]", value))
        yield Violation(f"has {count} entries, where {bound} {allowed} can be", "take some out, or add some")
    elif error.validator in ("minLength", "minItems"):
        yield Violation("is empty", "give a value, or leave the key out")
    else:
        yield Violation(str(error.message))


def _nearest_choice(error: ValidationError) -> list[ValidationError]:
    """The errors of the one choice that is a map or list as the value is; none where there is no such choice."""
    value = cast(object, error.instance)
    if not isinstance(value, dict | list) or _is_filtered(cast(object, value)):
        return []
    choices: dict[object, list[ValidationError]] = {}
    for nested in error.context or []:
        choices.setdefault(nested.schema_path[0], []).append(nested)
    fitting = [
        errors
        for errors in choices.values()
        if not any(not item.relative_path and item.validator == "type" for item in errors)
    ]
    return fitting[0] if len(fitting) == 1 else []


def _is_filtered(value: object) -> bool:
    """Whether it is what mergekit writes for values by name: [{filter: mlp, value: 0.5}, ...]."""
    items = cast("list[object]", value) if isinstance(value, list) else []
    return any(isinstance(item, dict) and "value" in item for item in items)


def _unknown_keys(value: Mapping[str, object], schema: Mapping[str, object]) -> Iterator[Violation]:
    known = list(cast(Mapping[str, object], schema["properties"]))
    where = f" of `{value['op']}`" if "op" in known and "op" in value else ""
    for key in value:
        if key not in known:
            yield Violation(f"unknown key `{key}`{where}", _nearest_key(key, known), (key,))


def _nearest_key(key: str, known: list[str]) -> str:
    selecting = next((name for name in SELECTING if name in known), None)
    if key in SELECTING and selecting:
        return f"this op selects by `{selecting}`"
    near = difflib.get_close_matches(key, known, 1)
    return f"did you mean `{near[0]}`?" if near else f"the keys are {', '.join(known)}"


def _no_choice(value: object, allowed: list[object]) -> Violation:
    choices = [str(choice) for choice in allowed if choice is not None]
    near = difflib.get_close_matches(str(value), choices, 1)
    hint = f"; did you mean `{near[0]}`?" if near else ""
    return Violation(f"{value!r} is not one of the values allowed here", f"one of {', '.join(choices)}{hint}")


def _type_names(allowed: object) -> str:
    names = cast(list[str], allowed) if isinstance(allowed, list) else [str(allowed)]
    return " or ".join(JSON_NAMES[name] for name in names)
