"""The command line: exit codes, what goes where, what it reads, and what `verify` finds."""

import json
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click
import pytest
import torch
import yaml
from click.testing import CliRunner, Result
from safetensors.torch import save_file

import surgery
from surgery.cli import main
from surgery.op import op_names

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
EDIT = "{op: tensor.cast, tensors: '.*', dtype: '${dtype}'}"
CAST = f"version: 1\nparams: {{dtype: float16}}\nsource: model\nedits:\n  - {EDIT}\n"


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working directory: a sharded `model`, and `cast.yaml` for it."""
    model = tmp_path / "model"
    model.mkdir()
    files = {"model-00001-of-00002.safetensors": "a", "model-00002-of-00002.safetensors": "b"}
    for file, name in files.items():
        save_file({f"{name}.weight": torch.arange(64.0).reshape(8, 8), f"{name}.bias": torch.ones(8)}, model / file)
    weight_map = {f"{name}.{part}": file for file, name in files.items() for part in ("weight", "bias")}
    (model / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    (model / "config.json").write_text(json.dumps({"model_type": "llama", "torch_dtype": "float32"}))
    (model / "tokenizer.json").write_text('{"a": 1}\n')
    (tmp_path / "cast.yaml").write_text(CAST + "output: {shard_size: 150}\n")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def call(*arguments: str) -> Result:
    return CliRunner().invoke(main, arguments)


@pytest.fixture
def out(home: Path) -> Path:
    """An output of two shards, index, config, side file and manifest."""
    assert call("apply", "cast.yaml", "-o", "out").exit_code == 0
    return home / "out"


# Exit codes, and what goes where


def test_done_is_0_and_results_go_to_stdout(home: Path) -> None:
    for arguments in (["validate", "cast.yaml"], ["plan", "cast.yaml"], ["inspect", "model"], ["ops"], ["schema"]):
        result = call(*arguments)
        assert (result.exit_code, result.stderr) == (0, ""), arguments
        assert result.stdout.endswith("\n") and len(result.stdout) > 5


def test_apply_prints_plan_and_manifest_to_stdout_and_where_it_wrote_to_stderr(home: Path) -> None:
    result = call("apply", "cast.yaml", "-o", "out")
    assert result.exit_code == 0
    assert "Plan: 4 change" in result.stdout and "mean RMS error" in result.stdout
    assert result.stderr == "wrote out\n"


@pytest.mark.parametrize(
    "arguments",
    [
        ["validate", "nowhere.yaml"],
        ["plan", "nowhere.yaml"],
        ["plan", "cast.yaml", "--set", "dtype=int8"],
        ["plan", "cast.yaml", "--set", "nothing=1"],
        ["apply", "cast.yaml", "-o", "model"],
        ["apply", "cast.yaml", "-o", "out", "--memory", "lots"],
        ["apply", "cast.yaml", "-o", "out", "--memory", "1MiB"],
        ["apply", "cast.yaml", "-o", "out", "--device", "abacus"],
        ["apply", "cast.yaml", "-o", "out", "--device", "cuda:99"],
        ["verify", "model"],
        ["verify", "nowhere"],
        ["inspect", "./nowhere"],
        ["ops", "quantize.nf5"],
    ],
    ids=" ".join,
)
def test_what_does_not_hold_is_1_and_messages_go_to_stderr(home: Path, arguments: list[str]) -> None:
    result = call(*arguments)
    assert result.exit_code == 1
    assert not isinstance(result.exception, surgery.SurgeryError)
    assert result.stderr.startswith("error: ")
    assert "error" not in result.stdout
    assert not (home / "out").exists()


@pytest.mark.parametrize(
    "arguments",
    [
        ["frobnicate"],
        ["plan"],
        ["plan", "cast.yaml", "extra"],
        ["plan", "cast.yaml", "--colour"],
        ["plan", "cast.yaml", "--set", "dtype"],
        ["apply", "cast.yaml"],
        ["apply", "cast.yaml", "-o", "out", "--workers", "0"],
        ["apply", "cast.yaml", "-o", "out", "--workers", "many"],
        ["validate"],
        ["validate", "cast.yaml", "--format", "xml"],
        ["schema", "extra"],
    ],
    ids=" ".join,
)
def test_wrong_usage_is_2(home: Path, arguments: list[str]) -> None:
    result = call(*arguments)
    assert (result.exit_code, result.stdout) == (2, "")
    assert "Usage: " in result.stderr
    assert not (home / "out").exists()


def test_the_program_gives_the_exit_code_to_the_shell(home: Path) -> None:
    for arguments, code in ((["ops"], 0), (["plan", "nowhere.yaml"], 1), (["plan"], 2)):
        run = subprocess.run([sys.executable, "-m", "surgery", *arguments], capture_output=True, text=True)
        assert run.returncode == code
        assert "Traceback" not in run.stderr


def test_no_progress_bar_is_drawn_where_there_is_no_terminal(home: Path) -> None:
    assert "\x1b" not in call("apply", "cast.yaml", "-o", "out").output


# Documentation


def documented() -> Iterator[tuple[str, str]]:
    """The rows of the README's table of commands: usage, what it does."""
    for line in README.splitlines():
        row = re.match(r"\| `surgery ([^`]*)` \| (.*) \|[^|]*\|$", line)
        if row:
            yield row[1], row[2]


