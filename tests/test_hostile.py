"""What a mean spec, adapter or checkpoint could do to whoever opens it: each case ends soon, and says why.

Beside these: headers and indices that lie in test_checkpoint_errors.py, messages in test_spec_errors.py, disks and
kills in test_faults.py, and what nobody thought of in test_fuzz.py.
"""

import errno
import hashlib
import json
import os
import resource
import shutil
import stat
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from fuzz.targets import CONFIG, header_bytes, json_bytes, tensors_of, write_adapter, write_model, write_tensors

import surgery
from surgery import cli, regexes
from surgery.checkpoint.header import MAX_NAME, MAX_TENSORS
from surgery.errors import Problem
from surgery.regexes import MAX_LENGTH, Limit, Regex, flaw
from surgery.spec.document import MAX_BYTES

# Two ways to read every pair of letters, so 2³⁰ ways to read sixty; and no letter that all matches have.
EVIL = r"(?:(?:a|aa)+)+!|zz"
VICTIM = "a" * 60
MOST_SECONDS = 10  # of what takes well under one
CAST = {"op": "tensor.cast", "tensors": ".*", "dtype": "float16"}


def spec_of(source: Path, *edits: Mapping[str, Any], **more: Any) -> dict[str, Any]:
    return {"version": 1, "source": str(source), "edits": list(edits), **more}


def refused(action: Callable[[], object], *words: str) -> str:
    """The message of the SurgeryError that `action` ends in, soon; `words` are in it."""
    begun = time.perf_counter()
    with pytest.raises(surgery.SurgeryError) as caught:
        action()
    assert time.perf_counter() - begun < MOST_SECONDS
    message = str(caught.value)
    assert [word for word in words if word not in message] == []
    assert len(message) < 20_000 and message.replace("\n", "").isprintable()
    return message


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return write_model(tmp_path / "model")


# Regexes that never end


@pytest.fixture
def hurried(monkeypatch: pytest.MonkeyPatch) -> None:
    """A limit of time that tests can wait for."""
    monkeypatch.setattr(regexes, "MAX_SECONDS", 0.3)


@pytest.fixture
def victims(tmp_path: Path, hurried: None) -> dict[str, Path]:
    """Models, and an adapter, with a module whose path is VICTIM."""
    shapes = {f"model.layers.{index}.{VICTIM}.weight": (8, 8) for index in range(2)}
    shapes |= {f"{VICTIM}.weight": (64, 64), VICTIM: (8, 8)}
    for name in ("model", "other"):
        write_tensors(tmp_path / name / "model.safetensors", shapes)
        (tmp_path / name / "config.json").write_bytes(json_bytes(CONFIG))
    factors = {"A": (2, 64), "B": (64, 2)}
    keys = {f"base_model.model.{VICTIM}.lora_{side}.weight": shape for side, shape in factors.items()}
    write_tensors(tmp_path / "adapter" / "adapter_model.safetensors", keys)
    return {name: tmp_path / name for name in ("model", "other", "adapter")}


LORA = {"op": "attach.lora", "name": "x", "modules": VICTIM, "rank": 2, "alpha": 2}
IN_SPECS: dict[str, dict[str, Any]] = {
    "modules": {"op": "quantize.nf4", "modules": EVIL},
    "modules, one of a list": {"op": "quantize.nf4", "modules": [VICTIM, EVIL]},
    "tensors": {**CAST, "tensors": EVIL},
    "except": {**CAST, "except": EVIL},
    "rename": {"op": "tensor.rename", "tensors": f"(?:{EVIL})(x?)", "to": r"\1"},
    "gradient": {"op": "merge.linear", "models": {"source": {"weight": 1}, "other": {"weight": {EVIL: 1, ".*": 0}}}},
    "rank_pattern": {**LORA, "rank_pattern": {EVIL: 1}},
    "alpha_pattern": {**LORA, "alpha_pattern": {EVIL: 1}},
    "modules_to_save": {**LORA, "modules_to_save": [EVIL]},
    "feedforward": {"op": "attach.ia3", "name": "x", "modules": VICTIM, "feedforward": EVIL},
    "extract": {"op": "adapter.extract", "models": "other", "modules": VICTIM, "rank": 2, "modules_to_save": [EVIL]},
}


@pytest.mark.parametrize("place", IN_SPECS)
def test_a_regex_of_a_spec_that_never_ends_is_named(place: str, victims: dict[str, Path]) -> None:
    edit = IN_SPECS[place]
    models = {"models": {"other": str(victims["other"])}} if "models" in edit else {}
    refused(lambda: surgery.plan(spec_of(victims["model"], edit, **models)), EVIL, "takes more than 0.3 s to match")


