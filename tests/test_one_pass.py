"""Fold, merge and quantize in one spec: the bytes of doing it step by step, every source byte read once, in bounds."""

import json
from collections import defaultdict
from pathlib import Path
from typing import Any

import models
import pytest
import torch
from safetensors.torch import save_file
from test_memory import APPLY, FOOTPRINT, MIB, peak_bytes
from torch import Tensor

import surgery
from surgery.stream.read import SourceReader

ADAPTERS = ("math", "code", "chat")
NF4 = {"op": "quantize.nf4", "modules": "all-linear"}
TIES = {"op": "merge.ties", "models": {name: {"weight": 0.4, "density": 0.3} for name in ADAPTERS}}
DARE = {"op": "merge.dare_linear", "models": {name: {"weight": 0.4, "density": 0.3} for name in ADAPTERS}}
LINEAR = {"op": "merge.linear", "models": {name: {"weight": 0.4} for name in ("source", *ADAPTERS)}}
SLERP = {"op": "merge.slerp", "models": "math", "t": 0.3}
EDITS = {"ties": TIES, "dare_linear": DARE, "linear": LINEAR, "slerp": SLERP}
every_edit = pytest.mark.parametrize("edit", EDITS.values(), ids=EDITS)


def checkpoint(path: Path, tensors: dict[str, Tensor]) -> Path:
    path.mkdir()
    save_file(tensors, path / "model.safetensors")
    (path / "config.json").write_text(json.dumps({"model_type": "llama", "torch_dtype": "bfloat16"}))
    return path


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base with tensors of one tile and of several, three adapters for it, these folded, and three tuned models."""
    home = tmp_path_factory.mktemp("one_pass")
    layer = "model.layers.0"
    shapes = {
        "model.embed_tokens.weight": (1300, 512),
        f"{layer}.self_attn.q_proj.weight": (96, 512),
        f"{layer}.mlp.up_proj.weight": (1100, 512),
        f"{layer}.mlp.down_proj.weight": (512, 1100),
        f"{layer}.input_layernorm.weight": (512,),
    }
    tensors = {
        name: models.random_weight(*shape, dtype=torch.bfloat16, seed=seed)
        for seed, (name, shape) in enumerate(shapes.items())
    }
    base = checkpoint(home / "base", tensors)
    for seed, name in enumerate(ADAPTERS):
        models.lora(home / name, base, targets=["q_proj", "up_proj", "down_proj"][seed:], rank=8, seed=seed)
        models.tuned(home / f"{name}-tuned", base, seed=seed)
        apply(spec(home, {"op": "adapter.fold", "models": name}), home / f"{name}-folded")
    return home


def spec(home: Path, *edits: dict[str, Any], base: str = "base", suffix: str = "") -> dict[str, Any]:
    """The edits on the base, with the adapters that they name; `suffix`: models in their place."""
    used = [name for name in ADAPTERS if any(name in repr(edit["models"]) for edit in edits if "models" in edit)]
    found = {name: str(home / f"{name}{suffix}") for name in used}
    return {"version": 1, "source": str(home / base), "models": found, "edits": list(edits)}


def apply(asked: dict[str, Any], out: Path, **resources: Any) -> dict[str, Tensor]:
    surgery.apply(surgery.plan(asked), out, **resources)
    return models.read(out)


def assert_same_tensors(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> None:
    assert ours.keys() == theirs.keys()
    unlike = [name for name, tensor in ours.items() if not models.same_bytes(tensor, theirs[name])]
    assert not unlike


@every_edit
def test_one_spec_gives_the_bytes_of_fold_then_merge_then_quantize(
    edit: dict[str, Any], home: Path, tmp_path: Path
) -> None:
    merged = spec(home, edit, suffix="-folded")
    apply(merged, tmp_path / "merged")
    quantized = {"version": 1, "source": str(tmp_path / "merged"), "edits": [NF4]}
    in_steps = apply(quantized, tmp_path / "quantized")
    assert_same_tensors(apply(spec(home, edit, NF4), tmp_path / "at_once"), in_steps)


@every_edit
@pytest.mark.parametrize("suffix", ["", "-tuned"], ids=["adapters", "models"])
def test_every_byte_of_every_model_is_read_once(
    edit: dict[str, Any], suffix: str, home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    times = defaultdict[str, Tensor](lambda: torch.empty(0))
    read_into = SourceReader.read_into

    def counted(self: SourceReader, buffer: Tensor, model: str, name: str, start: int) -> None:
        read_into(self, buffer, model, name, start)
        times[f"{model}:{name}"][start : start + buffer.numel()] += 1

    plan = surgery.plan(spec(home, edit, NF4, suffix=suffix))
    for model, found in plan.checkpoints.items():
        for name, entry in found.tensors.items():
            times[f"{model}:{name}"] = torch.zeros(entry.type.num_bytes, dtype=torch.uint8)
    monkeypatch.setattr(SourceReader, "read_into", counted)
    surgery.apply(plan, tmp_path / "out", memory="4GiB")
    wrong = {name: sorted(set(count.tolist())) for name, count in times.items() if not bool((count == 1).all())}
    assert not wrong


@every_edit
@pytest.mark.parametrize("suffix", ["", "-tuned"], ids=["adapters", "models"])
@pytest.mark.parametrize("quantize", [[], [NF4]], ids=["floats", "nf4"])
def test_the_least_memory_gives_the_bytes_of_plenty(
    edit: dict[str, Any], suffix: str, quantize: list[dict[str, Any]], home: Path, tmp_path: Path
) -> None:
    plan = surgery.plan(spec(home, edit, *quantize, suffix=suffix))
    least = surgery.apply(plan, tmp_path / "least", memory=plan.cost.min_memory, workers=2)
    plenty = surgery.apply(plan, tmp_path / "plenty", memory="4GiB", workers=1)
    assert least.encode() == plenty.encode()


def test_an_adapter_stands_for_the_source_as_it_is_on_disk(home: Path, tmp_path: Path) -> None:
    """An edit before the merge changes the source among the models, not the base of an adapter."""
    cast = {"op": "tensor.cast", "tensors": ".*", "dtype": "float32"}
    mixed = {**LINEAR, "mixed_dtypes": True}
    after = apply(spec(home, cast, mixed), tmp_path / "after")
    merged = [models.read(home / name) for name in ("base", *(f"{adapter}-folded" for adapter in ADAPTERS))]
    for name, tensor in after.items():
        mean = torch.stack([x[name].float() for x in merged]).mean(0)
        assert tensor.dtype == torch.float32
        assert torch.allclose(tensor, mean, rtol=1e-5, atol=1e-6), name


# Memory

LARGE = "model.embed_tokens.weight"
OF_LARGE = {
    "linear": {"op": "merge.linear", "models": {name: {"weight": 0.5} for name in ("source", "other")}},
    "slerp": {"op": "merge.slerp", "models": ["other"], "t": 0.3},
    "ties": {"op": "merge.ties", "models": {"other": {"weight": 0.7, "density": 0.4}}},
    "dare_ties": {"op": "merge.dare_ties", "models": {"other": {"weight": 0.7, "density": 0.4}}},
}


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two models of one 128 MiB tensor."""
    home = tmp_path_factory.mktemp("large")
    for seed, name in enumerate(["source", "other"]):
        rows = models.random_weight(1 << 12, 1 << 9, dtype=torch.bfloat16, seed=seed)
        checkpoint(home / name, {LARGE: rows.repeat(32, 1)})
    return home


@pytest.mark.parametrize("name", OF_LARGE)
def test_merging_takes_no_more_memory_than_the_plan_says(name: str, large: Path) -> None:
    asked = {
        "version": 1,
        "source": str(large / "source"),
        "models": {"other": str(large / "other")},
        "edits": [OF_LARGE[name]],
    }
    path = large / f"{name}.yaml"
    path.write_text(json.dumps(asked))
    memory = surgery.plan(asked).cost.min_memory + MIB
    out = large / f"out-{name}"
    footprint = peak_bytes(FOOTPRINT)
    peak = peak_bytes(APPLY, "apply", str(path), "-o", str(out), "--memory", str(memory), "--workers", "2")
    assert peak < footprint + memory
    plenty = surgery.apply(surgery.plan(asked), large / f"plenty-{name}", memory="4GiB")
    assert (out / "surgery-manifest.json").read_bytes() == plenty.encode()