def test_every_command_is_in_the_table_of_the_readme() -> None:
    assert [usage.split()[0] for usage, _ in documented()] == list(main.commands)


def test_every_option_is_in_the_readme() -> None:
    for name, command in main.commands.items():
        row = " ".join(" ".join(row) for row in documented() if row[0].split()[0] == name)
        text = row + (" --set" if "Specs take `--set NAME=VALUE`" in README else "")
        for option in (item for item in command.params if isinstance(item, click.Option)):
            assert any(spelling in text for spelling in option.opts), f"{name} {option.opts}"
            assert option.help, f"{name} {option.opts}"


def test_every_option_in_the_readme_exists() -> None:
    for usage, does in documented():
        command = main.commands[usage.split()[0]]
        known = {spelling for item in command.params for spelling in item.opts}
        assert set(re.findall(r"--[a-z-]+", usage + does)) <= known


def test_every_test_that_the_readme_names_is_there() -> None:
    named = set(re.findall(r"`(test_[a-z_*]+\.py)`", README))
    assert named and all(list((ROOT / "tests").glob(name)) for name in named)


def test_every_recipe_is_in_the_readme() -> None:
    table = README.partition("names a recipe")[2].partition("\n\n")[2].partition("\n\n")[0]
    recipes = {path.stem for path in (ROOT / "specs").glob("*.yaml")}
    assert recipes == set(re.findall(r"^\| `([a-z0-9-]+)`", table, re.MULTILINE))
    for path in (ROOT / "specs").glob("*.yaml"):
        row = next(line for line in table.splitlines() if line.startswith(f"| `{path.stem}`"))
        params = yaml.safe_load(path.read_text())["params"]
        assert re.findall(r"`(\w+)`", row.rsplit("|", 2)[1]) == list(params), path.stem


def test_every_op_is_in_the_readme() -> None:
    table = README.partition("## Ops")[2].partition("## ")[0]
    assert set(re.findall(r"`([a-z]+\.[a-z0-9_]+)`", table)) == set(op_names())


@pytest.mark.parametrize("name", main.commands)
def test_every_command_explains_itself(name: str) -> None:
    result = call(name, "--help")
    assert result.exit_code == 0 and result.stdout.startswith(f"Usage: main {name}")
    assert main.commands[name].help


def test_every_command_is_one_call_of_the_api() -> None:
    assert {name.replace("-", "_") for name in main.commands} <= set(surgery.__all__)


# Formats


def test_validate_speaks_json(home: Path) -> None:
    Path("bad.yaml").write_text("version: 1\nsource: model\nedits:\n  - {op: quantise.nf4}\n")
    assert json.loads(call("validate", "cast.yaml", "--format", "json").stdout) == []
    result = call("validate", "cast.yaml", "bad.yaml", "--format", "json")
    assert result.exit_code == 1
    assert json.loads(result.stdout) == [
        {
            "what": "there is no op `quantise.nf4`",
            "at": "bad.yaml:4, edits[0].op",
            "fix": "did you mean `quantize.nf4`?",
        }
    ]


