"""What a violation of the schema means to the person who wrote the spec."""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Mapping
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
    below: tuple[str, ...] = ()


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
    elif error.validator == "anyOf":
        yield Violation(f"{value!r} does not fit here", str(cast(Mapping[str, object], error.schema)["description"]))
    elif error.validator in ("minLength", "minItems"):
        yield Violation("is empty", "give a value, or leave the key out")
    else:
        yield Violation(str(error.message))


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
