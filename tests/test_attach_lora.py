"""A LoRA that `attach.lora` makes is the one that PEFT makes: its names, its numbers, and what it computes."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import attach_bench as bench
import models
import pytest
import torch
from peft import LoraConfig
from safetensors.torch import save_file
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    BertForTokenClassification,
    DistilBertConfig,
    DistilBertForSequenceClassification,
    GPT2Config,
    GPT2ForSequenceClassification,
    LlamaConfig,
    LlamaModel,
    Qwen2Config,
    Qwen2ForQuestionAnswering,
    RobertaConfig,
    RobertaForSequenceClassification,
)

F32 = torch.float32
LORA = {"op": "attach.lora"}
ALL = {**LORA, "modules": "all-linear"}
SEED = 7

SOURCES: dict[str, Callable[[Path], Path]] = {
    "llama": lambda path: models.llama(path, dtype=F32, **bench.SMALL),
    "qwen2": lambda path: models.qwen2(path, dtype=F32, **bench.SMALL),
    "deep": lambda path: models.llama(path, dtype=F32, hidden_size=16, intermediate_size=16, num_hidden_layers=12),
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


# Numbers

TARGETS = {"llama": ["q_proj", "v_proj"], "gpt2": ["c_attn"], "bert": ["query", "value"], "t5": ["q", "v"]}
DRAWN: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "q and v": ("llama", {"modules": r".*\.[qv]_proj"}, {"target_modules": ["q_proj", "v_proj"]}),
    "all linear": ("llama", ALL, {"target_modules": "all-linear"}),
    "all linear with grouped queries": ("qwen2", ALL, {"target_modules": "all-linear"}),
    "twelve layers": ("deep", {**ALL, "rank": 4}, {"target_modules": "all-linear", "r": 4}),
    "some layers": (
        "deep",
        {"modules": r"model\.layers\.(2|10|11)\..*[qu]p?_proj"},
        {"target_modules": r"model\.layers\.(2|10|11)\..*[qu]p?_proj"},
    ),
    "an embedding": (
        "llama",
        {"modules": [r".*embed_tokens", r".*o_proj"]},
        {"target_modules": ["embed_tokens", "o_proj"]},
    ),
    "the head": ("llama", {"modules": ["lm_head", r".*o_proj"]}, {"target_modules": ["lm_head", "o_proj"]}),
    "Conv1D": ("gpt2", ALL, {"target_modules": "all-linear", "fan_in_fan_out": True}),
    "embeddings of positions": (
        "gpt2",
        {"modules": r".*(wpe|c_fc)"},
        {"target_modules": ["wpe", "c_fc"], "fan_in_fan_out": True},
    ),
    "an encoder": ("bert", {"modules": r".*\.(query|dense)"}, {"target_modules": ["query", "dense"]}),
    "an encoder without its head": ("headless", ALL, {"target_modules": "all-linear"}),
    "both stacks": ("t5", ALL, {"target_modules": "all-linear"}),
    "images": ("vit", {"modules": r".*(query|output\.dense)"}, {"target_modules": ["q_proj", "o_proj", "fc2"]}),
    "ranks of their own": (
        "deep",
        {**ALL, "rank_pattern": {r"layers\.1\..*": 2, "q_proj": 5}, "alpha_pattern": {"v_proj": 3}},
        {
            "target_modules": "all-linear",
            "rank_pattern": {r"layers\.1\..*": 2, "q_proj": 5},
            "alpha_pattern": {"v_proj": 3},
        },
    ),
    "rank-stabilised": ("llama", {**ALL, "rslora": True}, {"target_modules": "all-linear", "use_rslora": True}),
    "DoRA": ("qwen2", {**ALL, "dora": True}, {"target_modules": "all-linear", "use_dora": True}),
    "DoRA of Conv1D": (
        "gpt2",
        {**ALL, "dora": True},
        {"target_modules": "all-linear", "use_dora": True, "fan_in_fan_out": True},
    ),
    "DoRA of an embedding": (
        "llama",
        {"modules": [r".*embed_tokens", r".*k_proj"], "dora": True},
        {"target_modules": ["embed_tokens", "k_proj"], "use_dora": True},
    ),
}


@pytest.mark.parametrize("init", ["kaiming", "gaussian"])
@pytest.mark.parametrize("case", DRAWN)
def test_factors_are_drawn_as_peft_draws_them(case: str, init: str, sources: dict[str, Path], tmp_path: Path) -> None:
    source, edit, options = DRAWN[case]
    out = bench.attach(sources[source], tmp_path / "out", {**LORA, **edit, "init": init}, seed=SEED)
    config = LoraConfig(**options, init_lora_weights=True if init == "kaiming" else init)
    theirs = bench.drawn_by_peft(sources[source], config, SEED)
    bench.assert_same(models.read(bench.adapter_of(out)), theirs, ["lora_magnitude_vector"])


HALF: dict[str, tuple[Callable[..., Path], dict[str, Any], dict[str, Any]]] = {
    "DoRA": (models.qwen2, {**ALL, "dora": True}, {"target_modules": "all-linear", "use_dora": True}),
    "DoRA of Conv1D": (
        models.gpt2,
        {**ALL, "dora": True},
        {"target_modules": "all-linear", "use_dora": True, "fan_in_fan_out": True},
    ),
    "a tied embedding": (
        models.qwen2,
        {**LORA, "modules": [r".*embed_tokens", r".*q_proj"], "tied": "both"},
        {"target_modules": ["embed_tokens", "q_proj"], "ensure_weight_tying": True},
    ),
}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("case", HALF)
def test_factors_and_magnitudes_are_rounded_as_peft_rounds_them(case: str, dtype: torch.dtype, tmp_path: Path) -> None:
    """PEFT makes them in the dtype of the base, and then widens them."""
    make, edit, options = HALF[case]
    source = make(tmp_path / "source", dtype=dtype)
    out = bench.attach(source, tmp_path / "out", edit, seed=SEED)
    bench.assert_same(models.read(bench.adapter_of(out)), bench.drawn_by_peft(source, LoraConfig(**options), SEED))


def test_a_pissa_adapter_holds_what_the_weight_lost(sources: dict[str, Path], tmp_path: Path) -> None:
    for name in ("llama", "gpt2"):
        source, out = sources[name], tmp_path / name
        bench.attach(source, out, {**ALL, "init": "pissa", "rank": 4, "alpha": 6})
        base = bench.base_model(source)
        expected = bench.outputs(base)
        model = bench.load(bench.base_model(out), bench.adapter_of(out))
        torch.testing.assert_close(bench.outputs(model), expected, rtol=1e-3, atol=1e-4)
        options = {"target_modules": "all-linear", "r": 4, "lora_alpha": 6, "fan_in_fan_out": name == "gpt2"}
        theirs = bench.drawn_by_peft(source, LoraConfig(**options, init_lora_weights="pissa"))
        ours = models.read(bench.adapter_of(out))
        assert ours.keys() == theirs.keys()
        for a in (key for key in ours if key.endswith("lora_A.weight")):
            b = a.replace("lora_A", "lora_B")
            torch.testing.assert_close(ours[b] @ ours[a], theirs[b] @ theirs[a], rtol=1e-3, atol=1e-4)
        before, after = models.read(source), models.read(out)
        changed = {key for key in before if not torch.equal(before[key], after[key])}
        assert len(changed) == len(ours) // 2


# What PEFT loads

LOADED: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", ALL),
    "grouped queries": ("qwen2", {**ALL, "rslora": True, "alpha": 32}),
    "some layers": ("deep", {"modules": r"model\.layers\.(1|11)\.self_attn\.q_proj"}),
    "Conv1D": ("gpt2", ALL),
    "an encoder": ("bert", ALL),
    "an encoder without its head": ("headless", {"modules": r".*\.dense"}),
    "both stacks": ("t5", {"modules": r".*\.(k|wo)"}),
    "images": ("vit", {**ALL, "modules_to_save": ["classifier"]}),
    "an embedding": ("llama", {"modules": [r".*embed_tokens", r".*q_proj"]}),
    "DoRA": ("qwen2", {**ALL, "dora": True}),
    "DoRA of Conv1D": ("gpt2", {**ALL, "dora": True}),
    "ranks of their own": ("llama", {**ALL, "rank_pattern": {r"layers\.1\..*": 2}, "alpha_pattern": {"v_proj": 3}}),
    "a norm saved whole": ("llama", {**ALL, "modules_to_save": [r"model\.norm", r".*\.input_layernorm"]}),
}


@pytest.mark.parametrize("case", LOADED)
def test_peft_loads_the_adapter_and_nothing_changes_until_it_is_trained(
    case: str, sources: dict[str, Path], tmp_path: Path
) -> None:
    source, edit = LOADED[case]
    out = bench.attach(sources[source], tmp_path / "out", {**LORA, **edit})
    assert sorted(path.name for path in out.iterdir()) == ["adapters", "surgery-manifest.json"]
    expected = bench.outputs(bench.base_model(sources[source]))
    model = bench.load(bench.base_model(sources[source]), bench.adapter_of(out))
    torch.testing.assert_close(bench.outputs(model), expected, rtol=1e-5, atol=1e-5 if edit.get("dora") else 0)
    losses, changed = bench.train(model)
    assert losses[-1] < losses[0]
    assert changed and all("lora_" in name or "modules_to_save" in name for name in changed)


@pytest.mark.parametrize("case", LOADED)
def test_a_trained_adapter_folds_into_what_peft_computes(case: str, sources: dict[str, Path], tmp_path: Path) -> None:
    """Our fold knows the published forward, and was held to PEFT's; so the two agree on what the config means."""
    source, edit = LOADED[case]
    out = bench.attach(sources[source], tmp_path / "out", {**LORA, **edit})
    bench.noisy(bench.adapter_of(out))
    model = bench.load(bench.base_model(sources[source]), bench.adapter_of(out))
    adapter = {"lora": str(bench.adapter_of(out))}
    fold = {"op": "adapter.fold", "models": "lora"}
    folded = bench.attach(sources[source], tmp_path / "folded", fold, models=adapter)
    torch.testing.assert_close(bench.outputs(model), bench.outputs(bench.base_model(folded)), rtol=1e-3, atol=1e-3)