def test_a_regex_of_scaled_layers_that_never_ends_is_named(victims: dict[str, Path], hurried: None) -> None:
    scale = {r"model\.layers\.\d\.(?:(?:a|aa)+)+!|zz": 0.5}
    edit = {"op": "layers.select", "slices": [{"layers": [0, 1], "scale": scale}]}
    refused(lambda: surgery.plan(spec_of(victims["model"], edit)), "of `scale` takes more than")


@pytest.mark.parametrize(
    "config",
    [{"target_modules": EVIL}, {"rank_pattern": {EVIL: 2}}, {"alpha_pattern": {EVIL: 2}},
     {"peft_type": "LORA", "target_modules": f".*{EVIL}"}],
)  # fmt: skip
def test_a_regex_of_a_downloaded_adapter_that_never_ends_is_named(
    config: dict[str, object], victims: dict[str, Path]
) -> None:
    said = {"peft_type": "LORA", "r": 2, "lora_alpha": 2, "target_modules": [VICTIM], **config}
    (victims["adapter"] / "adapter_config.json").write_bytes(json_bytes(said))
    fold = spec_of(victims["model"], {"op": "adapter.fold", "models": "a"}, models={"a": str(victims["adapter"])})
    refused(lambda: surgery.plan(fold), EVIL, "in the adapter's config takes more than")


def test_a_regex_that_never_ends_is_named_in_any_thread(victims: dict[str, Path]) -> None:
    """No signal reaches another thread, and `re` would let none run."""
    messages: list[str] = []

    def plan() -> None:
        messages.append(refused(lambda: surgery.plan(spec_of(victims["model"], {**CAST, "tensors": EVIL}))))

    thread = threading.Thread(target=plan)
    thread.start()
    thread.join(MOST_SECONDS)
    assert messages and EVIL in messages[0]


def test_regexes_that_share_a_limit_share_its_time(hurried: None) -> None:
    limit = Limit()
    slow = [Regex(f"{EVIL}{'z' * index}", limit) for index in range(100)]
    begun = time.perf_counter()
    for regex in slow:
        with pytest.raises(surgery.OpError):
            regex.fullmatch(VICTIM)
    assert time.perf_counter() - begun < 3


# Each ends in time, and a thousand of them would not.
SLOW = [rf"(?:(?:a|aa)+)+!{index}|zz" for index in range(1000)]
MANY_SLOW: dict[str, list[dict[str, Any]]] = {
    "edits": [{**CAST, "tensors": regex} for regex in SLOW],
    "one edit": [{**CAST, "tensors": SLOW}],
    "rank_pattern": [{**LORA, "rank_pattern": dict.fromkeys(SLOW, 1)}],
    "modules_to_save": [{**LORA, "modules_to_save": SLOW}],
}


@pytest.mark.parametrize("place", MANY_SLOW)
def test_all_regexes_of_a_plan_share_one_limit_of_time(place: str, victims: dict[str, Path]) -> None:
    refused(lambda: surgery.plan(spec_of(victims["model"], *MANY_SLOW[place])), "takes more than 0.3 s")


def test_all_regexes_of_an_adapter_share_one_limit_of_time(victims: dict[str, Path]) -> None:
    said = {"peft_type": "LORA", "r": 2, "target_modules": [VICTIM], "rank_pattern": dict.fromkeys(SLOW, 2)}
    (victims["adapter"] / "adapter_config.json").write_bytes(json_bytes(said))
    fold = spec_of(victims["model"], {"op": "adapter.fold", "models": "a"}, models={"a": str(victims["adapter"])})
    refused(lambda: surgery.plan(fold), "in the adapter's config", "takes more than 0.3 s")


def test_regexes_that_take_long_to_read_share_one_limit_of_time(model: Path, hurried: None) -> None:
    """To ignore the case of a range, `re` looks at each of its characters."""
    slow = ["(?i)" + "[ -\U0010fffd]" * 30 + str(index) for index in range(20)]
    refused(lambda: surgery.load(spec_of(model, {**CAST, "tensors": slow})), "with the regexes before it")


@pytest.mark.parametrize("option", ["tensors", "except"])
def test_many_plain_names_that_match_nothing_are_judged_soon(option: str, model: Path) -> None:
    edit = {**CAST, option: [f"a{index}" for index in range(50_000)]}
    refused(lambda: surgery.plan(spec_of(model, edit)), "`a0`", "and 49980 more regexes that match nothing")


def test_only_the_first_of_many_problems_are_told(model: Path) -> None:
    attach = {**LORA, "modules": "all-linear", "rank_pattern": {f"a{index}": 1 for index in range(2000)}}
    refused(lambda: surgery.plan(spec_of(model, attach)), "`a99`", "and 1900 more problems")


