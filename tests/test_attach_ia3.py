"""An (IA)³ that `attach.ia3` makes is the one that PEFT makes, and multiplies what it says it does."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import attach_bench as bench
import models
import pytest
import torch
from peft import IA3Config
from transformers import BertConfig, BertForSequenceClassification

F32 = torch.float32
IA3 = {"op": "attach.ia3"}
NF4 = {"op": "quantize.nf4", "modules": "all-linear"}
SOURCES: dict[str, Callable[[Path], Path]] = {
    "llama": lambda path: models.llama(path, dtype=F32, **bench.SMALL),
    "qwen2": lambda path: models.qwen2(path, dtype=F32, **bench.SMALL),
    "gpt2": lambda path: models.gpt2(path, dtype=F32, n_embd=32),
    "bert": lambda path: models.bert(path, dtype=F32, hidden_size=32),
    "headless": lambda path: models.bert(path, dtype=F32, hidden_size=32, head=False),
    "t5": lambda path: models.t5(path, dtype=F32),
    "vit": bench.vit,
}


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    home = tmp_path_factory.mktemp("sources")
    return {name: make(home / name) for name, make in SOURCES.items()}


# Source, what is attached, and the same in PEFT's words
CASES: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "as in the paper": (
        "t5",
        {"modules": r".*(Attention\.[kv]|DenseReluDense\.wo)", "feedforward": r".*wo"},
        {"target_modules": ["k", "v", "wo"], "feedforward_modules": ["wo"]},
    ),
    "a decoder": (
        "llama",
        {"modules": r".*\.(k_proj|v_proj|down_proj)", "feedforward": r".*down_proj"},
        {"target_modules": ["k_proj", "v_proj", "down_proj"], "feedforward_modules": ["down_proj"]},
    ),
    "biases": (
        "qwen2",
        {"modules": "all-linear", "feedforward": r".*mlp\..*"},
        {"target_modules": "all-linear", "feedforward_modules": ["gate_proj", "up_proj", "down_proj"]},
    ),
    "no feedforward": ("llama", {"modules": ".*q_proj"}, {"target_modules": ["q_proj"], "feedforward_modules": []}),
    "Conv1D, one name for two modules": (
        "gpt2",
        {"modules": "all-linear", "feedforward": r".*mlp\.c_proj"},
        {"target_modules": "all-linear", "feedforward_modules": ["mlp.c_proj"], "fan_in_fan_out": True},
    ),
    "a name that another ends with": (
        "t5",
        {"modules": r".*\.(wo|o)", "feedforward": r".*\.o"},
        {"target_modules": ["o", "wo"], "feedforward_modules": r".*\.o"},
    ),
    "some layers": (
        "qwen2",
        {"modules": r".*\.1\.\w+\.(k|down)_proj", "feedforward": r".*down_proj"},
        {
            "target_modules": ["layers.1.self_attn.k_proj", "layers.1.mlp.down_proj"],
            "feedforward_modules": ["layers.1.mlp.down_proj"],
        },
    ),
    "the head": ("llama", {"modules": "lm_head"}, {"target_modules": ["lm_head"], "feedforward_modules": []}),
    "an encoder": (
        "bert",
        {"modules": r".*(key|value|\d\.output\.dense)", "feedforward": r".*\d\.output\.dense"},
        {"target_modules": r".*(key|value|\d\.output\.dense)", "feedforward_modules": r".*\d\.output\.dense"},
    ),
    "an encoder without its head": (
        "headless",
        {"modules": r".*(key|value)"},
        {"target_modules": ["key", "value"], "feedforward_modules": []},
    ),
    "images": (
        "vit",
        {"modules": r".*(key|\d\.output\.dense)", "feedforward": r".*dense", "modules_to_save": ["classifier"]},
        {"target_modules": ["k_proj", "fc2"], "feedforward_modules": ["fc2"], "modules_to_save": ["classifier"]},
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_an_adapter_is_the_one_that_peft_makes(case: str, sources: dict[str, Path], tmp_path: Path) -> None:
    source, edit, options = CASES[case]
    out = bench.attach(sources[source], tmp_path / "out", {**IA3, **edit})
    assert sorted(path.name for path in out.iterdir()) == ["adapters", "surgery-manifest.json"]
    theirs = bench.drawn_by_peft(sources[source], IA3Config(**options))
    bench.assert_same(models.read(bench.adapter_of(out)), theirs)
    expected = bench.outputs(bench.base_model(sources[source]))
    model = bench.load(bench.base_model(sources[source]), bench.adapter_of(out))
    torch.testing.assert_close(bench.outputs(model), expected)
    losses, changed = bench.train(model)
    assert losses[-1] < losses[0]
    assert changed and all("ia3_l" in name or "modules_to_save" in name for name in changed)


@pytest.mark.parametrize("case", CASES)
def test_a_trained_adapter_folds_into_what_peft_computes(case: str, sources: dict[str, Path], tmp_path: Path) -> None:
    source, edit, _ = CASES[case]
    out = bench.attach(sources[source], tmp_path / "out", {**IA3, **edit})
    bench.noisy(bench.adapter_of(out))
    model = bench.load(bench.base_model(sources[source]), bench.adapter_of(out))
    fold = {"op": "adapter.fold", "models": "ia3"}
    folded = bench.attach(sources[source], tmp_path / "folded", fold, models={"ia3": str(bench.adapter_of(out))})
    torch.testing.assert_close(bench.outputs(model), bench.outputs(bench.base_model(folded)), rtol=1e-3, atol=1e-3)


def test_an_adapter_of_a_quantized_base_comes_of_the_same_spec(tmp_path: Path) -> None:
    source = models.llama(tmp_path / "source", dtype=F32, hidden_size=64, intermediate_size=64)
    edit = {**IA3, "modules": r".*\.(k_proj|down_proj)", "feedforward": r".*down_proj"}
    out = bench.attach(source, tmp_path / "out", {**NF4, "compute_dtype": "float32"}, edit)
    expected = bench.outputs(bench.base_model(out, device_map="cpu"))
    model = bench.load(bench.base_model(out, device_map="cpu"), bench.adapter_of(out))
    torch.testing.assert_close(bench.outputs(model), expected)


def test_the_head_of_a_task_goes_along(tmp_path: Path) -> None:
    sizes = {"vocab_size": 160, **bench.SMALL, "num_hidden_layers": 1, "num_attention_heads": 2}
    source = bench.saved(tmp_path / "source", BertForSequenceClassification(BertConfig(**sizes)))
    out = bench.attach(source, tmp_path / "out", {**IA3, "modules": ".*key"})
    model = bench.load(bench.base_model(source), bench.adapter_of(out))
    torch.testing.assert_close(bench.outputs(model), bench.outputs(bench.base_model(source)))


REFUSED: dict[str, tuple[str, dict[str, Any]]] = {
    "matches none of the 2 modules selected": ("llama", {"modules": ".*q_proj", "feedforward": ".*down_proj"}),
    "`feedforward`: `(` is no regex": ("llama", {"modules": ".*q_proj", "feedforward": "("}),
    "is a norm (f32[32]), which (IA)³ does not scale": ("llama", {"modules": r"model\.norm"}),
    "is an embedding": ("llama", {"modules": ".*embed_tokens"}),
    "is a convolution": ("vit", {"modules": ".*projection"}),
    "is both adapted and saved whole": ("llama", {"modules": ".*q_proj", "modules_to_save": [".*q_proj"]}),
    "matches none of": ("llama", {"modules": ".*q_proj", "modules_to_save": ["score"]}),
    "the module that shares its tensor would not": ("gpt2", {"modules": ".*c_fc", "modules_to_save": [".*wte"]}),
}


@pytest.mark.parametrize("said", REFUSED)
def test_what_cannot_be_scaled_is_refused(said: str, sources: dict[str, Path]) -> None:
    source, edit = REFUSED[said]
    assert said in bench.refusal(sources[source], {**IA3, **edit})


def test_experts_are_refused(tmp_path: Path) -> None:
    source = bench.mixture(tmp_path / "source", "mixtral")
    assert "is a MoE expert" in bench.refusal(source, {**IA3, "modules": r".*experts\.\d+\.w1"})
