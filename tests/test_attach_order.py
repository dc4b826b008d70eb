"""Attaching among other edits: what an adapter was made of must still be there when everything is written."""

import json
from pathlib import Path
from typing import Any

import models
import pytest
import torch
from safetensors.torch import load_file, save_file

import surgery
from surgery.plan import Plan

LORA = {"op": "attach.lora", "name": "new", "modules": "all-linear"}
DORA = {**LORA, "dora": True}
PISSA = {**LORA, "init": "pissa"}
PREFIX = {"op": "attach.prefix_tuning", "name": "new", "num_virtual_tokens": 3}
MERGE = {"op": "merge.linear", "models": {"source": {"weight": 0.5}, "other": {"weight": 0.5}}}
NF4 = {"op": "quantize.nf4", "modules": "all-linear"}
CAST = {"op": "tensor.cast", "tensors": ".*", "dtype": "float16"}
DROP = {"op": "layers.select", "drop": [1]}


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = models.llama(tmp_path_factory.mktemp("models") / "llama")
    models.tuned(path.parent / "other", path)
    return path


def plan(source: Path, *edits: dict[str, Any]) -> Plan:
    needs_other = any(edit["op"].startswith("merge.") for edit in edits)
    further = {"models": {"other": str(source.parent / "other")}} if needs_other else {}
    return surgery.plan({"version": 1, "source": str(source), **further, "edits": list(edits)})


@pytest.mark.parametrize(
    ("edits", "what"),
    [
        ([DORA, MERGE], "made the adapter of its values"),
        ([DORA, {**PISSA, "name": "b"}], "made the adapter of its values"),
        ([PISSA, MERGE], "made the adapter of its values"),
        ([PISSA, {**PISSA, "name": "b"}], "made the adapter of its values"),
        ([PREFIX, DROP], "not what it was"),
        ([LORA, DROP], "not what it was"),
    ],
    ids=["dora-merge", "dora-pissa", "pissa-merge", "pissa-twice", "prefix-select", "lora-select"],
)
def test_an_edit_that_makes_an_adapter_stale_is_refused(edits: list[dict[str, Any]], what: str, llama: Path) -> None:
    with pytest.raises(surgery.OpError, match=what):
        plan(llama, *edits)


@pytest.mark.parametrize(
    "edits",
    [
        [MERGE, DORA],
        [MERGE, PISSA, NF4],
        [DORA, CAST, NF4],
        [LORA, MERGE],
        [DROP, PREFIX],
        [PISSA, {**DORA, "name": "b"}],
    ],
    ids=["merge-dora", "merge-pissa-nf4", "dora-cast-nf4", "lora-merge", "select-prefix", "pissa-dora"],
)
def test_an_edit_that_leaves_an_adapter_true_is_taken(edits: list[dict[str, Any]], llama: Path) -> None:
    assert plan(llama, *edits).adapters


def test_adapters_alone_hold_their_source_to_what_was_planned(tmp_path: Path) -> None:
    source = models.llama(tmp_path / "source")
    planned = plan(source, LORA)
    tensors = load_file(source / "model.safetensors")
    save_file({name: x + 1 for name, x in tensors.items()}, source / "model.safetensors", {"format": "pt"})
    with pytest.raises(surgery.CheckpointError, match="has changed"):
        surgery.apply(planned, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    manifest = surgery.apply(plan(source, LORA), tmp_path / "out", hash_sources=True)
    (file,) = json.loads(json.dumps(dict(manifest.content)))["source"]["files"]
    assert "sha256" in file


def test_scales_of_rows_are_not_left_out(tmp_path: Path) -> None:
    source = models.llama(tmp_path / "source")
    tensors = load_file(source / "model.safetensors")
    tensors = {
        name: x.to(torch.float8_e4m3fn) if name.endswith("_proj.weight") else x.contiguous()
        for name, x in tensors.items()
    }
    save_file(tensors, source / "model.safetensors", {"format": "pt"})
    assert plan(source, LORA).adapters
    with pytest.raises(surgery.OpError, match="scales of their own"):
        plan(source, DORA)


def test_factors_beyond_measure_are_refused(tmp_path: Path, llama: Path) -> None:
    with pytest.raises(surgery.OpError, match="give a larger alpha"):
        surgery.apply(plan(llama, {**PISSA, "alpha": 1e-300}), tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["a\n", "../a", "a/b", "", ".a", "ä"])
def test_a_name_that_is_no_directory_of_its_own_is_refused(name: str, llama: Path) -> None:
    with pytest.raises(surgery.SpecError, match="name"):
        plan(llama, {**LORA, "name": name})