@pytest.mark.parametrize(
    "pattern",
    ["(" * 5000 + "a" + ")" * 5000, "[a-z]" * MAX_LENGTH, "(?i)" + "[\0-\U0010ffff]" * MAX_LENGTH, "x{99999999999}",
     "(", "[[:alpha:]]", "(?:(?:|a){9999}){9999}x", "(?:(?:a{40}){40}){40}",
     "(?:a){e<=3}", "(?R)", r"\p{L}"],
)  # fmt: skip
def test_what_is_no_regex_or_too_long_for_one_is_refused_at_once(pattern: str, model: Path) -> None:
    assert flaw(pattern)
    refused(lambda: surgery.load(spec_of(model, {**CAST, "tensors": pattern})), "is no regex")


def test_thousands_of_plain_names_are_looked_up() -> None:
    """As adapters list them, far beyond the length that other regexes may have."""
    names = [rf"model\.layers\.{index}\.mlp\.experts\.{expert}" for index in range(50) for expert in range(100)]
    begun = time.perf_counter()
    regex = Regex("|".join(names), Limit())
    found = [regex.fullmatch(f"model.layers.{index}.mlp.experts.99") for index in range(60)]
    assert [match is not None for match in found] == [True] * 50 + [False] * 10
    assert found[3] is not None and found[3][0] == "model.layers.3.mlp.experts.99"
    assert time.perf_counter() - begun < 2


def test_ranks_of_thousands_of_modules_are_looked_up() -> None:
    from surgery.formats.peft.settings import Settings

    patterns: dict[str, object] = {rf"^model\.layers\.{index}\.q_proj": index + 1 for index in range(20_000)}
    settings = Settings({"r": 7, "rank_pattern": {**patterns, r"\d+\.k_proj": 5, r"q_proj": 3, r"v_proj|o_proj": 4}})
    begun = time.perf_counter()
    assert [settings.rank(f"model.layers.{index}.q_proj") for index in range(0, 20_000, 10)] == list(
        range(1, 20_001, 10)
    )
    assert settings.rank("x.model.layers.3.q_proj") == 3, "^ means the whole path"
    assert [settings.rank(f"a.1.{name}") for name in ("k_proj", "v_proj", "o_proj", "up_proj")] == [5, 4, 4, 7]
    assert time.perf_counter() - begun < 3


def test_a_new_name_that_multiplies_itself_is_refused(model: Path) -> None:
    for count in (5, 20_000):
        edit = {"op": "tensor.rename", "tensors": "(.*)", "to": r"\1" * count}
        names = {f"{'m' * 200}.{index}": (1,) for index in range(3)}
        write_tensors(model / "model.safetensors", names)
        refused(lambda edit=edit: surgery.plan(spec_of(model, edit)))


def test_a_module_whose_path_is_a_regex_is_not_written_where_one_is_read(model: Path) -> None:
    """transformers reads the entries of llm_int8_skip_modules as regexes."""
    for name in ("a(b", "(a|aa)+!"):
        shapes = {"model.layers.0.q_proj.weight": (64, 64), f"{name}.weight": (64, 64)}
        write_tensors(model / "model.safetensors", shapes)
        edit = {"op": "quantize.nf4", "modules": r".*q_proj"}
        refused(lambda edit=edit: surgery.plan(spec_of(model, edit)), name, "llm_int8_skip_modules")


def test_modules_left_alone_are_listed_in_the_time_of_a_look_up(model: Path) -> None:
    """Each of them was once held against each that is quantized."""
    names = {f"model.layers.{index}.{name}_proj.weight": (1, 64) for index in range(8000) for name in "qk"}
    write_tensors(model / "model.safetensors", names)
    begun = time.perf_counter()
    plan = surgery.plan(spec_of(model, {"op": "quantize.nf4", "modules": r".*q_proj"}))
    skipped = json.loads(plan.config or b"")["quantization_config"]["llm_int8_skip_modules"]
    assert "model.layers.7999.k_proj" in skipped and not [name for name in skipped if "q_proj" in name]
    assert time.perf_counter() - begun < MOST_SECONDS


# What is printed

MOVES = "a\x1b[2J\x9b2J\x7f\u202e\u2066\ud800\r\nPlan: nothing"


def test_what_moves_the_cursor_or_forges_a_line_is_printed_escaped(model: Path, tmp_path: Path) -> None:
    (model / "config.json").write_bytes(json_bytes({"model_type": MOVES}))
    adapter = write_adapter(tmp_path / "adapter")
    (adapter / "adapter_config.json").write_bytes(json_bytes({"peft_type": MOVES, "base_model_name_or_path": MOVES}))
    printed = [surgery.plan(spec_of(model, CAST)), surgery.inspect(model), surgery.inspect(adapter)]
    for text in map(str, printed):
        assert text.replace("\n", "").isprintable() and r"a\x1b[2J\x9b2J" in text
        assert "Plan: nothing" not in text.splitlines()
    assert json.dumps(surgery.inspect(model).to_json()).isprintable()