HEADS: dict[str, Callable[[], Any]] = {
    "sentences": lambda: BertForSequenceClassification(BertConfig(**ENCODER)),
    "words": lambda: BertForTokenClassification(BertConfig(**ENCODER)),
    "answers": lambda: Qwen2ForQuestionAnswering(Qwen2Config(**ENCODER, num_key_value_heads=1)),
    "sentences of a decoder": lambda: GPT2ForSequenceClassification(
        GPT2Config(vocab_size=160, n_embd=32, n_layer=1, n_head=2, pad_token_id=0)
    ),
    "two Linears": lambda: RobertaForSequenceClassification(RobertaConfig(**ENCODER)),
    "two modules": lambda: DistilBertForSequenceClassification(
        DistilBertConfig(vocab_size=160, dim=32, hidden_dim=48, n_layers=1, n_heads=2)
    ),
}
ENCODER = {"vocab_size": 160, **bench.SMALL, "num_hidden_layers": 1, "num_attention_heads": 2}


@pytest.mark.parametrize("head", HEADS)
def test_the_head_of_a_task_goes_along_as_peft_expects(head: str, tmp_path: Path) -> None:
    source = bench.saved(tmp_path / "source", HEADS[head]())
    out = bench.attach(source, tmp_path / "out", {**LORA, "modules": r".*\.(query|q_lin|q_proj|c_attn)"})
    model = bench.load(bench.base_model(source), bench.adapter_of(out))
    torch.testing.assert_close(bench.outputs(model), bench.outputs(bench.base_model(source)))
    assert any("modules_to_save" in name for name, x in model.named_parameters() if x.requires_grad)


