"""`adapter.convert`: PEFT and the adapters library compute the same with what goes between them."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import models
import pytest
import torch
import transformers
from peers.adapterhub import adapters_python, run_jobs
from peft import IA3Config, LoraConfig, PeftModel, PromptTuningConfig, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import surgery
from surgery.errors import OpError, SpecError
from surgery.formats.adapterhub.hub import RESERVED
from surgery.formats.adapterhub.placement import TABLE, place_all

pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning")  # PEFT asks for it

IDS = torch.tensor([[3, 4, 5, 6, 7, 8], [9, 8, 7, 6, 5, 4]])
CLASSES = {
    "llama": "LlamaForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "gpt2": "GPT2LMHeadModel",
    "bert": "BertForMaskedLM",
    "t5": "T5ForConditionalGeneration",
    "gated_t5": "T5ForConditionalGeneration",
    "distilbert": "DistilBertForMaskedLM",
}
SMALL = {"hidden_size": 32, "intermediate_size": 48, "vocab_size": 64, "pad_token_id": 0}
T5 = {"vocab_size": 64, "d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4}
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {**SMALL, "num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 2}),
    "qwen2": ("qwen2", {**SMALL, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}),
    "gpt2": ("gpt2", {"vocab_size": 64, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 32}),
    "bert": ("bert", {**SMALL, "num_hidden_layers": 2, "num_attention_heads": 4}),
    "t5": ("t5", T5),
    "gated_t5": ("t5", {**T5, "num_decoder_layers": 1, "feed_forward_proj": "gated-gelu"}),
    "distilbert": ("distilbert", {"vocab_size": 64, "dim": 32, "hidden_dim": 48, "n_layers": 2, "n_heads": 4}),
}


@dataclass(frozen=True)
class Case:
    """A PEFT adapter to be converted: its config, and whether it comes back byte for byte."""

    model: str
    config: LoraConfig | IA3Config
    returns: bool = True


@dataclass(frozen=True)
class HubCase:
    """An adapter of the adapters library to be converted."""

    model: str
    config_class: str
    config: Mapping[str, Any] = field(default_factory=dict)


def _lora(targets: Any, **options: Any) -> LoraConfig:
    return LoraConfig(**{"r": 4, "lora_alpha": 6, "lora_dropout": 0.1, "target_modules": targets, **options})


CASES = {
    "llama-qv": Case("llama", _lora(["q_proj", "v_proj"], task_type="CAUSAL_LM")),
    "llama-mlp": Case("llama", _lora(["q_proj", "k_proj", "v_proj", "up_proj", "down_proj"])),
    "llama-layers": Case("llama", _lora(["q_proj", "v_proj"], layers_to_transform=[0, 2])),
    "llama-up": Case("llama", _lora(["up_proj"])),
    "llama-ia3": Case("llama", IA3Config(task_type="CAUSAL_LM")),
    "llama-ia3-attention": Case("llama", IA3Config(target_modules=["k_proj", "v_proj"], feedforward_modules=[])),
    "qwen2-all": Case("qwen2", _lora(["q_proj", "k_proj", "v_proj", "up_proj", "down_proj"])),
    "qwen2-ia3": Case(
        "qwen2", IA3Config(target_modules=["k_proj", "v_proj", "down_proj"], feedforward_modules=["down_proj"])
    ),
    "gpt2-fused": Case("gpt2", _lora(["c_attn"], fan_in_fan_out=True), returns=False),
    "gpt2-mlp": Case("gpt2", _lora(["c_fc", "mlp.c_proj"], fan_in_fan_out=True)),
    "gpt2-ia3": Case("gpt2", IA3Config(target_modules=["c_attn"], feedforward_modules=[], fan_in_fan_out=True)),
    "bert-qv": Case("bert", _lora(["query", "value"])),
    "bert-mlp": Case("bert", _lora(r".*\.layer\.\d+\.(attention\.self\.key|output\.dense|intermediate\.dense)")),
    "bert-ia3": Case("bert", IA3Config(target_modules=["key", "value", "intermediate.dense"], feedforward_modules=[])),
    "t5-all": Case("t5", _lora(["q", "v", "wi", "wo"], task_type="SEQ_2_SEQ_LM")),
    "t5-ia3": Case("t5", IA3Config(target_modules=["k", "v"], feedforward_modules=[])),
    "t5-decoder": Case("t5", _lora(r"decoder\.block\.\d+\.layer\.\d\.\w+\.(q|v)")),
    "gated-t5-ia3": Case("gated_t5", IA3Config(target_modules=["k", "v", "wo"], feedforward_modules=["wo"])),
    "gated-t5": Case("gated_t5", _lora(["q", "wi_1", "wo"])),
    "distilbert-qv": Case("distilbert", _lora(["q_lin", "v_lin", "lin1"])),
}
HUB_CASES = {
    "llama-lora": HubCase("llama", "LoRAConfig", {"r": 4, "alpha": 6, "leave_out": [1], "dropout": 0.1}),
    "llama-lora-mlp": HubCase("llama", "LoRAConfig", {"intermediate_lora": True, "output_lora": True}),
    "llama-ia3": HubCase("llama", "IA3Config"),
    "llama-ia3-all": HubCase("llama", "IA3Config", {"output_lora": True}),
    "qwen2-ia3": HubCase("qwen2", "IA3Config"),
    "gpt2-qv": HubCase("gpt2", "LoRAConfig", {"r": 4, "alpha": 6}),
    "gpt2-qkv-mlp": HubCase("gpt2", "LoRAConfig", {"r": 4, "attn_matrices": ["q", "k", "v"], "output_lora": True}),
    "gpt2-ia3": HubCase("gpt2", "IA3Config"),
    "bert-lora": HubCase("bert", "LoRAConfig", {"intermediate_lora": True, "output_lora": True}),
    "bert-ia3": HubCase("bert", "IA3Config"),
    "t5-lora": HubCase("t5", "LoRAConfig", {"leave_out": [0, 3], "intermediate_lora": True}),
    "t5-ia3": HubCase("t5", "IA3Config"),
    "gated-t5-ia3": HubCase("gated_t5", "IA3Config"),
}


@dataclass(frozen=True)
class World:
    """Every adapter both ways, and what the adapters library says to it."""

    root: Path
    answers: Mapping[str, dict[str, Any]]


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("bases")
    for name in MODELS:
        model = _random_model(name)
        model.save_pretrained(root / name)
    return root


def _random_model(name: str) -> nn.Module:
    model_type, sizes = MODELS[name]
    torch.manual_seed(0)
    model = getattr(transformers, CLASSES[name])(transformers.AutoConfig.for_model(model_type, **sizes))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn_like(parameter) * 0.3 + float(parameter.dim() == 1))
    return model.eval()


@pytest.fixture(scope="module")
def peft_adapters(bases: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Every case as PEFT saves it, weights random, with the logits beside it."""
    root = tmp_path_factory.mktemp("peft")
    for name, case in CASES.items():
        model = get_peft_model(_random_model(case.model), case.config)
        torch.manual_seed(1)
        for key, parameter in model.named_parameters():
            if "lora_" in key or "ia3_" in key:
                nn.init.normal_(parameter, mean=float("ia3_" in key), std=0.3)
        model.eval().save_pretrained(root / name)
        save_file({"logits": _logits(model, case.model)}, root / f"{name}.safetensors")
    return root


