"""What `attach.bitfit` selects is what PEFT loads and trains, and nothing else."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import attach_bench as bench
import models
import pytest
import torch
from transformers import BertConfig, BertForSequenceClassification

import surgery

F32 = torch.float32
BITFIT = {"op": "attach.bitfit"}
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


def attached(source: Path, out: Path, **edit: Any) -> tuple[Any, dict[str, Any]]:
    """The model with the adapter, which is a no-op, and the adapter's config."""
    bench.attach(source, out, {**BITFIT, **edit})
    assert sorted(path.name for path in out.iterdir()) == ["adapters", "surgery-manifest.json"]
    model = bench.load(bench.base_model(source), bench.adapter_of(out))
    torch.testing.assert_close(bench.outputs(model), bench.outputs(bench.base_model(source)), rtol=0, atol=0)
    return model, bench.config_of(out)


def trainable(model: Any) -> set[str]:
    return {name for name, parameter in model.named_parameters() if parameter.requires_grad}


@pytest.mark.parametrize("source", ["qwen2", "gpt2", "bert", "headless", "vit"])
def test_every_bias_is_trained_and_nothing_else(source: str, sources: dict[str, Path], tmp_path: Path) -> None:
    base = bench.base_model(sources[source])
    biases = {name for name, _ in base.named_parameters() if name.rpartition(".")[2] == "bias"}
    model, config = attached(sources[source], tmp_path / "out")
    assert (config["peft_type"], config["bias"], config["target_modules"]) == ("LORA", "all", "dummy-target-modules")
    assert trainable(model) == {f"base_model.model.{name}" for name in biases}
    losses, changed = bench.train(model)
    assert losses[-1] < losses[0] and changed <= trainable(model)
    adapter = models.read(bench.adapter_of(tmp_path / "out"))
    assert biases <= {name.removeprefix("base_model.model.") for name in adapter} | {"cls.predictions.decoder.bias"}
    on_disk = models.read(sources[source])
    copies = [name for name in on_disk if name.endswith("bias")]
    assert sorted(x.sum().item() for x in adapter.values()) == sorted(on_disk[name].sum().item() for name in copies)


def test_trained_biases_are_loaded_in_the_place_of_the_base_s(sources: dict[str, Path], tmp_path: Path) -> None:
    source = sources["bert"]
    bench.attach(source, tmp_path / "out", BITFIT)
    bench.noisy(bench.adapter_of(tmp_path / "out"))
    model = bench.load(bench.base_model(source), bench.adapter_of(tmp_path / "out"))
    adapter = models.read(bench.adapter_of(tmp_path / "out"))
    parameters = dict(model.named_parameters())
    assert all(torch.equal(parameters[name], x) for name, x in adapter.items() if name in parameters)
    folded = folded_back(source, bench.adapter_of(tmp_path / "out"), tmp_path / "folded")
    torch.testing.assert_close(bench.outputs(model), bench.outputs(bench.base_model(folded)))


SOME: dict[str, tuple[str, str]] = {
    "queries": ("bert", r".*(query|intermediate\.dense)\.bias"),
    "one layer": ("qwen2", r".*layers\.1\..*\.bias"),
    "images": ("vit", r".*(query|\d\.output\.dense)\.bias"),
}


@pytest.mark.parametrize("case", SOME)
def test_some_biases_are_trained_by_what_is_added_to_them(case: str, sources: dict[str, Path], tmp_path: Path) -> None:
    source, regex = SOME[case]
    model, config = attached(sources[source], tmp_path / "out", tensors=regex)
    assert config["peft_type"] == "BEFT"
    selected = [name for name in models.read(sources[source]) if re.fullmatch(regex, name)]
    assert len(trainable(model)) == len(selected)
    assert all(name.endswith("beft_bias.default") for name in trainable(model))
    losses, changed = bench.train(model)
    assert losses[-1] < losses[0] and changed <= trainable(model)
    bench.noisy(bench.adapter_of(tmp_path / "out"))
    model = bench.load(bench.base_model(sources[source]), bench.adapter_of(tmp_path / "out"))
    expected = bench.outputs(model)
    merged = model.merge_and_unload()
    torch.testing.assert_close(bench.outputs(merged), expected, rtol=1e-4, atol=1e-4)
    folded = folded_back(sources[source], bench.adapter_of(tmp_path / "out"), tmp_path / "folded")
    torch.testing.assert_close(bench.outputs(bench.base_model(folded)), bench.outputs(merged), rtol=0, atol=0)


def folded_back(source: Path, adapter: Path, out: Path) -> Path:
    return bench.attach(source, out, {"op": "adapter.fold", "models": "biases"}, models={"biases": str(adapter)})