def test_a_checkpoint_without_the_head_of_its_task_is_refused(tmp_path: Path) -> None:
    source = models.bert(tmp_path / "source", head=False)
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps({**config, "architectures": ["BertForSequenceClassification"]}))
    assert "the checkpoint has none" in bench.refusal(source, {**LORA, "modules": ".*query"})


def test_a_base_checkpoint_under_a_class_with_a_head_gets_the_names_of_the_class(tmp_path: Path) -> None:
    source = models.bert(tmp_path / "source", head=False, dtype=F32)
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps({**config, "architectures": ["BertForMaskedLM"]}))
    out = bench.attach(source, tmp_path / "out", {**LORA, "modules": ".*query"})
    assert all(name.startswith("base_model.model.bert.encoder.") for name in models.read(bench.adapter_of(out)))
    bench.load(bench.base_model(source), bench.adapter_of(out))


@pytest.mark.parametrize("model_type", models.SIZES)
def test_every_architecture_gets_the_adapter_that_peft_makes(model_type: str, tmp_path: Path) -> None:
    source = models.of_type(model_type, tmp_path / "source")
    out = bench.attach(source, tmp_path / "out", {**ALL, "rank": 2}, seed=SEED)
    theirs = bench.drawn_by_peft(source, LoraConfig(target_modules="all-linear", r=2), SEED)
    bench.assert_same(models.read(bench.adapter_of(out)), theirs)
    model = bench.load(bench.base_model(source), bench.adapter_of(out))
    torch.testing.assert_close(bench.outputs(model), bench.outputs(bench.base_model(source)), rtol=0, atol=0)