def _logits(model: nn.Module, name: str) -> Tensor:
    inputs: dict[str, Tensor] = {"input_ids": IDS, "attention_mask": torch.ones_like(IDS)}
    if "t5" in name:
        inputs["decoder_input_ids"] = IDS[:, :4]
    with torch.no_grad():
        return model(**inputs).logits.contiguous()


def _convert(source: Path, out: Path, base: Path | None = None, **options: Any) -> Path:
    edit: dict[str, Any] = {"op": "adapter.convert", "to": "adapterhub" if base else "peft", **options}
    spec: dict[str, Any] = {"version": 1, "source": str(source), "edits": [edit]}
    if base is not None:
        edit["base"] = "base"
        spec["models"] = {"base": str(base)}
    surgery.apply(surgery.plan(spec), out)
    return out


@pytest.fixture(scope="module")
def hub_adapters(bases: Path, peft_adapters: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("hub")
    for name, case in CASES.items():
        _convert(peft_adapters / name, root / name, bases / case.model)
    return root


@pytest.fixture(scope="module")
def world(bases: Path, hub_adapters: Path, tmp_path_factory: pytest.TempPathFactory) -> World:
    root = tmp_path_factory.mktemp("world")
    adapters_python()
    jobs: dict[str, dict[str, Any]] = {}
    for name, case in CASES.items():
        job = _job("load", case.model, bases, root, f"load-{name}")
        jobs[f"load {name}"] = {**job, "adapter": str(hub_adapters / name)}
    for name, case in HUB_CASES.items():
        job = _job("make", case.model, bases, root, f"make-{name}")
        made = {"adapter": str(root / name), "config_class": case.config_class, "config": dict(case.config)}
        made["with_head"] = case.model == "llama"  # the library cannot save the tied head of others as safetensors
        jobs[f"make {name}"] = {**job, **made}
    for model_type, (class_name, sizes) in _all_types().items():
        jobs[f"places {model_type}"] = {
            "do": "places", "class": class_name, "model_type": model_type.split("-gated")[0], "sizes": sizes,
        }  # fmt: skip
    answers = run_jobs(list(jobs.values()), root)
    return World(root, dict(zip(jobs, answers, strict=True)))


def _job(do: str, model: str, bases: Path, root: Path, logits: str) -> dict[str, Any]:
    base = str(bases / model)
    return {"do": do, "class": CLASSES[model], "base": base, "logits": str(root / f"{logits}.safetensors")}


def _all_types() -> dict[str, tuple[str, dict[str, Any]]]:
    """Every model_type of the table, two layers each."""
    decoder = {**SMALL, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
    encoder = {key: value for key, value in decoder.items() if key != "num_key_value_heads"}
    bart = {
        "vocab_size": 64, "d_model": 32, "encoder_layers": 2, "decoder_layers": 1, "encoder_attention_heads": 2,
        "decoder_attention_heads": 2, "encoder_ffn_dim": 48, "decoder_ffn_dim": 48,
    }  # fmt: skip
    gpt = {"vocab_size": 64, "n_embd": 32, "n_layer": 2, "n_head": 4, "rotary_dim": 8, "n_positions": 32}
    gated = {**T5, "num_decoder_layers": 1, "feed_forward_proj": "gated-gelu"}
    return {
        "llama": ("LlamaForCausalLM", decoder),
        "mistral": ("MistralForCausalLM", decoder),
        "qwen2": ("Qwen2ForCausalLM", decoder),
        "qwen3": ("Qwen3ForCausalLM", {**decoder, "head_dim": 8}),
        "gemma2": ("Gemma2ForCausalLM", {**decoder, "head_dim": 8}),
        "gemma3_text": ("Gemma3ForCausalLM", {**decoder, "head_dim": 8}),
        "phi": ("PhiForCausalLM", decoder),
        "gpt2": ("GPT2LMHeadModel", gpt),
        "gptj": ("GPTJForCausalLM", gpt),
        "bert": ("BertForMaskedLM", encoder),
        "roberta": ("RobertaForMaskedLM", encoder),
        "xlm-roberta": ("XLMRobertaForMaskedLM", encoder),
        "electra": ("ElectraForMaskedLM", {**encoder, "embedding_size": 32}),
        "deberta-v2": ("DebertaV2ForMaskedLM", encoder),
        "distilbert": ("DistilBertForMaskedLM", MODELS["distilbert"][1]),
        "t5": ("T5ForConditionalGeneration", T5),
        "t5-gated": ("T5ForConditionalGeneration", gated),
        "mt5": ("MT5ForConditionalGeneration", gated),
        "bart": ("BartForConditionalGeneration", bart),
        "mbart": ("MBartForConditionalGeneration", bart),
        "plbart": ("PLBartForConditionalGeneration", bart),
    }


@pytest.mark.parametrize("name", CASES)
def test_a_peft_adapter_comes_back_as_it_went(
    name: str, hub_adapters: Path, peft_adapters: Path, tmp_path: Path
) -> None:
    back = _convert(hub_adapters / name, tmp_path / "back")
    before, after = models.read(peft_adapters / name), models.read(back)
    assert before.keys() == after.keys()
    if CASES[name].returns:
        assert all(models.same_bytes(before[key], after[key]) for key in before)


@pytest.mark.parametrize("name", CASES)
def test_the_round_trip_computes_the_same_in_peft(
    name: str, bases: Path, hub_adapters: Path, peft_adapters: Path, tmp_path: Path
) -> None:
    back = _convert(hub_adapters / name, tmp_path / "back")
    expected = load_file(peft_adapters / f"{name}.safetensors")["logits"]
    actual = _peft_logits(bases, CASES[name].model, back)
    assert torch.allclose(actual, expected, rtol=1e-5, atol=1e-5)


def _peft_logits(bases: Path, model: str, adapter: Path) -> Tensor:
    base = getattr(transformers, CLASSES[model]).from_pretrained(bases / model).eval()
    return _logits(PeftModel.from_pretrained(base, adapter).eval(), model)


@pytest.mark.parametrize("name", CASES)
def test_adapters_computes_what_peft_does(name: str, world: World, peft_adapters: Path) -> None:
    answer = world.answers[f"load {name}"]
    assert answer == {"name": "adapter", "warned": [], "missing_keys": [], "unexpected_keys": []}
    expected = load_file(peft_adapters / f"{name}.safetensors")["logits"]
    actual = load_file(world.root / f"load-{name}.safetensors")["logits"]
    assert torch.allclose(actual, expected, rtol=1e-5, atol=1e-5)
    base = load_file(world.root / f"load-{name}.safetensors")["logits"] - _logits(
        _random_model(CASES[name].model), CASES[name].model
    )
    assert base.abs().max() > 0.01, "the adapter does nothing"


@pytest.mark.parametrize("name", HUB_CASES)
def test_peft_computes_what_adapters_does(name: str, world: World, bases: Path, tmp_path: Path) -> None:
    converted = _convert(world.root / name, tmp_path / "peft")
    expected = load_file(world.root / f"make-{name}.safetensors")["logits"]
    actual = _peft_logits(bases, HUB_CASES[name].model, converted)
    assert torch.allclose(actual, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", [name for name in HUB_CASES if "gpt2" not in name])
def test_an_adapterhub_adapter_comes_back_as_it_went(name: str, world: World, bases: Path, tmp_path: Path) -> None:
    converted = _convert(world.root / name, tmp_path / "peft")
    back = _convert(converted, tmp_path / "back", bases / HUB_CASES[name].model, name="made")
    before, after = load_file(world.root / name / "adapter.safetensors"), load_file(back / "adapter.safetensors")
    assert before.keys() == after.keys()
    assert all(models.same_bytes(before[key], after[key]) for key in before)
    configs = [json.loads((path / "adapter_config.json").read_text()) for path in (world.root / name, back)]
    for config in configs:  # where nothing is adapted in the attention, which of its matrices is not kept
        config["model_name"] = None
    assert configs[0] == configs[1]


@pytest.mark.parametrize("model_type", _all_types())
def test_the_table_knows_what_the_library_adapts(model_type: str, world: World) -> None:
    found = world.answers[f"places {model_type}"]["places"]
    config = world.answers[f"places {model_type}"]["config"]
    row, places = place_all(found, config)
    first = [sum(config[_first(stack, config)] for stack in row.stacks[:index]) for index in range(len(row.stacks))]
    assert {place.path: [place.slot, first[place.index] + place.layer] for place in places} == found


def _first(stack: Any, config: Mapping[str, Any]) -> str:
    return next(key for key in stack.num_layers if isinstance(config.get(key), int))


def test_every_row_of_the_table_is_held_to_the_library() -> None:
    tested = {name.removesuffix("-gated") for name in _all_types()}
    assert tested == {name for row in TABLE for name in row.model_types}


def test_the_plan_renames_and_computes_nothing(bases: Path, peft_adapters: Path) -> None:
    edit = {"op": "adapter.convert", "to": "adapterhub", "base": "base", "name": "mine"}
    spec = {"version": 1, "source": str(peft_adapters / "bert-qv"), "models": {"base": str(bases / "bert")}}
    plan = surgery.plan({**spec, "edits": [edit]})
    assert {tensor.action for tensor in plan.tensors} == {"rename"}
    assert "bert.encoder.layer.1.attention.self.value.loras.mine.lora_B" in {tensor.name for tensor in plan.tensors}


def test_targets_are_the_suffixes_that_users_know(world: World, tmp_path: Path) -> None:
    whole = json.loads((_convert(world.root / "t5-ia3", tmp_path / "a") / "adapter_config.json").read_text())
    parts = json.loads((_convert(world.root / "llama-lora", tmp_path / "b") / "adapter_config.json").read_text())
    assert whole["target_modules"] == ["k", "v", "wi"]
    assert parts["target_modules"][0] == "model.layers.0.self_attn.q_proj"


def test_an_old_adapter_is_read_with_the_scale_that_the_library_gives_it(world: World, tmp_path: Path) -> None:
    old = _edited(world.root / "llama-lora", tmp_path / "old", version="adapters.1.0.1")
    assert json.loads((_convert(old, tmp_path / "out") / "adapter_config.json").read_text())["lora_alpha"] == 4


def _edited(source: Path, target: Path, tensors: Mapping[str, Tensor] | None = None, **config: Any) -> Path:
    """A copy whose config has other values (those of `config` in AdapterHub's too)."""
    target.mkdir()
    before = json.loads((source / "adapter_config.json").read_text())
    inner = {key: config.pop(key) for key in list(config) if key in before.get("config", {})}
    after = {**before, **config, **({"config": {**before["config"], **inner}} if inner else {})}
    (target / "adapter_config.json").write_text(json.dumps(after))
    weights = next(path for path in source.glob("adapter*.safetensors"))
    save_file({**load_file(weights), **(tensors or {})}, target / weights.name)
    return target


@pytest.mark.parametrize(
    ("config", "what"),
    [
        ({"use_rslora": True}, "`use_rslora: True`"),
        ({"use_dora": True}, "`use_dora: True`"),
        ({"rank_pattern": {"q_proj": 8}}, "`rank_pattern:"),
        ({"alpha_pattern": {"q_proj": 8}}, "`alpha_pattern:"),
        ({"bias": "all"}, "`bias: all`"),
        ({"modules_to_save": ["lm_head"]}, "`modules_to_save:"),
        ({"init_lora_weights": "pissa"}, "belongs to a base that PEFT changes"),
        ({"r": 8}, "but adapter_config.json says `r: 8`"),
        ({"r": "8"}, "no positive integer"),
        ({"peft_type": "PREFIX_TUNING"}, "PEFT counts its virtual tokens as positions"),
        ({"peft_type": "VERA"}, "the libraries do not both know it"),
        ({"peft_type": None}, "it is no PEFT adapter"),
    ],
)
def test_what_adapterhub_cannot_say_is_refused(
    config: dict[str, Any], what: str, bases: Path, peft_adapters: Path, tmp_path: Path
) -> None:
    source = _edited(peft_adapters / "llama-qv", tmp_path / "source", **config)
    with pytest.raises(OpError, match=f".*{what}"):
        _convert(source, tmp_path / "out", bases / "llama")


@pytest.mark.parametrize(
    ("model", "config", "what"),
    [
        ("llama", _lora(["o_proj"]), r"self_attn\.o_proj` \(and 2 more modules\) is adapted, which the adapters"),
        ("llama", _lora(["gate_proj"]), "which the adapters library never does in `llama`"),
        ("bert", _lora(["dense"]), r"attention\.output\.dense.*which the adapters library never does"),
        ("t5", _lora(r".*SelfAttention\.q"), "is adapted and .*EncDecAttention.q` is not"),
        ("llama", _lora(r".*\.(0\.self_attn\.q_proj|1\.self_attn\.v_proj)"), "leaves out whole layers only"),
        (
            "llama",
            IA3Config(target_modules=["up_proj", "down_proj"], feedforward_modules=["down_proj"]),
            r"up_proj` is scaled twice",
        ),
        (
            "bert",
            IA3Config(target_modules=["intermediate.dense"], feedforward_modules=["intermediate.dense"]),
            "AdapterHub's scales what a Linear gives",
        ),
    ],
)
def test_modules_that_the_config_cannot_say_are_refused(
    model: str, config: Any, what: str, bases: Path, tmp_path: Path
) -> None:
    get_peft_model(_random_model(model), config).save_pretrained(tmp_path / "source")
    with pytest.raises(OpError, match=f".*{what}"):
        _convert(tmp_path / "source", tmp_path / "out", bases / model)


def test_a_prompt_is_refused(bases: Path, tmp_path: Path) -> None:
    config = PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
    get_peft_model(_random_model("llama"), config).save_pretrained(tmp_path / "source")
    with pytest.raises(OpError, match=r"PROMPT_TUNING cannot be converted: .* positions"):
        _convert(tmp_path / "source", tmp_path / "out", bases / "llama")


def test_another_base_is_refused(bases: Path, peft_adapters: Path, tmp_path: Path) -> None:
    with pytest.raises(OpError, match="which the adapters library never does in `bert`"):
        _convert(peft_adapters / "llama-qv", tmp_path / "out", bases / "bert")
    fewer = tmp_path / "fewer"
    getattr(transformers, "LlamaForCausalLM")(  # noqa: B009
        transformers.AutoConfig.for_model("llama", **{**MODELS["llama"][1], "num_hidden_layers": 2})
    ).save_pretrained(fewer)
    with pytest.raises(OpError, match="layer 2 is adapted, but the base has 2 layers"):
        _convert(peft_adapters / "llama-qv", tmp_path / "out", fewer)


@pytest.mark.parametrize(
    ("config", "what"),
    [
        ({"use_gating": True}, "`use_gating: True`"),
        ({"use_dora": True}, "`use_dora: True`"),
        ({"vera_d": 0.1}, "`vera_d: 0.1`"),
        ({"architecture": None}, "PEFT has no bottleneck adapters"),
        ({"architecture": "prefix_tuning"}, "PEFT counts its virtual tokens as positions"),
        ({"config": "lora"}, "has no `config`"),
        ({"model_type": "albert"}, "where the adapters library places LoRA in `albert` is not known"),
        ({"peft_type": "LORA"}, "it is a PEFT adapter already"),
        ({"tensors": {"heads.made.0.weight": torch.zeros(2)}}, "is no tensor of an AdapterHub LoRA"),
        ({"tensors": {"model.layers.0.self_attn.q_proj.loras.b.lora_A": torch.zeros(4, 32)}}, "has no `B`|2 adapters"),
    ],
)
def test_what_peft_cannot_say_is_refused(config: dict[str, Any], what: str, hub_adapters: Path, tmp_path: Path) -> None:
    source = _edited(hub_adapters / "llama-qv", tmp_path / "source", **config)
    with pytest.raises(OpError, match=f".*({what})"):
        _convert(source, tmp_path / "out")


@pytest.mark.parametrize(
    ("shape", "what"), [((), "neither .out, 1. nor"), ((32,), "neither .out, 1. nor"), ((2, 2), "neither .out, 1. nor")]
)
def test_shapes_that_are_no_scale_are_refused(
    shape: tuple[int, ...], what: str, bases: Path, peft_adapters: Path, tmp_path: Path
) -> None:
    tensors = {"base_model.model.bert.encoder.layer.0.attention.self.key.ia3_l": torch.zeros(shape)}
    source = _edited(peft_adapters / "bert-ia3", tmp_path / "source", tensors)
    with pytest.raises(OpError, match=what):
        _convert(source, tmp_path / "out", bases / "bert")


@pytest.mark.parametrize("shape", [(), (4,), (3, 32)])
def test_shapes_that_are_not_of_the_rank_are_refused(
    shape: tuple[int, ...], hub_adapters: Path, tmp_path: Path
) -> None:
    tensors = {"model.layers.0.self_attn.q_proj.loras.adapter.lora_A": torch.zeros(shape)}
    source = _edited(hub_adapters / "llama-qv", tmp_path / "source", tensors)
    with pytest.raises(OpError, match=r"lora_A` is f32.*, but adapter_config.json says `r: 4`"):
        _convert(source, tmp_path / "out")


def test_thirds_that_the_config_does_not_name_are_refused(hub_adapters: Path, tmp_path: Path) -> None:
    source = _edited(hub_adapters / "gpt2-fused", tmp_path / "source", attn_matrices=["q"])
    with pytest.raises(OpError, match=r"lora_A` is f32\[12, 32\], but"):
        _convert(source, tmp_path / "out")


def test_dtypes_are_kept(bases: Path, peft_adapters: Path, tmp_path: Path) -> None:
    halves = {name: tensor.bfloat16() for name, tensor in models.read(peft_adapters / "bert-qv").items()}
    source = _edited(peft_adapters / "bert-qv", tmp_path / "source", halves)
    there = _convert(source, tmp_path / "there", bases / "bert")
    back = models.read(_convert(there, tmp_path / "back"))
    assert all(models.same_bytes(halves[name], back[name]) for name in halves)


def test_a_model_is_no_adapter(bases: Path, tmp_path: Path) -> None:
    with pytest.raises(OpError, match="the source is no adapter"):
        _convert(bases / "bert", tmp_path / "out")


def test_a_scaled_ia3_is_refused(hub_adapters: Path, tmp_path: Path) -> None:
    source = _edited(hub_adapters / "bert-ia3", tmp_path / "source", alpha=2)
    with pytest.raises(OpError, match="scales by alpha 2 too"):
        _convert(source, tmp_path / "out")


@pytest.mark.parametrize(
    ("edit", "what"),
    [
        ({"to": "adapterhub"}, "needs `base`"),
        ({"to": "peft", "base": "base"}, "reads no `base`"),
        ({"to": "adapterhub", "base": "base", "name": "train"}, "cannot be called `train`"),
        ({"to": "adapterhub", "base": "base", "name": "a.b"}, "name"),
    ],
)
def test_options_that_do_not_fit_are_refused(edit: dict[str, Any], what: str, bases: Path) -> None:
    spec = {"version": 1, "source": str(bases), "edits": [{"op": "adapter.convert", **edit}]}
    with pytest.raises(SpecError, match=what):
        surgery.plan({**spec, "models": {"base": str(bases / "llama")}})


def test_the_names_that_torch_keeps_for_itself_are_known() -> None:
    assert {name for name in dir(nn.ModuleDict()) if not name.startswith("_")} <= RESERVED