WHOLE: dict[str, tuple[str, str]] = {
    "norms": ("llama", r".*norm\.weight"),
    "norms with biases": ("gpt2", r".*ln_\w\..*"),
    "a classifier": ("vit", r"classifier\..*"),
    "Linears": ("bert", r".*query\..*"),
    "an embedding": ("llama", r".*embed_tokens\.weight"),
    "positions": ("t5", r".*relative_attention_bias\.weight"),
}


@pytest.mark.parametrize("case", WHOLE)
def test_whole_modules_are_copied_and_trained(case: str, sources: dict[str, Path], tmp_path: Path) -> None:
    source, regex = WHOLE[case]
    model, config = attached(sources[source], tmp_path / "out", tensors=regex)
    assert config["bias"] == "none" and config["target_modules"] == "dummy-target-modules"
    selected = [name for name in models.read(sources[source]) if re.fullmatch(regex, name)]
    assert len(trainable(model)) == len(selected)
    assert all(".modules_to_save.default." in name for name in trainable(model))
    losses, changed = bench.train(model)
    assert losses[-1] < losses[0] and changed <= trainable(model)


def test_the_head_of_a_task_is_trained_with_the_biases(tmp_path: Path) -> None:
    sizes = {"vocab_size": 160, **bench.SMALL, "num_hidden_layers": 1, "num_attention_heads": 2}
    source = bench.saved(tmp_path / "source", BertForSequenceClassification(BertConfig(**sizes)))
    model, config = attached(source, tmp_path / "out")
    assert config["task_type"] == "SEQ_CLS"
    others = {name for name in trainable(model) if not name.endswith(".bias")}
    assert others == {"base_model.model.classifier.modules_to_save.default.weight"}
    losses, _ = bench.train(model)
    assert losses[-1] < losses[0]
    model.save_pretrained(tmp_path / "trained")
    folded = folded_back(source, tmp_path / "trained", tmp_path / "folded")
    torch.testing.assert_close(bench.outputs(bench.base_model(folded)), bench.outputs(model))


@pytest.mark.parametrize("source", ["qwen2", "gpt2", "bert", "vit"])
def test_the_counts_are_those_of_the_live_model(source: str, sources: dict[str, Path], tmp_path: Path) -> None:
    model, _ = attached(sources[source], tmp_path / "out")
    counts = surgery.plan(bench.spec(sources[source], BITFIT)).training()["new"]
    assert (counts.trainable, counts.total) == model.get_nb_trainable_parameters()


def test_biases_of_a_quantized_base_come_of_the_same_spec(tmp_path: Path) -> None:
    source = models.qwen2(tmp_path / "source", hidden_size=64, intermediate_size=64)
    nf4 = {"op": "quantize.nf4", "modules": "all-linear"}
    out = bench.attach(source, tmp_path / "out", nf4, BITFIT)
    expected = bench.outputs(bench.base_model(out, device_map="cpu"))
    model = bench.load(bench.base_model(out, device_map="cpu"), bench.adapter_of(out))
    torch.testing.assert_close(bench.outputs(model), expected)
    assert len(trainable(model)) == 6


def test_a_router_is_trained_by_the_name_that_the_live_model_has_for_it_and_an_expert_is_refused(
    tmp_path: Path,
) -> None:
    source = bench.mixture(tmp_path / "source", "mixtral")
    model, _ = attached(source, tmp_path / "out", tensors=r".*block_sparse_moe\.gate\.weight")
    assert len(trainable(model)) == 2
    experts = {**BITFIT, "tensors": r".*experts\.0\.w1\.weight"}
    assert "is an expert, which the live model has fused with others" in bench.refusal(source, experts)


REFUSED: dict[str, tuple[str, dict[str, Any]]] = {
    "the model has no biases": ("llama", {}),
    "PEFT can train all biases, some biases of Linears, or whole modules": ("bert", {"tensors": r".*query\.weight"}),
    "of `bert.embeddings.LayerNorm` a part is selected": ("bert", {"tensors": r".*LayerNorm\.bias"}),
    "of `transformer.h.0.attn.c_attn` a part is selected": ("gpt2", {"tensors": r".*c_attn\.bias"}),
    "the module that shares its tensor would not": ("gpt2", {"tensors": r".*wte\.weight"}),
}


@pytest.mark.parametrize("said", REFUSED)
def test_what_peft_cannot_say_is_refused(said: str, sources: dict[str, Path]) -> None:
    source, edit = REFUSED[said]
    assert said in bench.refusal(sources[source], {**BITFIT, **edit})