# Tied embeddings

TIED_WARNING = ".*a tied layer is part of the adapter.*"


def test_a_tied_embedding_is_adapted_alone_or_with_its_head(sources: dict[str, Path], tmp_path: Path) -> None:
    source = sources["qwen2"]
    edit = {**LORA, "modules": [r".*embed_tokens", r".*q_proj"]}
    assert "shares its tensor with the output head" in bench.refusal(source, edit)
    alone = bench.attach(source, tmp_path / "alone", {**edit, "tied": "alone"})
    model = bench.load(bench.base_model(source), bench.adapter_of(alone), TIED_WARNING)
    torch.testing.assert_close(bench.outputs(model), bench.outputs(bench.base_model(source)))
    assert not any("lm_head" in name for name, x in model.named_parameters() if x.requires_grad)
    both = bench.attach(source, tmp_path / "both", {**edit, "tied": "both"}, seed=SEED)
    assert config_ties(both)
    model = bench.load(bench.base_model(source), bench.adapter_of(both))
    torch.testing.assert_close(bench.outputs(model), bench.outputs(bench.base_model(source)))
    parameters = dict(model.named_parameters())
    embedded = parameters["base_model.model.model.embed_tokens.lora_embedding_B.default"]
    head = parameters["base_model.model.lm_head.lora_A.default.weight"]
    assert embedded.data_ptr() == head.data_ptr()
    options = {"target_modules": ["embed_tokens", "q_proj"], "ensure_weight_tying": True}
    theirs = bench.drawn_by_peft(source, LoraConfig(**options), SEED)
    bench.assert_same(models.read(bench.adapter_of(both)), theirs)
    losses, changed = bench.train(model)
    assert losses[-1] < losses[0] and all("lora_" in name for name in changed)


@pytest.mark.parametrize("model_type", ["gemma", "opt"])
def test_a_tied_embedding_is_drawn_as_peft_draws_it(model_type: str, tmp_path: Path) -> None:
    source = models.of_type(model_type, tmp_path / "source")
    edit = {**LORA, "modules": [r".*embed_tokens", r".*[kv]_proj"], "tied": "both", "init": "gaussian", "rank": 4}
    out = bench.attach(source, tmp_path / "out", edit, seed=SEED)
    bench.load(bench.base_model(source), bench.adapter_of(out))
    targets = ["embed_tokens", "k_proj", "v_proj"]
    config = LoraConfig(target_modules=targets, ensure_weight_tying=True, init_lora_weights="gaussian", r=4)
    bench.assert_same(models.read(bench.adapter_of(out)), bench.drawn_by_peft(source, config, SEED))


def config_ties(out: Path) -> bool:
    return bench.config_of(out)["ensure_weight_tying"] is True


# In one spec with other edits

FOLD = {"op": "adapter.fold", "models": "old"}


def test_what_a_merge_a_fold_and_fewer_layers_leave_can_be_attached_to(
    sources: dict[str, Path], tmp_path: Path
) -> None:
    source = sources["deep"]
    tuned, old = models.tuned(tmp_path / "tuned", source), models.lora(tmp_path / "old", source)
    merge = {"op": "merge.linear", "models": {"source": {"weight": 0.5}, "tuned": {"weight": 0.5}}}
    select = {"op": "layers.select", "keep": [0, 3, 11]}
    models_ = {"tuned": str(tuned), "old": str(old)}
    out = bench.attach(
        source, tmp_path / "out", merge, FOLD, select, {**ALL, "init": "pissa"}, ALL | {"name": "b"}, models=models_
    )
    assert bench.config_of(out)["base_model_name_or_path"] == "../.."
    plain = bench.attach(source, tmp_path / "plain", merge, FOLD, select, models=models_)
    expected = bench.outputs(bench.base_model(plain))
    model = bench.load(bench.base_model(out), bench.adapter_of(out))
    torch.testing.assert_close(bench.outputs(model), expected, rtol=1e-3, atol=1e-3)
    assert all(f".layers.{layer}." not in name for layer in range(3, 12) for name in models.read(bench.adapter_of(out)))
    theirs = bench.drawn_by_peft(plain, LoraConfig(target_modules="all-linear"))
    bench.assert_same(models.read(bench.adapter_of(out, "b")), theirs)


