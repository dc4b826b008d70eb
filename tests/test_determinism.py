"""The bytes of an output depend on the source and the spec alone, and the plan knows them beforehand."""

import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

import models
import pytest
import torch
from conftest import Convert
from safetensors import safe_open
from transformers import AutoModelForCausalLM

import surgery
from surgery.op import op_names

NF4 = {"op": "quantize.nf4", "modules": "all-linear"}
MIXED = [
    {"op": "quantize.nf4", "modules": r".*\.self_attn\.\w_proj"},
    {"op": "quantize.fp4", "modules": r".*\.mlp\.(up|gate)_proj", "block_size": 128, "double_quant": False},
    {"op": "tensor.cast", "tensors": r".*norm\.weight", "dtype": "float32"},
    {"op": "tensor.rename", "tensors": r"model\.norm\.(.*)", "to": r"model.final_norm.\1"},
    {"op": "tensor.drop", "tensors": r"model\.layers\.1\.input_layernorm\.weight"},
]


def hashes(out: Path) -> dict[str, str]:
    """sha256 of every file of an output, the manifest among them."""
    files = sorted(path for path in out.rglob("*") if path.is_file())
    return {path.relative_to(out).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def spec(source: Path, edits: list[dict[str, Any]], shard_size: str = "5GB") -> dict[str, Any]:
    return {"version": 1, "source": str(source), "edits": edits, "output": {"shard_size": shard_size}}


def large(path: Path) -> Path:
    """Weights of several tiles each, so that workers share a tensor and a small budget binds."""
    weights = {
        f"layers.{index}.weight": models.random_weight(1501, 1401, dtype=dtype, seed=index)
        for index, dtype in enumerate([torch.bfloat16, torch.float32, torch.float16])
    }
    return models.handwritten(path / "large.safetensors", {**weights, "norm.weight": torch.ones(1401)})


def many_shapes(path: Path) -> Path:
    return models.llama(path / "llama", hidden_size=80, intermediate_size=184, max_shard_size="40KB")


def transposed(path: Path) -> Path:
    return models.gpt2(path / "gpt2", n_embd=320, n_layer=2)


RESOURCES = [
    {"workers": 1},
    {"workers": 2},
    {"workers": 4},
    {"workers": 2, "memory": "64MiB"},
    {"workers": 2, "memory": "4GiB"},
]


@pytest.mark.parametrize("source", [large, many_shapes, transposed])
@pytest.mark.parametrize("double_quant", [True, False], ids=["double", "single"])
def test_workers_and_memory_change_no_byte(source: Any, double_quant: bool, convert: Convert, tmp_path: Path) -> None:
    checkpoint = source(tmp_path)
    edits = [{**NF4, "double_quant": double_quant}]
    runs = [hashes(convert(checkpoint, edits, **resources)) for resources in RESOURCES]
    assert "surgery-manifest.json" in runs[0]
    assert all(run == runs[0] for run in runs[1:])


def test_every_op_gives_the_same_bytes_for_one_worker_and_for_four(convert: Convert, tmp_path: Path) -> None:
    source = models.llama(tmp_path / "source", max_shard_size="100KB")
    once = hashes(convert(source, MIXED, shard_size="60KB", workers=1))
    again = hashes(convert(source, MIXED, shard_size="60KB", workers=4))
    assert once == again


def test_a_source_in_another_directory_gives_the_same_bytes(convert: Convert, tmp_path: Path) -> None:
    source = models.llama(tmp_path / "source")
    elsewhere = tmp_path / "some where" / "else"
    shutil.copytree(source, elsewhere)
    assert hashes(convert(source, MIXED)) == hashes(convert(elsewhere, MIXED))


def test_no_path_of_this_machine_is_in_the_output(convert: Convert, tmp_path: Path) -> None:
    out = convert(models.llama(tmp_path / "source"), MIXED)
    for path in out.iterdir():
        content = path.read_bytes()
        assert str(tmp_path).encode() not in content, path.name
        assert str(out.parent).encode() not in content, path.name


def test_sharded_and_unsharded_sources_give_the_same_tensors(convert: Convert, tmp_path: Path) -> None:
    whole = models.llama(tmp_path / "whole")
    sharded = models.llama(tmp_path / "sharded", max_shard_size="50KB")
    assert len(list(sharded.glob("*.safetensors"))) > 2
    ours, theirs = (models.read(convert(source, MIXED)) for source in (whole, sharded))
    assert sorted(ours) == sorted(theirs)
    assert all(models.same_bytes(tensor, theirs[name]) for name, tensor in ours.items())


@pytest.mark.parametrize("shard_size", ["5GB", "60KB", "20KiB", "1KB"])
def test_the_plan_is_what_is_written(shard_size: str, tmp_path: Path) -> None:
    source = models.llama(tmp_path / "source")
    plan = surgery.plan(spec(source, MIXED, shard_size))
    planned: dict[str, Any] = plan.to_json()
    out = tmp_path / "out"
    manifest = surgery.apply(plan, out)

    on_disk = {path.name: path.stat().st_size for path in out.glob("*.safetensors")}
    assert on_disk == {file["name"]: file["bytes"] for file in planned["files"]}
    index = out / "model.safetensors.index.json"
    index_bytes = index.stat().st_size if index.exists() else 0
    assert planned["cost"]["bytes_written"] == sum(on_disk.values()) + index_bytes
    assert planned["cost"]["bytes_read"] == sum(file.stat().st_size for file in source.glob("*.safetensors"))
    assert json.loads((out / "config.json").read_bytes()) == planned["config"]
    assert_headers_as_planned(out, planned)
    assert_readable_as_planned(out, planned)
    assert manifest.content["plan_sha256"] == plan.digest


def assert_headers_as_planned(out: Path, planned: dict[str, Any]) -> None:
    headers = {file["name"]: header_of(out / file["name"]) for file in planned["files"]}
    for file in planned["files"]:
        assert headers[file["name"]][1] == file["header_bytes"]
    fields = ("dtype", "shape", "data_offsets")
    stated = {
        (file, name): {key: entry[key] for key in fields}
        for file, (header, _) in headers.items()
        for name, entry in header.items()
    }
    assert stated == {(item["file"], item["name"]): {key: item[key] for key in fields} for item in planned["tensors"]}


def header_of(file: Path) -> tuple[dict[str, Any], int]:
    """A file's header as JSON, less the metadata, and the bytes before its data."""
    with file.open("rb") as reader:
        num_bytes = int.from_bytes(reader.read(8), "little")
        header = json.loads(reader.read(num_bytes))
    assert header.pop("__metadata__")["format"] == "pt"
    return header, 8 + num_bytes


def assert_readable_as_planned(out: Path, planned: dict[str, Any]) -> None:
    read: dict[str, tuple[str, list[int]]] = {}
    for file in planned["files"]:
        with safe_open(out / file["name"], "pt") as reader:
            for name in reader.keys():  # noqa: SIM118, no mapping
                found = reader.get_slice(name)
                read[name] = (found.get_dtype(), found.get_shape())
                assert list(reader.get_tensor(name).shape) == found.get_shape()
    assert read == {item["name"]: (item["dtype"], item["shape"]) for item in planned["tensors"]}


@pytest.mark.parametrize("shard_size", ["60KB", "20KiB"])
def test_no_shard_is_larger_than_asked_unless_one_weight_is(shard_size: str, convert: Convert, tmp_path: Path) -> None:
    out = convert(models.llama(tmp_path / "source"), [NF4], shard_size=shard_size)
    limit = {"60KB": 60_000, "20KiB": 20 * 1024}[shard_size]
    files = sorted(out.glob("*.safetensors"))
    assert [file.name for file in files] == [
        f"model-{number:05d}-of-{len(files):05d}.safetensors" for number in range(1, len(files) + 1)
    ]
    for file in files:
        header, header_bytes = header_of(file)
        weights = {name.partition(".weight")[0] for name in header}
        assert file.stat().st_size - header_bytes <= limit or len(weights) == 1, file.name


@pytest.mark.parametrize("edits", [[], [NF4]], ids=["copied", "nf4"])
def test_a_sharded_output_loads_in_transformers_by_its_index(
    edits: list[dict[str, Any]], convert: Convert, tmp_path: Path
) -> None:
    source = models.llama(tmp_path / "source")
    sharded, whole = (convert(source, edits, shard_size=size) for size in ("60KB", "5GB"))
    index = json.loads((sharded / "model.safetensors.index.json").read_bytes())
    stored = models.read(sharded)
    assert index["weight_map"].keys() == stored.keys()
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in stored.values())
    assert index["metadata"]["total_parameters"] == sum(tensor.numel() for tensor in models.read(source).values())
    ids = torch.tensor([[1, 5, 9, 2]])
    logits = []
    for out in (sharded, whole):
        model, info = AutoModelForCausalLM.from_pretrained(out, dtype="auto", output_loading_info=True)
        assert not any(info.values()), info
        with torch.no_grad():
            logits.append(model(ids).logits)
    assert torch.equal(*logits)