def test_a_line_without_end_is_printed_without_its_middle(model: Path) -> None:
    (model / "config.json").write_bytes(json_bytes({"model_type": "x" * 1_000_000}))
    assert len(str(surgery.inspect(model))) + len(str(surgery.plan(spec_of(model, CAST)))) < 20_000


@pytest.mark.parametrize(
    ("problem", "command"),
    [(("a%\r\nb", "x:y,z%.yaml:7, edits[0]", ""), "::error file=x%3Ay%2Cz%25.yaml,line=7::a%25%0D%0Ab"),
     (("a", "x\n::error::y", "b"), "::error file=x%0A%3A%3Aerror%3A%3Ay::a%0Ab"),
     (("\x1b[2J", "x:²", ""), "::error file=x%3A²::\\x1b[2J")],
)  # fmt: skip
def test_a_message_for_github_is_one_command(problem: tuple[str, str, str], command: str) -> None:
    assert cli._github(Problem(*problem)) == command  # pyright: ignore[reportPrivateUsage]


# Specs


def text_of(extra: str) -> str:
    return f"version: 1\nsource: x\nedits:\n  - {{op: tensor.cast, tensors: '.*', dtype: float16}}\n{extra}"


LONG_INTEGERS = [
    "9" * 5000,
    "0x" + "f" * 100_000,
    "0b" + "1" * 100_000,
    "1" + ":59" * 100_000,
    "1" + ":59" * 100_000 + ".5",
]
HOSTILE_TEXTS: dict[str, tuple[str | bytes, str]] = {
    "an integer of nothing": ("seed: !!int", "is no int"),
    "a truth that is none": ("seed: !!bool perhaps", "is no bool"),
    "a key that is no integer": ("? !!int\n: 1", "is no int"),
    "lists that are deep": ("a: " + "[" * 100_000, "nested too deeply"),
    "lists that are deep and end": ("a: " + "[" * 900 + "]" * 900, "nested too deeply"),
    "items that are deep": ("- " * 100_000 + "x", "nested too deeply"),
    "maps that are deep": ("a: " + "{a: " * 30_000, "nested too deeply"),
    "keys that are deep": ("? " * 50_000, "nested too deeply"),
    "many values": ("a: [" + "x," * 500_000 + "]\n", "more than 100000 values"),
    "a map that doubles": (
        "a: &a {x: 1, y: 2}\n"
        + "".join(f"{b}: &{b} {{p: *{a}, q: *{a}, r: *{a}}}\n" for a, b in pairwise("abcdefghijklmn")),
        "expands to more than",
    ),
    "a long key": (text_of(f"{'x' * 900}: 1\n"), "unknown key"),
    "a long op": (text_of("").replace("tensor.cast", "x" * 1_000_000), "there is no op"),
    "a long regex": (text_of("").replace(".*", "(" * 1_000_000), "more than 4000"),
    "keys that are NaN": (text_of(".nan: 1\n.nan: 2\n"), "plain string"),
    "a key that is a list": (text_of("? [a, b]\n: 1\n"), "plain string"),
    "a key that is merged": ("a: &a {x: 1}\nb: {<<: *a}\n" + text_of(""), "tag:yaml.org,2002:merge"),
    "bytes": (text_of("seed: !!binary aGVsbG8=\n"), "binary"),
    "code": ("!!python/object/apply:os.system [exit]\n", "python/object"),
    "Latin": (text_of("# ").encode() + b"\xe9\n", "cannot be read"),
    "UTF-16": (text_of("").encode("utf-16"), "cannot be read"),
    "NUL": (text_of("").encode() + b"\0", "#x0000"),
    "what moves the cursor": (text_of('seed: "\\e[2J\\u202e\\ud800"\n'), r"\x1b[2J"),
    "many edits": (text_of("  - {op: tensor.cast, tensors: '.*', dtype: float16}\n" * 5000), "more than 1000"),
    "many mistakes": (text_of("  - {op: tensor.cst}\n" * 900), "more problems"),
    "parameters that multiply": (
        f"version: 1\nparams: {{a: {'x' * 10_000}}}\nsource: '{'${a}' * 10_000}'\nedits: []\n",
        "longer than",
    ),
    "parameters without end": (
        "version: 1\nparams: {a: null}\nsource: '" + "${q}" * 100_000 + "'\nedits: []\n",
        "`${q}`",
    ),
    "a seed that is none": (text_of("seed: 18446744073709551616\n"), "too large for a seed"),
    "a size that is none": (text_of(f"output: {{shard_size: '{'9' * 400}'}}\n"), "is no size"),
    **{
        f"a long number {number[:3]}{number[-3:]}": (text_of(f"seed: {number}\n"), "a number of")
        for number in LONG_INTEGERS
    },
}  # fmt: skip