def test_validate_speaks_to_github(home: Path) -> None:
    Path("bad.yaml").write_text("version: 1\nsource: model\nedits:\n  - {op: 'quantise%nf4'}\nextra: 1\n")
    result = call("validate", "bad.yaml", "nowhere.yaml", "--format", "github")
    first, second, third = result.stdout.splitlines()
    assert result.exit_code == 1
    assert first.startswith("::error file=bad.yaml,line=5::unknown key `extra`%0A")
    assert second.startswith("::error file=bad.yaml,line=4::there is no op `quantise%25nf4`%0A")
    assert third.startswith("::error file=nowhere.yaml::is no spec")
    assert call("validate", "cast.yaml", "--format", "github").stdout == ""


def test_validate_opens_no_source(home: Path) -> None:
    Path("far.yaml").write_text(CAST.replace("model", "org/that-does-not-exist"))
    result = call("validate", "far.yaml", "cast.yaml")
    assert (result.exit_code, result.stdout) == (0, "2 valid\n")


def test_plan_speaks_json(home: Path) -> None:
    plan = json.loads(call("plan", "cast.yaml", "--json").stdout)
    assert plan == surgery.plan("cast.yaml").to_json()
    assert plan["summary"] == {"change": 4, "add": 0, "drop": 0, "rename": 0, "copy": 0}


def test_plan_text_is_what_apply_prints_first(home: Path) -> None:
    plan = call("plan", "cast.yaml").stdout
    assert call("apply", "cast.yaml", "-o", "out").stdout.startswith(plan)
    assert plan == f"{surgery.plan('cast.yaml')}\n"


def test_inspect_speaks_json(home: Path) -> None:
    found = json.loads(call("inspect", "model", "--json").stdout)
    assert found == surgery.inspect("model").to_json()
    assert found["model_type"] == "llama"
    assert found["modules"][0] == {
        "path": "a", "kind": "Linear", "tensors": {"a.bias": "f32[8]", "a.weight": "f32[8, 8]"},
    }  # fmt: skip


def test_inspect_says_what_a_checkpoint_is_quantized_with(home: Path) -> None:
    Path("q.yaml").write_text("version: 1\nsource: model\nedits:\n  - {op: quantize.nf4, modules: [a, b], expect: 2}\n")
    assert call("apply", "q.yaml", "-o", "out").exit_code == 0
    assert "quantized: bitsandbytes nf4, 2 modules" in call("inspect", "out").stdout
    assert json.loads(call("inspect", "out", "--json").stdout)["quantization"] == {"bitsandbytes nf4": 2}


def test_set_overrides_a_parameter(home: Path) -> None:
    result = call("plan", "cast.yaml", "--set", "dtype=float32", "--set", "dtype=bfloat16")
    assert "f32[8, 8] → bf16[8, 8]" in result.stdout


def test_ops_lists_every_op_and_shows_its_manual() -> None:
    listed = call("ops").stdout.splitlines()
    assert [line.split()[0] for line in listed] == list(op_names())
    for name in op_names():
        manual = call("ops", name).stdout
        assert manual.startswith(f"{name}\n\n") and "Fields" in manual and "Reads " in manual


def test_schema_prints_json() -> None:
    assert json.loads(call("schema").stdout) == surgery.schema()


def test_the_version_is_that_of_the_package() -> None:
    assert re.fullmatch(r"surgery, version \d+\.\d+\.\d+\n", call("--version").stdout)


# What planning reads