def test_no_edit_copies_every_tensor_byte_for_byte(convert: Convert, tmp_path: Path) -> None:
    source = models.qwen2(tmp_path / "source", max_shard_size="50KB")
    before, after = models.read(source), models.read(convert(source, []))
    assert sorted(before) == sorted(after)
    assert all(models.same_bytes(tensor, after[name]) for name, tensor in before.items())


def test_every_source_tensor_is_accounted_for(convert: Convert, tmp_path: Path) -> None:
    """What is neither a source of some output nor listed as dropped would have vanished."""
    source = models.llama(tmp_path / "source")
    manifest = json.loads((convert(source, MIXED) / "surgery-manifest.json").read_bytes())
    used = {name for entry in manifest["tensors"].values() for name in entry["sources"]}
    assert used | manifest["dropped"].keys() == models.read(source).keys()
    assert "model.layers.1.input_layernorm.weight" in manifest["dropped"]
    assert manifest["tensors"]["model.final_norm.weight"]["sources"] == ["model.norm.weight"]


def test_the_manifest_hashes_are_those_of_the_files_and_tensors(convert: Convert, tmp_path: Path) -> None:
    source = models.llama(tmp_path / "source")
    out = convert(source, MIXED, shard_size="60KB", hash_sources=True)
    manifest = json.loads((out / "surgery-manifest.json").read_bytes())
    found = hashes(out)
    found.pop("surgery-manifest.json")
    assert {file["name"]: file["sha256"] for file in manifest["files"]} == found
    assert manifest["source"]["files"] == [file_of(source / "model.safetensors", hashed=True)]
    for entry in manifest["tensors"].values():
        start = header_of(out / entry["file"])[1]
        first, last = (start + offset for offset in entry["data_offsets"])
        data = (out / entry["file"]).read_bytes()[first:last]
        assert hashlib.sha256(data).hexdigest() == entry["sha256"]