NF4 = {"op": "quantize.nf4", "modules": "all-linear"}


@pytest.mark.filterwarnings("ignore:bitsandbytes..gemv_4bit")  # its CPU kernel has no gradient of its own
def test_a_quantized_base_and_its_adapter_come_of_one_spec(tmp_path: Path) -> None:
    source = models.llama(tmp_path / "source", hidden_size=64, intermediate_size=64)
    out = bench.attach(source, tmp_path / "out", NF4, ALL)
    expected = bench.outputs(bench.base_model(out, device_map="cpu"))
    model = bench.load(bench.base_model(out, device_map="cpu"), bench.adapter_of(out))
    torch.testing.assert_close(bench.outputs(model), expected)
    losses, changed = bench.train(model)
    assert losses[-1] < losses[0] and all("lora_" in name for name in changed)
    theirs = bench.drawn_by_peft(out, LoraConfig(target_modules="all-linear"))
    bench.assert_same(models.read(bench.adapter_of(out)), theirs)


@pytest.mark.parametrize("dora", [False, True], ids=["lora", "dora"])
def test_a_base_that_was_quantized_before_gets_the_adapter_that_one_spec_makes(dora: bool, tmp_path: Path) -> None:
    source = models.llama(tmp_path / "source", hidden_size=64, intermediate_size=64)
    edit = {**ALL, "dora": dora}
    at_once = bench.attach(source, tmp_path / "at_once", NF4, edit)
    quantized = bench.attach(source, tmp_path / "quantized", NF4)
    in_turn = bench.attach(quantized, tmp_path / "in_turn", edit)
    assert not (in_turn / "model.safetensors").exists()
    bench.assert_same(models.read(bench.adapter_of(in_turn)), models.read(bench.adapter_of(at_once)))


def test_magnitudes_are_those_of_the_quantized_weights(tmp_path: Path) -> None:
    """PEFT's own DoRA on the CPU kernels of bitsandbytes is no no-op, so that numbers are compared, not logits."""
    source = models.llama(tmp_path / "source", hidden_size=64, intermediate_size=64)
    out = bench.attach(source, tmp_path / "out", NF4, {**ALL, "dora": True})
    theirs = bench.drawn_by_peft(out, LoraConfig(target_modules="all-linear", use_dora=True))
    bench.assert_same(models.read(bench.adapter_of(out)), theirs, ["lora_magnitude_vector"])


def test_two_adapters_of_one_spec_are_two_directories(sources: dict[str, Path], tmp_path: Path) -> None:
    edits = [{**ALL, "name": "a"}, {**LORA, "name": "b", "modules": ".*q_proj", "rank": 2}]
    out = bench.attach(sources["llama"], tmp_path / "out", *edits)
    assert sorted(path.name for path in (out / "adapters").iterdir()) == ["a", "b"]
    assert (bench.config_of(out, "a")["r"], bench.config_of(out, "b")["r"]) == (8, 2)
    assert "both write `adapters/a`" in bench.refusal(sources["llama"], {**ALL, "name": "A"}, {**ALL, "name": "a"})


def test_the_base_is_written_beside_its_adapter_where_it_is_asked_for(sources: dict[str, Path], tmp_path: Path) -> None:
    out = bench.attach(sources["llama"], tmp_path / "out", ALL, output={"copy_base": True})
    assert bench.config_of(out)["base_model_name_or_path"] == "../.."
    before, after = models.read(sources["llama"]), models.read(out)
    assert before.keys() == after.keys() and all(models.same_bytes(before[name], after[name]) for name in before)
    bench.load(bench.base_model(out), bench.adapter_of(out))


