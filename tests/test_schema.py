"""The published schema of the spec: never stale, right about what is right and what is wrong, documented throughout."""

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from jsonschema import Draft202012Validator

import surgery
from surgery.op import find_op, op_names, options_of

ROOT = Path(__file__).parents[1]
SPECS = sorted([*(ROOT / "specs").glob("*.yaml"), *(ROOT / "examples").glob("**/*.yaml")])
PUBLISHED = ROOT / "schemas" / "spec.v1.schema.json"


@pytest.fixture(scope="module")
def validator() -> Draft202012Validator:
    return Draft202012Validator(json.loads(PUBLISHED.read_text()))


def test_the_published_schema_is_what_the_command_prints() -> None:
    stale = "stale: surgery schema > schemas/spec.v1.schema.json"
    assert PUBLISHED.read_text() == json.dumps(surgery.schema(), indent=2) + "\n", stale


@pytest.mark.parametrize("path", sorted((ROOT / "schemas").glob("*.json")), ids=lambda path: path.name)
def test_every_published_schema_is_one(path: Path) -> None:
    schema = json.loads(path.read_text())
    Draft202012Validator.check_schema(schema)
    assert schema["$schema"] == Draft202012Validator.META_SCHEMA["$id"]
    assert schema["$id"] == path.name


@pytest.mark.parametrize("path", SPECS, ids=lambda path: path.name)
def test_every_spec_that_comes_with_surgery_is_accepted_as_it_is_written(
    path: Path, validator: Draft202012Validator
) -> None:
    spec = yaml.safe_load(path.read_text())
    validator.validate(spec)
    surgery.load(path, **{name: "given" for name, default in spec.get("params", {}).items() if default is None})


@pytest.mark.parametrize("path", SPECS, ids=lambda path: path.name)
def test_the_first_line_of_a_spec_names_the_schema_for_editors(path: Path) -> None:
    first = path.read_text().splitlines()[0]
    assert first.startswith("# yaml-language-server: $schema=")
    assert (path.parent / first.partition("=")[2]).resolve() == PUBLISHED


def spec(*edits: Any, **fields: Any) -> dict[str, Any]:
    return {"version": 1, "source": "org/name", "edits": list(edits), **fields}


NF4 = {"op": "quantize.nf4", "modules": "all-linear"}
CAST = {"op": "tensor.cast", "tensors": ["a", "b"], "dtype": "float32"}

RIGHT = {
    "no edits": spec(),
    "every field": spec(
        {**NF4, "except": "a", "expect": 1, "block_size": 128, "double_quant": False, "compute_dtype": "float16"},
        CAST,
        params={"a": 1, "b": "x", "c": None, "d": True, "e": 0.5},
        models={"math": "org/math"},
        output={"shard_size": "2GiB"},
        seed=3,
    ),
    "parameters everywhere": spec(
        {**NF4, "modules": "${m}", "except": ["${e}"], "expect": "${n}", "block_size": "${b}", "double_quant": "${d}"},
        {**CAST, "dtype": "${dtype}"},
        source="${model}@${revision}",
        output={"shard_size": "${size}"},
        seed="${seed}",
    ),
    "a size in bytes": spec(output={"shard_size": 5_000_000}),
}

WRONG = {
    "no version": {"source": "x", "edits": []},
    "another version": spec(version=2),
    "a version of text": spec(version="1"),
    "an unknown key": spec(outputs={}),
    "edits that are a map": spec(edits={"op": "quantize.nf4"}),
    "an edit of text": spec("quantize.nf4"),
    "an edit without op": spec({"modules": "all-linear"}),
    "an unknown op": spec({"op": "quantise.nf4", "modules": "all-linear"}),
    "an unknown field": spec({**NF4, "blocksize": 64}),
    "no selection": spec({"op": "quantize.nf4"}),
    "tensors for an op on modules": spec({"op": "quantize.nf4", "tensors": ".*"}),
    "a selection of both kinds": spec({**NF4, "tensors": ".*"}),
    "an empty regex": spec({**NF4, "modules": ""}),
    "an empty list of regexes": spec({**NF4, "modules": []}),
    "a regex that is a number": spec({**NF4, "modules": 3}),
    "a value that is not allowed": spec({**NF4, "block_size": 65}),
    "a boolean in quotes": spec({**NF4, "double_quant": "true"}),
    "a missing option": spec({"op": "tensor.cast", "tensors": ".*"}),
    "a dtype by another name": spec({**CAST, "dtype": "bf16"}),
    "a promise of nothing": spec({**NF4, "expect": 0}),
    "a size without a number": spec(output={"shard_size": "GB"}),
    "a size of nothing": spec(output={"shard_size": 0}),
    "a parameter that is a list": spec(params={"a": [1]}),
    "a source that is a list": spec(source=["a"]),
    "a negative seed": spec(seed=-1),
}


@pytest.mark.parametrize("name", RIGHT)
def test_what_is_right_is_accepted(name: str, validator: Draft202012Validator) -> None:
    validator.validate(RIGHT[name])


@pytest.mark.parametrize("name", WRONG)
def test_what_is_wrong_is_rejected_by_the_editor_and_by_surgery_alike(
    name: str, validator: Draft202012Validator
) -> None:
    assert not validator.is_valid(WRONG[name])
    with pytest.raises(surgery.SpecError):
        surgery.load(WRONG[name])


def described(schema: object, path: str) -> list[str]:
    """The properties below `path` that say nothing of themselves."""
    if not isinstance(schema, dict):
        return []
    silent = [f"{path}.{key}" for key, value in schema.get("properties", {}).items() if not value.get("description")]
    return silent + [item for key, value in schema.get("properties", {}).items() for item in described(value, key)]


def test_every_field_has_a_description() -> None:
    published = json.loads(PUBLISHED.read_text())
    silent = described(published, "spec")
    for name, definition in published["$defs"].items():
        silent += described(definition, name) + ([] if definition.get("description") else [name])
    assert silent == []


@pytest.mark.parametrize("name", op_names())
def test_every_op_has_its_fields_and_defaults_in_the_schema(name: str) -> None:
    definition = surgery.schema()["$defs"][name]  # type: ignore[index]
    options = options_of(find_op(name))
    selecting = [] if find_op(name).selects == "checkpoint" else [find_op(name).selects, "except", "expect"]
    assert list(definition["properties"]) == ["op", *selecting, *(option.key for option in options)]
    assert {option.key for option in options if option.required} <= set(definition["required"])
    for option in options:
        assert (option.doc[0].isupper() or option.doc[0] == "`") and option.doc.endswith((".", "`"))
        assert option.required or definition["properties"][option.key]["default"] == option.default


def test_an_editor_shows_the_manual_of_an_op() -> None:
    manual = surgery.schema()["$defs"]["quantize.nf4"]["description"]  # type: ignore[index]
    assert "Reads    weight" in manual and "Source   QLoRA" in manual