def file_of(path: Path, *, hashed: bool) -> dict[str, object]:
    """A source file as a manifest has it."""
    data = path.read_bytes()
    header = hashlib.sha256(data[: header_of(path)[1]]).hexdigest()
    sha256 = {"sha256": hashlib.sha256(data).hexdigest()} if hashed else {}
    return {"name": path.name, "bytes": len(data), "header_sha256": header, **sha256}


def test_of_a_source_the_headers_alone_are_hashed_unless_one_asks(convert: Convert, tmp_path: Path) -> None:
    source = models.llama(tmp_path / "source")
    out, hashed = convert(source, MIXED), convert(source, MIXED, hash_sources=True)
    manifests = [json.loads((path / "surgery-manifest.json").read_bytes()) for path in (out, hashed)]
    files = [manifest["source"].pop("files") for manifest in manifests]
    assert files == [[file_of(source / "model.safetensors", hashed=is_hashed)] for is_hashed in (False, True)]
    assert [manifest.pop("manifest_sha256") for manifest in manifests] and manifests[0] == manifests[1]


@pytest.mark.parametrize("hash_sources", [False, True])
def test_an_output_verifies_and_can_be_made_again(hash_sources: bool, convert: Convert, tmp_path: Path) -> None:
    source = models.llama(tmp_path / "source")
    out = convert(source, MIXED, shard_size="60KB", hash_sources=hash_sources)
    surgery.verify(out)
    surgery.verify(out, reproduce=True, source=str(source))


@pytest.mark.parametrize("shard_size", ["5GB", "60KB"])
def test_what_was_written_in_parts_is_the_same_when_it_is_read_as_a_source(
    shard_size: str, convert: Convert, tmp_path: Path
) -> None:
    source = models.llama(tmp_path / "source")
    attention, mlp = r".*\.self_attn\.\w_proj", r".*\.mlp\.\w+_proj"
    halves = [{**NF4, "modules": attention}, {**NF4, "modules": mlp}]
    at_once = convert(source, halves, shard_size=shard_size)
    in_turn = convert(convert(source, halves[:1]), halves[1:], shard_size=shard_size)
    before, after = models.read(at_once), models.read(in_turn)
    assert sorted(before) == sorted(after)
    assert all(models.same_bytes(tensor, after[name]) for name, tensor in before.items())
    assert (at_once / "config.json").read_bytes() == (in_turn / "config.json").read_bytes()


# Devices