def modules_after(*arguments: str) -> set[str]:
    """The modules that are imported once a command is done."""
    code = (
        "import sys\nfrom surgery.cli import main\n"
        f"main({list(arguments)!r}, standalone_mode=False)\n"
        "print('imported', *sorted(sys.modules))"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return set(run.stdout.rpartition("imported ")[2].split())


@pytest.mark.parametrize(
    "arguments",
    [["validate", "cast.yaml"], ["plan", "cast.yaml"], ["plan", "q.yaml"], ["inspect", "model"], ["ops"], ["schema"]],
    ids=" ".join,
)
def test_what_needs_no_arithmetic_imports_no_torch(home: Path, arguments: list[str]) -> None:
    Path("q.yaml").write_text("version: 1\nsource: model\nedits:\n  - {op: quantize.nf4, modules: [a, b]}\n")
    imported = modules_after(*arguments)
    assert not imported & {"torch", "numpy", "transformers", "safetensors", "huggingface_hub", "bitsandbytes"}


def test_planning_reads_headers_only(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A terabyte that exists in the header alone is planned, and nobody asks for a byte of it."""
    header: dict[str, Any] = {}
    position = 0
    for index in range(1000):
        num_bytes = 1 << 30
        shape = [1 << 14, 1 << 15]
        header[f"model.layers.{index}.up_proj.weight"] = {
            "dtype": "BF16", "shape": shape, "data_offsets": [position, position + num_bytes],
        }  # fmt: skip
        position += num_bytes
    raw = json.dumps(header).encode()
    Path("huge").mkdir()
    Path("huge/config.json").write_text('{"model_type": "llama"}')
    with Path("huge/model.safetensors").open("wb") as file:
        file.write(len(raw).to_bytes(8, "little") + raw)
        file.truncate(8 + len(raw) + position)
    before = Path("/proc/self/io").read_text()
    plan = surgery.plan("nf4", model="huge")
    after = Path("/proc/self/io").read_text()
    num_read = int(re.findall(r"rchar: (\d+)", after)[0]) - int(re.findall(r"rchar: (\d+)", before)[0])
    assert plan.summary()["change"] == 1000
    assert plan.cost.bytes_read == 8 + len(raw) + position
    assert num_read < 16 * len(raw)


# verify


def test_verify_accepts_what_was_written(out: Path) -> None:
    result = call("verify", "out")
    assert (result.exit_code, result.stderr) == (0, "")
    assert re.fullmatch(r"5 files, 4 tensors, [\d.]+ kB: as written\n", result.stdout)


def flip(path: Path, position: int, bit: int = 0) -> None:
    raw = bytearray(path.read_bytes())
    raw[position] ^= 1 << bit
    path.write_bytes(raw)


def expected_names(out: Path, file: str, position: int) -> list[str]:
    """What the message must name when a byte of `file` differs."""
    if not file.endswith(".safetensors"):
        return [file]
    raw = (out / file).read_bytes()
    header_bytes = 8 + int.from_bytes(raw[:8], "little")
    if position < header_bytes:
        return [file, "in its header"]
    header = json.loads(raw[8:header_bytes])
    spans = {name: entry["data_offsets"] for name, entry in header.items() if name != "__metadata__"}
    at = position - header_bytes
    return [file, *(f"tensor `{name}`" for name, (start, stop) in spans.items() if start <= at < stop)]


def test_verify_finds_one_flipped_bit_anywhere(out: Path) -> None:
    files = sorted(path.name for path in out.iterdir())
    assert len(files) == 6
    for file in files:
        pristine = (out / file).read_bytes()
        step = max(1, len(pristine) // 40)
        for position in [*range(0, len(pristine), step), len(pristine) - 1]:
            names = expected_names(out, file, position)
            flip(out / file, position, position % 8)
            result = call("verify", "out")
            (out / file).write_bytes(pristine)
            assert result.exit_code == 1, f"{file}, byte {position}"
            assert not [name for name in names if name not in result.stderr], f"{file}, byte {position}"
    assert call("verify", "out").exit_code == 0


def test_verify_names_every_file_that_differs(out: Path) -> None:
    shards = sorted(path.name for path in out.glob("*.safetensors"))
    for name in (*shards, "tokenizer.json"):
        flip(out / name, -1)
    with pytest.raises(surgery.VerifyError) as caught:
        surgery.verify(out)
    assert len(caught.value.problems) == 3


def test_verify_finds_a_file_that_is_missing(out: Path) -> None:
    (out / "tokenizer.json").unlink()
    assert "`tokenizer.json` is missing" in call("verify", "out").stderr


def test_verify_finds_a_file_that_was_added(out: Path) -> None:
    (out / "extra").mkdir()
    (out / "extra" / "adapter_model.safetensors").write_bytes(b"")
    assert "`extra/adapter_model.safetensors` is not in the manifest" in call("verify", "out").stderr


def test_verify_finds_a_file_that_grew_or_shrank(out: Path) -> None:
    raw = (out / "tokenizer.json").read_bytes()
    for changed in (raw + b" ", raw[:-1], b""):
        (out / "tokenizer.json").write_bytes(changed)
        assert "`tokenizer.json` has" in call("verify", "out").stderr


def test_verify_finds_a_file_that_was_replaced_by_a_link_out(out: Path) -> None:
    (out / "tokenizer.json").rename(out.parent / "elsewhere.json")
    (out / "tokenizer.json").symlink_to(out.parent / "elsewhere.json")
    assert "`tokenizer.json` leads out" in call("verify", "out").stderr


@pytest.mark.parametrize("content", ["", "no JSON", "[]", "{}", '{"version": 1}', "[" * 100_000, '{"version": 1e999}'])
def test_verify_refuses_a_manifest_that_is_none(out: Path, content: str) -> None:
    (out / "surgery-manifest.json").write_text(content)
    result = call("verify", "out")
    assert result.exit_code == 1 and "surgery-manifest.json" in result.stderr


def test_verify_refuses_a_manifest_that_is_sealed_but_hollow(out: Path) -> None:
    """The seal is no secret: whoever forges one still gets a message, never a traceback."""
    from surgery.manifest import Manifest

    for forged in ({"version": 1}, {"version": 1, "files": 7, "tensors": []}, {"version": 1, "files": [{}]}):
        (out / "surgery-manifest.json").write_bytes(Manifest(forged).encode())
        with pytest.raises(surgery.VerifyError):
            surgery.verify(out)


def test_verify_makes_it_again_from_a_local_source(out: Path) -> None:
    result = call("verify", "out", "--reproduce", "--source", "model")
    assert (result.exit_code, result.stderr) == (0, "")
    assert "made again byte for byte" in result.stdout
    assert sorted(path.name for path in out.parent.iterdir()) == ["cast.yaml", "model", "out"]


def test_verify_asks_where_a_local_source_is(out: Path) -> None:
    result = call("verify", "out", "--reproduce")
    assert result.exit_code == 1 and "--source PATH" in result.stderr


def test_verify_refuses_a_source_that_is_another(out: Path) -> None:
    save_file({"a.weight": torch.zeros(2)}, out.parent / "other.safetensors")
    result = call("verify", "out", "--reproduce", "--source", "other.safetensors")
    assert result.exit_code == 1 and "is not what the output was made from" in result.stderr


def test_verify_finds_a_source_whose_weights_are_others_under_the_same_header(out: Path) -> None:
    flip(out.parent / "model" / "model-00001-of-00002.safetensors", -1, 7)
    result = call("verify", "out", "--reproduce", "--source", "model")
    assert result.exit_code == 1 and "tensor `a.weight` came out differently" in result.stderr


def test_verify_holds_a_source_against_its_hashes_where_they_were_noted(home: Path) -> None:
    assert call("apply", "cast.yaml", "-o", "out", "--hash-sources").exit_code == 0
    assert call("verify", "out", "--reproduce", "--source", "model").exit_code == 0
    flip(home / "model" / "model-00001-of-00002.safetensors", -1, 7)
    result = call("verify", "out", "--reproduce", "--source", "model")
    assert result.exit_code == 1 and "`source` is not what the output was made from" in result.stderr


def test_verify_names_a_tensor_that_another_build_would_write_differently(out: Path) -> None:
    """Reproducing compares with the manifest: a changed side file of the source is a difference too."""
    (out.parent / "model" / "tokenizer.json").write_text('{"a": 2}\n')
    result = call("verify", "out", "--reproduce", "--source", "model")
    assert result.exit_code == 1 and "file `tokenizer.json` came out differently" in result.stderr
