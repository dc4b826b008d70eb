"""Corners that random chains of edits and odd callers found."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

import surgery

ALL = {"modules": ".*"}


def checkpoint(directory: Path, tensors: dict[str, torch.Tensor], config: dict[str, Any] | None = None) -> Path:
    directory.mkdir()
    save_file(tensors, directory / "model.safetensors")
    (directory / "config.json").write_text(json.dumps({"model_type": "llama", **(config or {})}))
    return directory


def spec(source: Path, *edits: dict[str, Any], **fields: Any) -> dict[str, Any]:
    return {"version": 1, "source": str(source), "edits": list(edits), **fields}


def test_blocks_of_an_inner_quantization_are_never_cut_by_small_tiles(tmp_path: Path) -> None:
    weight = torch.randn(1 << 21, 1, generator=torch.Generator().manual_seed(0)).half()
    source = checkpoint(tmp_path / "model", {"layers.0.q.weight": weight})
    edits = [
        {"op": "quantize.fp4", "block_size": 2048, **ALL},
        {"op": "quantize.dequantize", "dtype": "bfloat16", **ALL},
        {"op": "quantize.fp4", "block_size": 1024, **ALL},
    ]
    plan = surgery.plan(spec(source, *edits))
    manifests = [
        surgery.apply(plan, tmp_path / f"out-{memory}", memory=memory, workers=1).encode()
        for memory in (plan.cost.min_memory, 2 * plan.cost.min_memory, 1 << 31)
    ]
    assert len(set(manifests)) == 1


@pytest.mark.parametrize("shard_size", ["1KB", "5GB"])
def test_a_file_of_nothing_but_empty_tensors_is_written(tmp_path: Path, shard_size: str) -> None:
    source = checkpoint(tmp_path / "model", {"b.weight": torch.randn(64, 64), "z": torch.zeros(0, 8)})
    cast = {"op": "tensor.cast", "tensors": "z", "dtype": "bfloat16"}
    drop = [] if shard_size == "1KB" else [{"op": "tensor.drop", "tensors": r"b\.weight"}]
    surgery.apply(surgery.plan(spec(source, cast, *drop, output={"shard_size": shard_size})), tmp_path / "out")
    surgery.verify(tmp_path / "out")
    file = sorted((tmp_path / "out").glob("*.safetensors"))[-1]
    with safe_open(file, "pt") as opened:
        assert opened.get_tensor("z").shape == (0, 8) and opened.get_tensor("z").dtype == torch.bfloat16


def test_renaming_keeps_what_says_that_int8_weights_are_quantized(tmp_path: Path) -> None:
    tensors = {"layers.0.q.weight": torch.ones(4, 4, dtype=torch.int8), "layers.0.q.SCB": torch.ones(4)}
    entry = {"quant_method": "bitsandbytes", "load_in_8bit": True}
    source = checkpoint(tmp_path / "model", tensors, {"quantization_config": entry})
    rename = {"op": "tensor.rename", "tensors": "layers(.*)", "to": r"h\1"}
    surgery.apply(surgery.plan(spec(source, rename)), tmp_path / "out")
    assert json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"] == entry


def test_an_earlier_entry_does_not_say_that_new_4_bit_weights_are_none(tmp_path: Path) -> None:
    entry = {"quant_method": "bitsandbytes", "load_in_4bit": False, "load_in_8bit": False}
    source = checkpoint(tmp_path / "model", {"layers.0.q.weight": torch.randn(64, 64)}, {"quantization_config": entry})
    plan = surgery.plan(spec(source, {"op": "quantize.nf4", **ALL}))
    assert plan.config is not None
    assert json.loads(plan.config)["quantization_config"]["load_in_4bit"] is True


@pytest.mark.parametrize("name", ["__metadata__", "a\ud800", "a\0"])
def test_a_name_that_no_file_can_hold_is_refused(tmp_path: Path, name: str) -> None:
    source = checkpoint(tmp_path / "model", {"a": torch.ones(2)})
    with pytest.raises(surgery.OpError, match="would be renamed"):
        surgery.plan(spec(source, {"op": "tensor.rename", "tensors": "a", "to": name}))


def test_what_replaces_a_dropped_tensor_does_not_hide_it(tmp_path: Path) -> None:
    source = checkpoint(tmp_path / "model", {"a": torch.ones(2), "b": torch.zeros(2)})
    plan = surgery.plan(
        spec(source, {"op": "tensor.drop", "tensors": "a"}, {"op": "tensor.rename", "tensors": "b", "to": "a"})
    )
    assert list(plan.dropped) == ["a"]
    assert plan.summary() == {"change": 0, "add": 0, "drop": 1, "rename": 1, "copy": 0}


@pytest.mark.parametrize("redirection", ["2>&-", ">&-", "<&- >&- 2>&-"])
def test_closed_streams_are_no_fault(tmp_path: Path, redirection: str) -> None:
    source = checkpoint(tmp_path / "model", {"layers.0.q.weight": torch.randn(64, 64)})
    command = f'"{sys.executable}" -m surgery apply nf4 --set model={source} -o {tmp_path / "out"} {redirection}'
    assert subprocess.run(["sh", "-c", command], check=False).returncode == 0
    surgery.verify(tmp_path / "out")


def test_an_output_without_room_for_its_words_says_so(tmp_path: Path) -> None:
    source = checkpoint(tmp_path / "model", {"layers.0.q.weight": torch.randn(64, 64)})
    command = [sys.executable, "-m", "surgery", "plan", "nf4", "--set", f"model={source}"]
    with Path("/dev/full").open("w") as full:
        run = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True, check=False)
    assert run.returncode == 1 and run.stderr.startswith("error: cannot print")


def test_a_stdout_that_knows_few_characters_shows_what_it_can(tmp_path: Path) -> None:
    source = checkpoint(tmp_path / "model", {"layers.0.q.weight": torch.randn(64, 64)})
    command = [sys.executable, "-m", "surgery", "plan", "nf4", "--set", f"model={source}"]
    environment = {**os.environ, "PYTHONIOENCODING": "latin-1"}
    run = subprocess.run(command, capture_output=True, env=environment, check=False)
    assert run.returncode == 0 and b"nf4 (4.133 bits)" in run.stdout


def test_a_link_where_the_output_was_to_grow_is_not_followed(tmp_path: Path) -> None:
    source = checkpoint(tmp_path / "model", {"layers.0.q.weight": torch.randn(64, 64)})
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "kept").write_text("kept")
    (tmp_path / ".out.surgery-partial").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(surgery.OutputError, match="is a link"):
        surgery.apply(surgery.plan(spec(source, {"op": "quantize.nf4", **ALL})), tmp_path / "out")
    assert (tmp_path / "elsewhere" / "kept").exists()


def test_what_is_almost_right_is_recognised(tmp_path: Path) -> None:
    source = checkpoint(
        tmp_path / "model", {"layers.0.q_proj.weight": torch.randn(64, 64), "lm_head.weight": torch.ones(4, 4)}
    )
    for pattern, hint in {
        "all_linear": "did you mean `all-linear`?",
        r".*_proj\.weight": r"modules are `.*_proj`",
    }.items():
        with pytest.raises(surgery.SpecError) as caught:
            surgery.plan(spec(source, {"op": "quantize.nf4", "modules": pattern}))
        assert hint in caught.value.problems[0].fix


def test_an_except_that_takes_nothing_away_is_an_error(tmp_path: Path) -> None:
    tensors = {f"layers.{layer}.{name}.weight": torch.randn(64, 64) for layer in range(2) for name in ("q", "k")}
    source = checkpoint(tmp_path / "model", tensors)
    edit = {"op": "quantize.nf4", "modules": r".*\.q", "except": r".*\.k", "expect": 2}
    with pytest.raises(surgery.SpecError, match="none of the 2 that it matches is among them"):
        surgery.plan(spec(source, edit))


def test_one_spec_is_validated_as_well_as_several(tmp_path: Path) -> None:
    path = tmp_path / "spec.yaml"
    path.write_text("version: 1\nsource: a\nedits: []\n")
    assert [item.source for item in surgery.validate(str(path))] == ["a"]
    assert [item.source for item in surgery.validate([path, path])] == ["a", "a"]