FINE = {"source": {"weight": 0.2}, "a": {"weight": 0.7}, "b": {"weight": [0.1, 0.9]}}
TUNED = {"a": {"weight": 0.7}, "b": {"weight": [0.1, 0.9]}}
SPARSE = {name: {**numbers, "density": 0.4} for name, numbers in TUNED.items()}
EDITS_OF_EVERY_OP: dict[str, list[dict[str, Any]]] = {
    "adapter.combine": [{"op": "adapter.combine", "models": {"source": {}, "lora": {"weight": -0.5}}, "rank": 3}],
    "adapter.convert": [{"op": "adapter.convert", "to": "adapterhub", "base": "a"}],
    "adapter.extract": [{"op": "adapter.extract", "models": "a", "modules": "all-linear", "rank": 4}],
    "adapter.fold": [{"op": "adapter.fold", "models": "lora"}, NF4],
    "attach.bitfit": [{"op": "attach.bitfit", "name": "new", "tensors": r".*norm\.weight"}],
    "attach.ia3": [{"op": "attach.ia3", "name": "new", "modules": "all-linear", "feedforward": r".*down_proj"}],
    "attach.lora": [
        {"op": "attach.lora", "name": "pissa", "modules": "all-linear", "init": "pissa"},
        {"op": "attach.lora", "name": "new", "modules": "all-linear", "dora": True},
        {"op": "attach.lora", "name": "last", "modules": "all-linear", "init": "gaussian"},
    ],
    "attach.p_tuning": [{"op": "attach.p_tuning", "name": "new", "num_virtual_tokens": 5}],
    "attach.parallel_adapter": [{"op": "attach.parallel_adapter", "name": "new"}],
    "attach.prefix_tuning": [{"op": "attach.prefix_tuning", "name": "new", "num_virtual_tokens": 5}],
    "attach.prompt_tuning": [
        {"op": "attach.prompt_tuning", "name": "new", "num_virtual_tokens": 5, "init_tokens": [3, 1, 4]}
    ],
    "attach.series_adapter": [{"op": "attach.series_adapter", "name": "new"}],
    "layers.select": [
        {"op": "layers.select", "slices": [{"layers": [1, 2]}, {"model": "a", "layers": [0, 2], "scale": {".*": 0.5}}]}
    ],
    "merge.arcee_fusion": [{"op": "merge.arcee_fusion", "models": "a"}],
    "merge.breadcrumbs": [{"op": "merge.breadcrumbs", "models": SPARSE}],
    "merge.breadcrumbs_ties": [{"op": "merge.breadcrumbs_ties", "models": SPARSE}],
    "merge.dare_linear": [{"op": "merge.dare_linear", "models": SPARSE}],
    "merge.dare_ties": [{"op": "merge.dare_ties", "models": SPARSE}],
    "merge.della": [{"op": "merge.della", "models": SPARSE}],
    "merge.della_linear": [{"op": "merge.della_linear", "models": SPARSE}],
    "merge.karcher": [{"op": "merge.karcher", "models": ["source", "a", "b"]}],
    "merge.linear": [{"op": "merge.linear", "models": FINE}, NF4],
    "merge.model_stock": [{"op": "merge.model_stock", "models": ["a", "b"]}],
    "merge.multislerp": [{"op": "merge.multislerp", "models": FINE}],
    "merge.nearswap": [{"op": "merge.nearswap", "models": "a", "t": 0.01}],
    "merge.nuslerp": [{"op": "merge.nuslerp", "models": TUNED}],
    "merge.ram": [{"op": "merge.ram", "models": ["a", "b"]}],
    "merge.ramplus": [{"op": "merge.ramplus", "models": ["a", "b"]}],
    "merge.sce": [{"op": "merge.sce", "models": ["a", "b"], "select_topk": 0.3}],
    "merge.slerp": [{"op": "merge.slerp", "models": "a", "t": [0.1, 0.9]}],
    "merge.task_arithmetic": [{"op": "merge.task_arithmetic", "models": TUNED}],
    "merge.ties": [{"op": "merge.ties", "models": SPARSE}, NF4],
    "quantize.dequantize": [NF4, {"op": "quantize.dequantize", "modules": r"model\.layers\.0\..*_proj"}],
    "quantize.fp4": [{"op": "quantize.fp4", "modules": "all-linear"}],
    "quantize.nf4": [NF4],
    "tensor.cast": [{"op": "tensor.cast", "tensors": ".*", "dtype": "float16"}],
    "tensor.drop": [{"op": "tensor.drop", "tensors": r"model\.norm\.weight"}],
    "tensor.rename": [{"op": "tensor.rename", "tensors": r"model\.(.*)", "to": r"transformer.\1"}],
}


