"""Every recipe has its plan, word by word; plans and manifests hold to the schemas that are published."""

import json
import os
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import models
import pytest
import torch
from golden import assert_golden, golden_names
from jsonschema import Draft202012Validator
from safetensors.torch import save_file
from torch import Tensor

import surgery

ROOT = Path(__file__).parents[1]
SPECS = {path.stem: path for path in sorted((ROOT / "specs").glob("*.yaml"))}
every_spec = pytest.mark.parametrize("name", SPECS)


SETTINGS = {  # models beside the source, by parameter
    "combine-loras": {"first": "lora", "second": "lora2"},
    "extract-lora": {"tuned": "tuned"},
    "fold-lora": {"adapter": "lora"},
    "fold-qlora": {"adapter": "lora"},
    "slerp": {"other": "tuned"},
    "ties": {"first": "tuned", "second": "lora"},
}


CONFIG = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "torch_dtype": "bfloat16",
    "vocab_size": 96,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 12,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "tie_word_embeddings": False,
}


def weight(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape))).bfloat16()


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A decoder of twelve layers, as small as names and shapes allow."""
    path = tmp_path_factory.mktemp("models") / "llama"
    path.mkdir()
    tensors = {"model.embed_tokens.weight": weight(96, 64)}
    for layer in range(12):
        prefix = f"model.layers.{layer}"
        tensors |= {f"{prefix}.self_attn.{name}_proj.weight": weight(64, 64) for name in "qo"}
        tensors |= {f"{prefix}.self_attn.{name}_proj.weight": weight(32, 64) for name in "kv"}
        tensors |= {f"{prefix}.mlp.{name}_proj.weight": weight(128, 64) for name in ("gate", "up")}
        tensors |= {f"{prefix}.mlp.down_proj.weight": weight(64, 128)}
        tensors |= {f"{prefix}.{name}_layernorm.weight": weight(64) for name in ("input", "post_attention")}
    save_file(
        {**tensors, "model.norm.weight": weight(64), "lm_head.weight": weight(96, 64)}, path / "model.safetensors"
    )
    (path / "config.json").write_text(json.dumps(CONFIG))
    (path / "tokenizer.json").write_text("{}")
    (path / "pytorch_model.bin").write_bytes(b"left behind")
    models.tuned(path.parent / "tuned", path)
    models.lora(path.parent / "lora", path)
    models.lora(path.parent / "lora2", path, rank=2, seed=1)
    return path


def plan_of(name: str, llama: Path) -> Any:
    """The plan of a recipe, with the models that it asks for."""
    settings = {parameter: str(llama.parent / model) for parameter, model in SETTINGS.get(name, {}).items()}
    base = {} if name == "combine-loras" else {"model": str(llama)}  # which reads no base
    return surgery.plan(SPECS[name], **base, **settings)


def validator(name: str) -> Draft202012Validator:
    schema = json.loads((ROOT / "schemas" / f"{name}.v1.schema.json").read_text())
    Draft202012Validator.check_schema(schema)
    return Draft202012Validator(schema)


@every_spec
def test_every_recipe_has_a_golden_plan(name: str, llama: Path) -> None:
    assert_golden(f"plans/{name}", str(plan_of(name, llama)))


def test_no_golden_plan_is_left_over() -> None:
    assert golden_names("plans") == {*SPECS, "every-mark"}


def every_mark(llama: Path) -> dict[str, Any]:
    """A spec whose plan has every kind of line."""
    return {
        "version": 1,
        "source": str(llama),
        "edits": [
            {"op": "quantize.nf4", "modules": r".*\.[qk]_proj", "double_quant": False},
            {"op": "quantize.fp4", "modules": r".*\.v_proj", "except": r"model\.layers\.(0|5)\..*", "block_size": 128},
            {"op": "tensor.cast", "tensors": r".*norm\.weight", "dtype": "float32"},
            {"op": "tensor.rename", "tensors": r"model\.(layers\..*up_proj.*)", "to": r"decoder.\1"},
            {"op": "tensor.rename", "tensors": r"model\.(norm.*)", "to": r"decoder.\1"},
            {"op": "tensor.drop", "tensors": "lm_head.weight"},
        ],
        "output": {"shard_size": "100KiB"},
    }


def test_a_plan_says_what_is_added_changed_dropped_renamed_and_copied(llama: Path) -> None:
    text = str(surgery.plan(every_mark(llama)))
    assert {line[0] for line in text.splitlines()} >= set("~-→=")
    assert_golden("plans/every-mark", text)


def test_a_plan_counts_every_source_tensor_once(llama: Path) -> None:
    plan = surgery.plan(every_mark(llama))
    counts = plan.summary()
    gone = set(plan.checkpoint.tensors) - {source for tensor in plan.tensors for source in tensor.sources}
    assert gone == {"lm_head.weight"}
    assert counts["drop"] == 1
    assert counts["change"] + counts["rename"] + counts["copy"] + counts["drop"] == len(plan.checkpoint.tensors)


@every_spec
def test_the_plan_of_every_recipe_holds_to_its_schema(name: str, llama: Path) -> None:
    plan = plan_of(name, llama)
    validator("plan").validate(json.loads(json.dumps(plan.to_json())))


def test_a_plan_with_every_kind_of_edit_holds_to_its_schema(llama: Path) -> None:
    validator("plan").validate(json.loads(json.dumps(surgery.plan(every_mark(llama)).to_json())))


@every_spec
def test_the_manifest_of_every_recipe_holds_to_its_schema(name: str, llama: Path, tmp_path: Path) -> None:
    surgery.apply(plan_of(name, llama), tmp_path / "out")
    validator("manifest").validate(json.loads((tmp_path / "out" / "surgery-manifest.json").read_text()))


def test_a_manifest_says_where_every_tensor_comes_from_and_names_no_path(llama: Path, tmp_path: Path) -> None:
    plan = surgery.plan(every_mark(llama))
    manifest = surgery.apply(plan, tmp_path / "out")
    raw = (tmp_path / "out" / "surgery-manifest.json").read_text()
    validator("manifest").validate(json.loads(raw))
    assert str(llama.parent) not in raw
    renamed = manifest.tensors["decoder.layers.3.mlp.up_proj.weight"]
    assert renamed["sources"] == ["model.layers.3.mlp.up_proj.weight"]
    assert renamed["ops"] == ["tensor.rename"]
    assert manifest.content["dropped"] == {"lm_head.weight": "bf16[96, 64]"}
    assert manifest.tensors["decoder.norm.weight"]["ops"] == ["tensor.cast", "tensor.rename"]


def test_what_is_planned_is_what_is_written(llama: Path, tmp_path: Path) -> None:
    plan = surgery.plan(every_mark(llama))
    surgery.apply(plan, tmp_path / "out")
    for file in plan.layout.files:
        raw = (tmp_path / "out" / file.name).read_bytes()
        assert raw.startswith(file.header)
        assert len(raw) == file.num_bytes
    written = sum((tmp_path / "out" / name).stat().st_size for name in (file.name for file in plan.layout.files))
    assert written + len(plan.layout.index) == plan.cost.bytes_written


@pytest.mark.parametrize("name", SETTINGS)
def test_every_tensor_of_a_recipe_says_which_models_it_comes_from(name: str, llama: Path, tmp_path: Path) -> None:
    plan = plan_of(name, llama)
    manifest = surgery.apply(plan, tmp_path / "out")
    named = {source.partition(":")[0] for entry in manifest.tensors.values() for source in entry["sources"]}  # type: ignore[attr-defined]
    assert named >= set(plan.checkpoints) - {"source"}
    assert manifest.content["spec"]["models"].keys() == plan.checkpoints.keys() - {"source"}  # type: ignore[index]
    assert str(llama.parent) not in (tmp_path / "out" / "surgery-manifest.json").read_text()


@pytest.mark.parametrize("name", SETTINGS)
def test_the_output_of_a_recipe_can_be_made_again(name: str, llama: Path, tmp_path: Path) -> None:
    plan = plan_of(name, llama)
    surgery.apply(plan, tmp_path / "out")
    places = {model: str(checkpoint.home.path) for model, checkpoint in plan.checkpoints.items()}
    source = places.pop("source")
    surgery.verify(tmp_path / "out", reproduce=True, source=source, models=places)


@every_spec
def test_a_recipe_is_found_by_its_name(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    settings = SETTINGS.get(name, {})
    assert Path(surgery.load(name, **settings).document.file).samefile(SPECS[name])


def test_a_file_of_ones_own_wins_over_a_recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("nf4").write_text("version: 1\nsource: mine\nedits: []\n")
    assert surgery.load("nf4").source == "mine"


def test_a_recipe_is_found_in_an_installed_wheel(tmp_path: Path) -> None:
    wheel = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["hatch"]["build"]["targets"]["wheel"]
    for package in wheel["packages"]:
        shutil.copytree(ROOT / package, tmp_path / package, ignore=shutil.ignore_patterns("__pycache__"))
    for source, target in wheel["force-include"].items():
        shutil.copytree(ROOT / source, tmp_path / target)
    code = (
        "import surgery; print(surgery.__file__, *(surgery.load(name).document.file for name in ['nf4', 'qlora-base']))"
    )
    command = [sys.executable, "-P", "-c", code]
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    found = subprocess.run(command, cwd="/", env=environment, capture_output=True, text=True, check=True).stdout.split()
    assert found == [
        str(tmp_path / "surgery" / "__init__.py"),
        str(tmp_path / "surgery" / "specs" / "nf4.yaml"),
        str(tmp_path / "surgery" / "specs" / "qlora-base.yaml"),
    ]
    assert {path.name for path in (tmp_path / "surgery" / "schemas").iterdir()} == {
        f"{name}.v1.schema.json" for name in ("spec", "plan", "manifest")
    }