@pytest.mark.parametrize("kind", HOSTILE_TEXTS)
def test_a_spec_that_is_hostile_is_refused(kind: str, tmp_path: Path) -> None:
    text, what = HOSTILE_TEXTS[kind]
    path = tmp_path / "spec.yaml"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    refused(lambda: surgery.load(path), what)


def test_dates_are_text(tmp_path: Path) -> None:
    (tmp_path / "spec.yaml").write_text(text_of("").replace("source: x", "source: 2024-01-01"))
    assert surgery.load(tmp_path / "spec.yaml").source == "2024-01-01"


def test_what_no_spec_can_be_is_not_read(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.yaml")
    with (tmp_path / "large.yaml").open("wb") as file:
        file.truncate(10 << 30)
    refused(lambda: surgery.load(tmp_path / "pipe.yaml"), "is a pipe")
    refused(lambda: surgery.load("/dev/zero"), f"more than {MAX_BYTES} bytes")
    refused(lambda: surgery.load(tmp_path / "large.yaml"), f"more than {MAX_BYTES} bytes")
    refused(lambda: surgery.load("../" * 2000))
    refused(lambda: surgery.load("a\0b"))


def test_a_setting_is_a_value_or_text() -> None:
    spec: dict[str, Any] = {"version": 1, "params": {"a": 1}, "source": "x${a}", "edits": []}
    for value in ("[" * 20_000, "9" * 5000, "1" + ":59" * 20_000, "0x" + "f" * 20_000):
        assert surgery.load(spec, a=value).source == f"x{value}"


# Headers


@pytest.mark.parametrize(
    "name",
    ["a\nb", "\x1b[2J", "a\u202eb", "\0", "\x7f", "a" * (MAX_NAME + 1), "a." * 65, f"layers.{'9' * 5000}.weight"],
)  # fmt: skip
def test_a_name_that_no_tensor_has_is_refused(name: str, model: Path) -> None:
    write_tensors(model / "model.safetensors", {"model.layers.0.weight": (2, 2), name: (2, 2)})
    refused(lambda: surgery.inspect(model), "impossible name", "model.safetensors")


def test_names_that_look_like_paths_are_names(model: Path, tmp_path: Path) -> None:
    names = ("../../x", "/etc/passwd", ".", "..", "...weight", "layers.²٣.weight")
    write_tensors(model / "model.safetensors", dict.fromkeys(names, (2, 2)))
    surgery.apply(surgery.plan(spec_of(model, CAST)), tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model", "out"]
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        "model.safetensors", "config.json", "surgery-manifest.json"
    }  # fmt: skip


def limited(code: str, megabytes: int, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run Python with so much address space beyond the imports of surgery (without torch)."""

    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_AS, ((megabytes + 400) << 20, (megabytes + 400) << 20))

    command = [sys.executable, "-c", code, *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, preexec_fn=limit, check=False)


INSPECT = "import sys, surgery\ntry: surgery.inspect(sys.argv[1])\nexcept surgery.SurgeryError as e: print(e)"
FULL = 100_000_000
HEADERS_OF_100_MB: dict[str, tuple[bytes, bytes, bytes]] = {
    "empty objects": (b'{"a":[', b"{},", b"1]}"),
    "empty lists": (b'{"a":[', b"[],", b"1]}"),
    "tensors": (b"{", b'"a":{"dtype":"U8","shape":[0],"data_offsets":[0,0]},', b'"b":0}'),
    "one shape": (b'{"a":{"dtype":"U8","data_offsets":[0,0],"shape":[', b"1,", b"0]}}"),
    "numbers": (b'{"a":[', b"1000000,", b"1]}"),
    "spaces": (b"{", b" ", b"}"),
}


@pytest.mark.parametrize("kind", HEADERS_OF_100_MB)
def test_a_header_of_100_mb_takes_bounded_memory(kind: str, model: Path) -> None:
    start, piece, end = HEADERS_OF_100_MB[kind]
    raw = start + piece * ((FULL - len(start) - len(end)) // len(piece)) + end
    (model / "model.safetensors").write_bytes(struct.pack("<Q", len(raw)) + raw)
    run = limited(INSPECT, 1500, str(model))
    assert run.returncode == 0 and "MemoryError" not in run.stderr, run.stderr[-500:]
    assert kind == "spaces" or "model.safetensors" in run.stdout


def test_more_tensors_than_any_model_has_are_refused(model: Path) -> None:
    entry = b'{"dtype":"U8","shape":[0],"data_offsets":[0,0]}'
    raw = b"{" + b",".join(b'"%x":%s' % (index, entry) for index in range(MAX_TENSORS + 3)) + b"}"
    (model / "model.safetensors").write_bytes(struct.pack("<Q", len(raw)) + raw)
    refused(lambda: surgery.inspect(model), f"more than {MAX_TENSORS} tensors")


def test_more_metadata_than_any_file_has_is_refused(model: Path) -> None:
    raw = b'{"__metadata__":{' + b",".join(b'"%x":""' % index for index in range(2_100_000)) + b"}}"
    (model / "model.safetensors").write_bytes(struct.pack("<Q", len(raw)) + raw)
    refused(lambda: surgery.inspect(model), "keys of `__metadata__`")


def test_paths_of_many_parts_take_memory_by_their_number(model: Path) -> None:
    names = {f"{index}{'.abcdef' * 64}": (1,) for index in range(5000)}
    write_tensors(model / "model.safetensors", names)
    run = limited(INSPECT, 300, str(model))
    assert (run.returncode, run.stdout) == (0, ""), run.stderr[-500:]


# Config and index


@pytest.mark.parametrize("name", ["config.json", "model.safetensors.index.json"])
def test_a_key_that_stands_twice_is_refused(name: str, model: Path) -> None:
    raw = '{"weight_map": {"a": "model.safetensors"}, "model_type": "llama", "weight_map": {}}'
    (model / name).write_text(raw)
    refused(lambda: surgery.inspect(model), name, "`weight_map` twice")


@pytest.mark.parametrize("piece", [b"{},", b"[],", b"[[1],{}],"])
def test_a_config_of_millions_of_objects_is_refused(piece: bytes, model: Path) -> None:
    (model / "config.json").write_bytes(b'{"a": [' + piece * (60_000_000 // len(piece)) + b"1]}")
    refused(lambda: surgery.inspect(model), "config.json", "objects and lists")


NO_LAYERS: dict[str, object] = {
    "attention_types": 5,
    "block_types": {"a": 1},
    "hybrid_override_pattern": "M",
    "first_k_dense_replace": 10**40,
    "moe_layer_freq": "2",
}


@pytest.mark.parametrize("key", NO_LAYERS)
def test_a_config_that_tells_nothing_of_its_layers_is_our_own_error(key: str, model: Path) -> None:
    (model / "config.json").write_bytes(json_bytes({**CONFIG, key: NO_LAYERS[key]}))
    with suppress(surgery.SurgeryError):
        surgery.plan(spec_of(model, {"op": "layers.select", "keep": [1, 1, 0]}))


def test_a_config_of_countless_layers_is_not_written_out(model: Path) -> None:
    (model / "config.json").write_bytes(json_bytes({**CONFIG, "attention_types": [[["a", "b"], 10**12]]}))
    plan = surgery.plan(spec_of(model, {"op": "layers.select", "keep": [1]}))
    assert json.loads(plan.config or b"")["attention_types"] == [[["b"], 1]]


def test_infinity_in_a_config_is_kept(model: Path, tmp_path: Path) -> None:
    """Mamba's configs say `time_step_limit: [0.0, Infinity]`."""
    (model / "config.json").write_text('{"model_type": "mamba2", "time_step_limit": [0.0, Infinity]}')
    surgery.apply(surgery.plan(spec_of(model, CAST)), tmp_path / "out")
    assert json.loads((tmp_path / "out" / "config.json").read_text())["time_step_limit"] == [0.0, float("inf")]


def sharded(directory: Path, files: Mapping[str, str]) -> Path:
    """An index that puts tensor t0, t1, ... into `files`; x.safetensors holds t0."""
    write_tensors(directory / "x.safetensors", {"t0": (2, 2)})
    index = {"weight_map": dict(files)}
    (directory / "model.safetensors.index.json").write_bytes(json_bytes(index))
    return directory


def test_an_index_of_a_hundred_thousand_files_is_judged_soon(tmp_path: Path) -> None:
    refused(
        lambda: surgery.inspect(
            sharded(tmp_path / "m", {f"t{index}": f"f{index}.safetensors" for index in range(100_000)})
        ),
        "f0.safetensors",
        "is missing",
    )


@pytest.mark.parametrize("link", [os.symlink, os.link])
def test_one_file_under_many_names_is_read_once_at_most(link: Callable[[Path, Path], None], tmp_path: Path) -> None:
    directory = sharded(tmp_path / "m", {"t0": "x.safetensors", "t1": "y.safetensors"})
    link(directory / "x.safetensors", directory / "y.safetensors")
    refused(lambda: surgery.inspect(directory), "x.safetensors", "y.safetensors", "one file")


def test_a_shard_whose_name_moves_the_cursor_is_refused(tmp_path: Path) -> None:
    refused(lambda: surgery.inspect(sharded(tmp_path / "m", {"\x1b[2J": "\x1b[2J.safetensors"})), "\\x1b[2J")


# What lies beside the weights


@pytest.mark.parametrize("name", ["a\x1b[2J.txt", "a\nb.txt", "a\x1b[2J.bin", "\u202e.json"])
def test_a_side_file_whose_name_moves_the_cursor_is_refused(name: str, model: Path) -> None:
    (model / name).write_text("x")
    refused(lambda: surgery.inspect(model), "no text")


def test_an_adapter_beside_a_base_does_not_reach_the_output(model: Path, tmp_path: Path) -> None:
    """transformers would put it into the model."""
    write_adapter(model)
    plan = surgery.plan(spec_of(model, CAST))
    assert any("adapter" in note and "left behind" in note for note in plan.notes)
    surgery.apply(plan, tmp_path / "out")
    assert not [path for path in (tmp_path / "out").iterdir() if "adapter" in path.name]


def test_a_side_file_larger_than_the_disk_is_refused_before_anything_is_written(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A sparse file takes no room where it lies, and all of its size where it is copied to."""
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=10 << 20))
    with (model / "tokenizer.json").open("wb") as file:
        file.truncate(20 << 20)
    refused(lambda: surgery.apply(surgery.plan(spec_of(model, CAST)), tmp_path / "out"), "the output takes 21.0 MB")
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def cached(home: Path, name: str) -> tuple[Path, Path]:
    """A repository of the Hub client's cache: itself, and its one snapshot."""
    snapshot = home / name / "snapshots" / ("a" * 40)
    snapshot.mkdir(parents=True)
    write_model(snapshot)
    (home / name / "blobs").mkdir()
    return home / name, snapshot


def test_links_of_a_hub_cache_to_its_blobs_are_followed(tmp_path: Path) -> None:
    repository, snapshot = cached(tmp_path, "models--org--name")
    shutil.move(snapshot / "model.safetensors", repository / "blobs" / "abc")
    (snapshot / "model.safetensors").symlink_to("../../blobs/abc")
    assert len(surgery.inspect(snapshot).checkpoint.tensors) == 8


@pytest.mark.parametrize("name", ["models--org--name", "evil", "home"])
def test_links_of_what_looks_like_a_hub_cache_do_not_lead_elsewhere(name: str, tmp_path: Path) -> None:
    repository, snapshot = cached(tmp_path, name)
    (repository / "secret").write_text("secret")
    (snapshot / "tokenizer.json").symlink_to("../../secret")
    refused(lambda: surgery.inspect(snapshot), "leads out")


@pytest.mark.parametrize("content", [b"\xff\xff", b"../../etc", b"", None])
def test_a_broken_hub_cache_is_refused(content: bytes | None, tmp_path: Path) -> None:
    repository, _ = cached(tmp_path, "models--org--name")
    (repository / "refs").mkdir()
    with (repository / "refs" / "main").open("wb") as file:
        file.truncate(20 << 30) if content is None else file.write(content)
    refused(lambda: surgery.inspect(repository))


# Manifests that mislead whoever verifies

NASTY: list[Any] = [
    None,
    True,
    -1,
    10**30,
    1.5,
    "",
    "../etc",
    "/etc/passwd",
    "a\0b",
    "\ud800",
    "x" * 9999,
    [],
    {},
    [None],
]


def places_of(value: Any, above: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Where something stands in a manifest: the first of a list's or map's that are alike stands for all."""
    inside = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, item in list(inside)[:13]:
        yield (*above, key)
        yield from places_of(item, (*above, key))


def test_a_manifest_that_is_forged_and_sealed_ends_in_our_own_error(large: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    surgery.apply(surgery.plan(spec_of(large, CAST)), out)
    path = out / "surgery-manifest.json"
    whole = json.loads(path.read_text())
    num_refused = 0
    for place in list(places_of(whole)):
        for value in NASTY:
            forged = json.loads(json.dumps(whole))
            entry = forged
            for key in place[:-1]:
                entry = entry[key]
            entry[place[-1]] = value
            forged["manifest_sha256"] = sealed(forged)
            path.write_bytes(json.dumps(forged, indent=1, ensure_ascii=False).encode(errors="surrogatepass") + b"\n")
            try:
                surgery.verify(out, reproduce=True, source=str(large))
            except surgery.SurgeryError:
                num_refused += 1
    assert num_refused > 100


def sealed(content: dict[str, Any]) -> str:
    """As a manifest is: the sha256 of all but the seal itself."""
    body = {key: content[key] for key in sorted(content) if key != "manifest_sha256"}
    return hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()


def test_a_manifest_that_is_no_file_or_endless_is_refused(large: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    surgery.apply(surgery.plan(spec_of(large, CAST)), out)
    path = out / "surgery-manifest.json"
    path.unlink()
    os.mkfifo(path)
    refused(lambda: surgery.verify(out), "is no regular file")
    path.unlink()
    path.symlink_to("/dev/zero")
    refused(lambda: surgery.verify(out), "is no regular file")
    path.unlink()
    with path.open("wb") as file:
        file.truncate(1 << 40)
    refused(lambda: surgery.verify(out), "is damaged")


# What is in the way of a run


def test_a_pipe_or_a_socket_is_never_replaced(large: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    os.mkfifo(out)
    refused(lambda: surgery.apply(surgery.plan(spec_of(large, CAST)), out, overwrite=True), "is a device, a pipe")
    assert stat.S_ISFIFO(out.stat().st_mode) and sorted(tmp_path.iterdir()) == [large, out]


def test_a_source_that_became_a_pipe_is_not_waited_for(large: Path, tmp_path: Path) -> None:
    plan = surgery.plan(spec_of(large, CAST))
    (large / "model.safetensors").unlink()
    os.mkfifo(large / "model.safetensors")
    refused(lambda: surgery.apply(plan, tmp_path / "out"), "model.safetensors")


def test_a_device_that_computes_nothing_is_refused(large: Path, tmp_path: Path) -> None:
    plan = surgery.plan(spec_of(large, CAST))
    refused(lambda: surgery.apply(plan, tmp_path / "out", device="meta"), "--device meta cannot be used")


# Disks that fail while a run goes on


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 4 MiB."""
    place = tmp_path / "disk"
    place.mkdir()
    mount = shutil.which("mount")
    command = [mount or "", "-t", "tmpfs", "-o", "size=4m", "tmpfs", str(place)]
    if mount is None or subprocess.run(command, capture_output=True, check=False).returncode:
        pytest.skip("no file system may be mounted here")
    yield place
    subprocess.run(["umount", "-l", str(place)], check=True)


@pytest.fixture
def large(tmp_path: Path) -> Path:
    """A checkpoint of 1 MiB in forty tensors."""
    shapes = {f"layers.{index}.weight": (64, 100) for index in range(40)}
    write_tensors(tmp_path / "large" / "model.safetensors", shapes)
    (tmp_path / "large" / "config.json").write_bytes(json_bytes(CONFIG))
    return tmp_path / "large"


def sharded_cast(source: Path) -> dict[str, Any]:
    return spec_of(source, CAST, output={"shard_size": "16KB"})


def test_a_disk_that_fills_up_meanwhile_leaves_the_work_to_resume(large: Path, small_disk: Path) -> None:
    plan, out = surgery.plan(sharded_cast(large)), small_disk / "out"
    ballast = small_disk / "ballast"

    def fill(done: int, total: int) -> None:
        if done and not ballast.exists():
            with ballast.open("wb", buffering=0) as file:
                try:
                    while file.write(bytes(4096)):
                        pass
                except OSError:
                    pass

    message = refused(lambda: surgery.apply(plan, out, workers=1, report=fill), os.strerror(errno.ENOSPC), "--resume")
    assert str(out) in message and not out.exists()
    ballast.unlink()
    seen: list[int] = []
    surgery.apply(plan, out, resume=True, report=lambda done, total: seen.append(done))
    assert seen[0] > 0 and len(surgery.verify(out).tensors) == 40


def test_a_limit_on_the_size_of_files_is_an_error_with_a_reason(large: Path, tmp_path: Path) -> None:
    (tmp_path / "spec.yaml").write_text(json.dumps(spec_of(large, CAST)))
    command = [sys.executable, "-m", "surgery", "apply", str(tmp_path / "spec.yaml"), "-o", str(tmp_path / "out")]

    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))

    run = subprocess.run(command, capture_output=True, text=True, preexec_fn=limit, check=False, timeout=60)
    assert run.returncode == 1 and "Traceback" not in run.stderr
    assert run.stderr.startswith("error: ") and os.strerror(errno.EFBIG) in run.stderr
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("number", [errno.EIO, errno.ESTALE])
@pytest.mark.parametrize("at", [0, 20])
def test_a_source_that_cannot_be_read_to_its_end_is_named(
    at: int, number: int, large: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan, out, preadv = surgery.plan(sharded_cast(large)), tmp_path / "out", os.preadv
    calls = iter(range(1_000_000))

    def failing(*arguments: Any) -> int:
        if next(calls) >= at:
            raise OSError(number, os.strerror(number))
        return preadv(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(os, "preadv", failing)
        refused(lambda: surgery.apply(plan, out, memory=plan.cost.min_memory), os.strerror(number), "model.safetensors")
    assert not out.exists()
    surgery.apply(plan, out, resume=True)
    assert len(surgery.verify(out).tensors) == 40


def test_a_truncated_file_is_never_mistaken_for_zeros(large: Path) -> None:
    raw = (large / "model.safetensors").read_bytes()
    (large / "model.safetensors").write_bytes(raw[:-1])
    refused(lambda: surgery.plan(spec_of(large, CAST)), "truncated")


def test_headers_are_as_they_are_written_for_these_tests() -> None:
    """The helper that makes hostile files makes sound ones too."""
    raw = header_bytes(tensors_of({"a": (2, 3)}))
    assert json.loads(raw[8:]) == {"a": {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]}}