def test_every_op_has_edits_to_be_compared_between_devices() -> None:
    assert set(EDITS_OF_EVERY_OP) == set(op_names())


def with_models(root: Path, dtype: torch.dtype) -> dict[str, Path]:
    """A source, two models tuned from it, and two adapters for it."""
    source = models.llama(root / "source", dtype=dtype)
    adapters = {name: models.lora(root / name, source, seed=seed) for seed, name in enumerate(["lora", "start"])}
    tuned = {name: models.tuned(root / name, source, seed=seed) for seed, name in enumerate("ab", 1)}
    return {"source": source, **tuned, **adapters}


def spec_of(name: str, found: dict[str, Path]) -> dict[str, Any]:
    """The spec of EDITS_OF_EVERY_OP, with the models that its ops use."""
    edits = EDITS_OF_EVERY_OP[name]
    used = {model for edit in edits for model in found if model != "source" and f"'{model}'" in repr(edit)}
    source = found["start" if name in ("adapter.combine", "adapter.convert") else "source"]
    return {**spec(source, edits), "models": {model: str(found[model]) for model in sorted(used)}}


@pytest.mark.parametrize("name", EDITS_OF_EVERY_OP)
def test_every_op_gives_the_same_bytes_for_one_worker_and_for_many(name: str, tmp_path: Path) -> None:
    plan = surgery.plan(spec_of(name, with_models(tmp_path, torch.bfloat16)))
    surgery.apply(plan, tmp_path / "one", workers=1, device="cpu")
    surgery.apply(plan, tmp_path / "many", workers=4, memory=plan.cost.min_memory, device="cpu")
    assert hashes(tmp_path / "one") == hashes(tmp_path / "many")


def test_what_is_drawn_at_random_depends_on_the_seed_and_the_name_alone(tmp_path: Path) -> None:
    """A tensor that is merged alone is what it is when all are; another seed gives another."""
    found = with_models(tmp_path, torch.float32)
    whole = spec_of("merge.dare_linear", found)
    name = "model.layers.1.mlp.up_proj.weight"
    alone = {**whole, "edits": [{**whole["edits"][0], "tensors": name.replace(".", r"\.")}]}
    tensors: list[torch.Tensor] = []
    for index, changed in enumerate([whole, alone, {**whole, "seed": 1}]):
        surgery.apply(surgery.plan(changed), tmp_path / f"out-{index}")
        tensors.append(models.read(tmp_path / f"out-{index}")[name])
    assert models.same_bytes(tensors[0], tensors[1])
    assert not models.same_bytes(tensors[0], tensors[2])


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", EDITS_OF_EVERY_OP)
def test_a_gpu_gives_the_bytes_of_the_cpu_for_every_op(
    name: str, dtype: torch.dtype, convert: Convert, tmp_path: Path
) -> None:
    asked = spec_of(name, with_models(tmp_path, dtype))
    if name == "quantize.dequantize":  # from stored parts too, not only from what was just computed
        quantized = convert(tmp_path / "source", asked["edits"][:1], device="cpu")
        asked = spec(quantized, asked["edits"][1:])
    plan = surgery.plan(asked)
    for device in ("cuda", "cpu"):
        surgery.apply(plan, tmp_path / device, device=device)
    assert hashes(tmp_path / "cuda") == hashes(tmp_path / "cpu")


@pytest.mark.gpu
@pytest.mark.parametrize("source", [large, transposed])
@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
@pytest.mark.parametrize("double_quant", [True, False], ids=["double", "single"])
def test_a_gpu_gives_the_bytes_of_the_cpu_for_weights_of_many_tiles(
    source: Any, quant_type: str, double_quant: bool, convert: Convert, tmp_path: Path
) -> None:
    checkpoint = source(tmp_path)
    edits = [{"op": f"quantize.{quant_type}", "modules": "all-linear", "double_quant": double_quant}]
    on_gpu, on_cpu = (convert(checkpoint, edits, device=device) for device in ("cuda", "cpu"))
    assert hashes(on_gpu) == hashes(on_cpu)
    back = [{"op": "quantize.dequantize", "modules": "all-linear"}]
    assert hashes(convert(on_gpu, back, device="cuda")) == hashes(convert(on_gpu, back, device="cpu"))