def test_the_base_is_called_what_the_spec_calls_it(sources: dict[str, Path], tmp_path: Path) -> None:
    out = bench.attach(sources["llama"], tmp_path / "out", {**ALL, "base_model_name_or_path": "org/llama"})
    assert bench.config_of(out)["base_model_name_or_path"] == "org/llama"
    assert bench.config_of(out)["revision"] is None
    assert bench.config_of(bench.attach(sources["llama"], tmp_path / "other", ALL))["base_model_name_or_path"] is None


def test_a_base_from_the_hub_is_named_with_its_commit_unless_it_is_changed(tmp_path: Path) -> None:
    commit, repository = "a" * 40, tmp_path / "models--org--tiny"
    models.llama(repository / "snapshots" / commit, **bench.SMALL)
    plain = bench.config_of(bench.attach(repository, tmp_path / "plain", ALL))
    assert (plain["base_model_name_or_path"], plain["revision"]) == ("org/tiny", commit)
    copied = bench.config_of(bench.attach(repository, tmp_path / "copied", ALL, output={"copy_base": True}))
    changed = bench.config_of(bench.attach(repository, tmp_path / "changed", NF4, ALL))
    renamed = bench.config_of(bench.attach(repository, tmp_path / "renamed", {**ALL, "base_model_name_or_path": "a/b"}))
    for config, name in ((copied, "../.."), (changed, "../.."), (renamed, "a/b")):
        assert (config["base_model_name_or_path"], config["revision"]) == (name, None)


def test_planning_imports_no_torch(sources: dict[str, Path]) -> None:
    edits = [
        {**ALL, "name": "b", "init": "pissa"},
        {**ALL, "dora": True},
        {"op": "attach.ia3", "name": "c", "modules": "all-linear"},
        {"op": "attach.bitfit", "name": "d", "tensors": ".*norm.*"},
    ]
    content = json.dumps(bench.spec(sources["llama"], *edits))
    code = f"import json, sys, surgery; surgery.plan(json.loads({content!r})); sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize(
    "later",
    [
        {"op": "layers.select", "keep": [1]},
        {"op": "tensor.rename", "tensors": r"model\.layers\.1\.(.*)", "to": r"model.layers.2.\1"},
    ],
    ids=lambda edit: edit["op"],
)
def test_what_was_attached_to_must_stay_where_it_is(later: dict[str, Any], sources: dict[str, Path]) -> None:
    assert "attach after the edits that move or drop tensors" in bench.refusal(sources["llama"], ALL, later)


# Experts

MIXTURES = {"mixtral": r".*experts\.\d+\.w[123]", "qwen3_moe": r".*experts\.\d+\.\w+_proj"}
FUSED_WARNING = ".*_pattern keys did not match any targeted module.*"  # PEFT's, of what it wrote there itself


@pytest.mark.parametrize("model_type", MIXTURES)
def test_single_experts_are_adapted_where_peft_fuses_their_adapters(model_type: str, tmp_path: Path) -> None:
    source = bench.mixture(tmp_path / "source", model_type)
    edit = {**LORA, "modules": [MIXTURES[model_type], r".*self_attn\.q_proj"], "rank": 4, "alpha": 8}
    out = bench.attach(source, tmp_path / "out", edit)
    base = bench.outputs(bench.base_model(source))
    model = bench.load(bench.base_model(source), bench.adapter_of(out), FUSED_WARNING)
    torch.testing.assert_close(bench.outputs(model), base)
    bench.noisy(bench.adapter_of(out))
    adapter = models.read(bench.adapter_of(out))
    model = bench.load(bench.base_model(source), bench.adapter_of(out), FUSED_WARNING)
    weights = models.read(source)
    for a in (name for name in adapter if name.endswith("lora_A.weight")):
        name = a.removeprefix("base_model.model.").replace("lora_A.", "")
        weights[name] = weights[name] + 2 * adapter[a.replace("lora_A", "lora_B")] @ adapter[a]
    save_file(weights, source / "model.safetensors", {"format": "pt"})
    torch.testing.assert_close(bench.outputs(model), bench.outputs(bench.base_model(source)), rtol=1e-4, atol=1e-4)


