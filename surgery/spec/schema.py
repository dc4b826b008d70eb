"""The JSON Schema of the spec, generated from the ops.

Two of them from one source: the strict one that a spec is checked against once its parameters
have values, and the published one for editors, in which `${NAME}` may stand for any value.
"""

from __future__ import annotations

import inspect
from typing import cast

from surgery.op import Op, find_op, op_names, options_of
from surgery.sizes import SIZE_PATTERN

__all__ = ["edit_schema", "frame_schema", "spec_schema"]

DIALECT = "https://json-schema.org/draft/2020-12/schema"
Schema = dict[str, object]

_PATTERNS: Schema = {
    "anyOf": [{"type": "string", "minLength": 1}, {"type": "array", "items": {"type": "string"}, "minItems": 1}]
}
_SELECTING = {
    "modules": (
        "Regex, or a list of them, matched in full against module paths as they are on disk "
        "(`model.layers.0.self_attn.q_proj`); `all-linear` stands for every Linear but the output head."
    ),
    "tensors": "Regex, or a list of them, matched in full against full tensor names.",
    "except": "Regex, or a list of them: takes matches away.",
}


def frame_schema(*, parameters: bool = False) -> Schema:
    """The spec but for what each edit may hold; `parameters`: `${NAME}` may stand for a value."""
    variable = _or_parameter if parameters else dict
    shard_size: Schema = {
        "description": "The largest shard: 5GB is 5·10⁹ bytes, 2GiB 2·2³⁰. Default 5GB.",
        "anyOf": [{"type": "string", "pattern": SIZE_PATTERN}, {"type": "integer", "minimum": 1}],
        "default": "5GB",
    }
    copy_base: Schema = {
        "type": "boolean",
        "default": False,
        "description": "Write the checkpoint too where no edit changes it, and adapters alone would be written.",
    }
    seed: Schema = {
        "type": "integer",
        "minimum": 0,
        "default": 0,
        "description": "Seed of everything random; with the tensor's name it fixes every draw.",
    }
    return {
        "type": "object",
        "required": ["version", "source", "edits"],
        "additionalProperties": False,
        "properties": {
            "version": {"const": 1, "description": "The version of the spec format."},
            "params": {
                "type": "object",
                "description": "Defaults of parameters. `${NAME}` stands for one; --set NAME=VALUE overrides it. "
                "One whose default is null must be set.",
                "additionalProperties": {"type": ["string", "number", "boolean", "null"]},
            },
            "source": {
                "type": "string",
                "minLength": 1,
                "description": "A directory, a .safetensors file, or a Hub id: org/name[@revision].",
            },
            "models": {
                "type": "object",
                "description": "Further checkpoints or adapters, by a name that edits use.",
                "additionalProperties": {"type": "string", "minLength": 1},
            },
            "edits": {
                "type": "array",
                "description": "In order; each sees the result of those before it.",
                "items": {"type": "object"},
            },
            "output": {
                "type": "object",
                "additionalProperties": False,
                "description": "How the output is laid out.",
                "properties": {"shard_size": variable(shard_size), "copy_base": variable(copy_base)},
            },
            "seed": variable(seed),
        },
    }


def edit_schema(name: str, *, parameters: bool = False) -> Schema:
    """The schema of one edit with the op `name`; `parameters`: `${NAME}` may stand for a value."""
    op = find_op(name)
    properties: dict[str, Schema] = {"op": {"const": name, "description": _summary(op)}, **_selecting(op)}
    for option in options_of(op):
        default = {} if option.required else {"default": option.default}
        properties[option.key] = {**option.schema, "description": option.doc, **default}
    selected = [op.selects] if op.selects in properties and not op.selects_all else []
    required = ["op", *selected, *(option.key for option in options_of(op) if option.required)]
    if parameters:
        properties = {key: value if key == "op" else _or_parameter(value) for key, value in properties.items()}
    return {
        "type": "object",
        "description": inspect.cleandoc(op.__doc__ or ""),
        "required": required,
        "additionalProperties": False,
        "properties": properties,
    }


def _selecting(op: type[Op]) -> dict[str, Schema]:
    if op.selects == "checkpoint":
        return {}
    everything = f" Default: all {op.selects}." if op.selects_all else ""
    return {
        op.selects: {**_PATTERNS, "description": _SELECTING[op.selects] + everything},
        "except": {**_PATTERNS, "description": _SELECTING["except"]},
        "expect": {
            "type": "integer",
            "minimum": 1,
            "description": "A promise: exactly this many matches, or an error.",
        },
    }


def _summary(op: type[Op]) -> str:
    return inspect.cleandoc(op.__doc__ or "").splitlines()[0]


def _or_parameter(schema: Schema) -> Schema:
    """`schema`, where a parameter may stand for the value, or for any value within it."""
    fields = {key: _nested(key, value) for key, value in schema.items()}
    outer = {key: fields.pop(key) for key in ("description", "default", "examples") if key in fields}
    if fields.get("type") == "string" and "pattern" not in fields:
        return {**fields, **outer}
    return {"anyOf": [fields, {"$ref": "#/$defs/parameter"}], **outer}


def _nested(key: str, value: object) -> object:
    if key == "properties":
        return {name: _or_parameter(item) for name, item in cast("dict[str, Schema]", value).items()}
    if key == "anyOf":
        return [{name: _nested(name, item) for name, item in choice.items()} for choice in cast("list[Schema]", value)]
    if key in ("items", "additionalProperties") and isinstance(value, dict):
        return _or_parameter(cast("Schema", value))
    return value


def spec_schema() -> Schema:
    """The published schema: what `surgery schema` prints and `schemas/spec.v1.schema.json` holds."""
    frame = frame_schema(parameters=True)
    properties = cast("dict[str, Schema]", frame["properties"])
    properties["edits"]["items"] = {
        "type": "object",
        "required": ["op"],
        "properties": {"op": {"enum": list(op_names())}},
        "oneOf": [{"$ref": f"#/$defs/{name}"} for name in op_names()],
    }
    parameter: Schema = {
        "type": "string",
        "pattern": r"^\$\{[A-Za-z_]\w*\}$",
        "description": "The value of a parameter.",
    }
    definitions = {name: edit_schema(name, parameters=True) for name in op_names()}
    return {
        "$schema": DIALECT,
        "$id": "spec.v1.schema.json",
        "title": "surgery spec, version 1",
        **frame,
        "$defs": {"parameter": parameter, **definitions},
    }
