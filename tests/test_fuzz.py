"""Whatever a header, an index, a config or a spec holds: our own error comes out, or none.

`python -m tests.fuzz` searches on.
"""

import io
import json
import re
import struct
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from fuzz.search import search
from fuzz.targets import TARGETS, write_adapter, write_model
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import surgery
from surgery.checkpoint.header import encode_header, is_name, parse_header
from surgery.regexes import Limit, Regex, flaw
from surgery.types import DType, TensorType

EXECUTIONS = {"header": 3000, "index": 1000, "config": 200, "adapter": 200, "spec": 400, "plan": 200}

scalars = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20)
anything = st.recursive(
    scalars, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=10), inner, max_size=4)
)
LIKE_A_HEADER = st.dictionaries(
    st.text(max_size=8) | st.sampled_from(["__metadata__", "a.weight"]),
    st.fixed_dictionaries(
        {
            "dtype": st.sampled_from(["F32", "BF16", "U8", "F4", "x"]) | scalars,
            "shape": st.lists(st.integers(-1, 5) | scalars, max_size=4) | scalars,
            "data_offsets": st.lists(st.integers(-8, 64) | scalars, max_size=3) | scalars,
        }
    )
    | anything,
    max_size=5,
)
quick = settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@pytest.mark.parametrize("name", TARGETS)
def test_what_is_found_by_coverage_is_our_own_error(name: str) -> None:
    result = search(TARGETS[name], EXECUTIONS[name], seed=0)
    assert result.findings == []
    assert result.refused > 0 and len(result.corpus) > 5, "the search did not get anywhere"


@quick
@given(st.binary(max_size=200), st.integers(0, 2**64 - 1))
def test_no_bytes_break_the_header_parser(raw: bytes, length: int) -> None:
    for content in (raw, struct.pack("<Q", len(raw)) + raw, struct.pack("<Q", length) + raw):
        with suppress(surgery.CheckpointError):
            parse_header(io.BytesIO(content), len(content), "x")


@quick
@given(LIKE_A_HEADER, st.integers(0, 100))
def test_no_header_breaks_its_parser_and_what_it_takes_holds(entries: dict[str, Any], num_data: int) -> None:
    raw = json.dumps(entries).encode()
    size = 8 + len(raw) + num_data
    try:
        header = parse_header(io.BytesIO(struct.pack("<Q", len(raw)) + raw), size, "x")
    except surgery.CheckpointError as error:
        str(error).encode()
    else:
        assert sum(extent.type.num_bytes for extent in header.tensors.values()) == num_data
        assert all(8 + len(raw) <= extent.start <= extent.stop <= size for extent in header.tensors.values())
        assert all(is_name(name) for name in header.tensors)


@quick
@given(
    st.dictionaries(
        st.text(min_size=1, max_size=20).filter(is_name),
        st.tuples(st.sampled_from([DType.F32, DType.BF16, DType.U8]), st.lists(st.integers(0, 5), max_size=3)),
        max_size=5,
    ),
    st.dictionaries(st.text("abc é", max_size=5), st.text("xyz☃", max_size=5), max_size=2),
)
def test_what_we_write_we_read(tensors: dict[str, tuple[DType, list[int]]], metadata: dict[str, str]) -> None:
    placed: dict[str, tuple[TensorType, int]] = {}
    position = 0
    for name, (dtype, shape) in tensors.items():
        placed[name] = TensorType(dtype, tuple(shape)), position
        position += placed[name][0].num_bytes
    raw = encode_header(placed, metadata)
    header = parse_header(io.BytesIO(raw), len(raw) + position, "x")
    assert {name: extent.type for name, extent in header.tensors.items()} == {
        name: kind for name, (kind, _) in placed.items()
    }
    assert header.metadata == metadata


@quick
@given(st.text(max_size=200) | anything.map(json.dumps))
def test_no_text_breaks_the_spec_loader(tmp_path: Path, text: str) -> None:
    path = tmp_path / "spec.yaml"
    path.write_text(text, encoding="utf-8", errors="replace")
    with pytest.raises(surgery.SpecError):
        surgery.load(path)


@quick
@given(st.dictionaries(st.sampled_from(["version", "params", "source", "models", "edits", "output", "seed"]), anything))
def test_no_data_break_the_spec_loader(data: dict[str, Any]) -> None:
    with pytest.raises(surgery.SpecError):
        surgery.load({**data, "source": ""})


@settings(max_examples=50, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.dictionaries(st.sampled_from(["r", "lora_alpha", "target_modules", "rank_pattern", "alpha_pattern"]), anything)
)
def test_no_config_of_an_adapter_breaks_folding_it(tmp_path: Path, config: dict[str, Any]) -> None:
    model, adapter = write_model(tmp_path / "model"), write_adapter(tmp_path / "adapter")
    (adapter / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", **config}))
    spec = {"version": 1, "source": str(model), "models": {"a": str(adapter)}}
    try:
        surgery.plan({**spec, "edits": [{"op": "adapter.fold", "models": "a"}]})
    except surgery.SurgeryError as error:
        assert error.problems


PIECES = [
    "a",
    "b",
    ".",
    r"\.",
    r"\d",
    r"\w",
    "[ab]",
    "[^a]",
    "(?:a|b)",
    "(a)",
    "(a|ab)",
    "|",
    "^",
    "$",
    "(?=a)",
    "(?!b)",
    r"\b",
    "a?",
]


@quick
@given(
    st.lists(st.sampled_from(PIECES) | st.sampled_from(["*", "+", "?", "{2}", "{0,3}", "*?"]), max_size=6),
    st.text("ab.1", max_size=8),
)
def test_a_bounded_regex_matches_what_pythons_does(pieces: list[str], name: str) -> None:
    pattern = "".join(pieces)
    if flaw(pattern):
        with pytest.raises(surgery.OpError, match="is no regex"):
            Regex(pattern, Limit())
        return
    ours, theirs = Regex(pattern, Limit()).fullmatch(name), re.fullmatch(pattern, name)
    assert (ours is None) == (theirs is None)
    if ours is not None and theirs is not None:
        assert ours.groups() == theirs.groups()