def test_experts_are_adapted_all_alike_or_not_at_all(tmp_path: Path) -> None:
    source = bench.mixture(tmp_path / "source", "mixtral")
    every = r".*experts\.\d+\.w[123]"
    refused = {
        "is not selected: PEFT adapts the w1 and w3 of all experts or none": {"modules": r".*experts\.\d+\.w1"},
        "is not selected: PEFT adapts the w2 of all experts or none": {"modules": r".*layers\.0\..*experts\.\d+\.w2"},
        "`rslora` is not for experts": {"modules": every, "rslora": True},
        "`dora` is not for experts": {"modules": every, "dora": True},
        "`dropout` is not for experts": {"modules": every, "dropout": 0.1},
        "gives experts a rank or alpha of their own": {"modules": every, "rank_pattern": {"w1": 4}},
        "is an MoE router": {"modules": r".*block_sparse_moe\.gate"},
    }
    for said, edit in refused.items():
        assert said in bench.refusal(source, {**LORA, **edit})


def test_experts_that_peft_cannot_fuse_are_refused_and_so_is_what_it_takes_for_them(tmp_path: Path) -> None:
    source = bench.mixture(tmp_path / "qwen2_moe", "qwen2_moe")
    said = "PEFT 0.21 loads no adapters for single ones of a qwen2_moe"
    assert said in bench.refusal(source, {**LORA, "modules": r".*experts\.\d+\.\w+"})
    source = bench.mixture(tmp_path / "deepseek_v2", "deepseek_v2")
    said = "ends like an expert's Linear, which PEFT 0.21 takes it for in a deepseek_v2"
    assert said in bench.refusal(source, {**LORA, "modules": r".*shared_experts\.up_proj"})


# Refusals

REFUSED: dict[str, tuple[str, dict[str, Any]]] = {
    "is at most 16: 17 is larger": ("deep", {**ALL, "rank": 17}),
    "is a norm (f32[32]), which takes no low-rank factors": ("llama", {"modules": r"model\.norm"}),
    "is a convolution": ("vit", {"modules": r".*projection"}),
    "matches none of the 4 modules selected": (
        "llama",
        {"modules": r".*[qv]_proj", "rank_pattern": {"k_proj": 2}},
    ),
    "`modules_to_save`: `score` matches none of": ("llama", {**ALL, "modules_to_save": ["score"]}),
    "is both adapted and saved whole": ("llama", {**ALL, "modules_to_save": [r".*layers\.0\..*q_proj"]}),
    "shares its tensor with the output head": ("gpt2", {"modules": r".*wte"}),
    "has another rank or alpha than `lm_head`": (
        "qwen2",
        {"modules": [".*embed_tokens", ".*q_proj"], "tied": "both", "rank_pattern": {"embed_tokens": 2}},
    ),
    "PEFT 0.21 ties the factors of an `embed_tokens` only": ("gpt2", {"modules": r".*wte", "tied": "both"}),
    "the output head that shares its tensor would not": ("gpt2", {**ALL, "modules_to_save": [".*wte"]}),
    "exclude each other": ("llama", {**ALL, "dora": True, "init": "pissa"}),
    "for which PEFT has no PiSSA": ("llama", {"modules": ".*embed_tokens", "init": "pissa"}),
    "`rank_pattern`: `(` is no regex": ("llama", {**ALL, "rank_pattern": {"(": 2}}),
}


@pytest.mark.parametrize("said", REFUSED)
def test_what_cannot_be_a_lora_is_refused(said: str, sources: dict[str, Path]) -> None:
    source, edit = REFUSED[said]
    assert said in bench.refusal(sources[source], {**LORA, **edit})


def test_a_module_saved_whole_that_peft_would_not_tell_from_others_is_refused(tmp_path: Path) -> None:
    """PEFT goes by how a path ends, be it in the middle of a word."""
    sizes = {"vocab_size": 160, **bench.SMALL, "num_hidden_layers": 1, "num_attention_heads": 2}
    source = bench.saved(tmp_path / "source", LlamaModel(LlamaConfig(**sizes)))
    edit = {**ALL, "modules_to_save": ["norm"]}
    assert "takes `layers.0.input_layernorm` with it" in bench.refusal(source, edit)


def test_pissa_does_not_change_a_quantized_weight(sources: dict[str, Path]) -> None:
    assert "attach before `quantize`" in bench.refusal(sources["llama"], NF4, {**ALL, "init": "pissa"})
