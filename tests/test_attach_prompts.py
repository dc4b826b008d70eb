"""Prompts and prefixes that PEFT opens: its bits, counts and configs, and the forwards that the methods publish."""

import json
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import models
import peft
import pytest
import tokenizers
import torch
import transformers
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import DynamicCache

import surgery
from surgery.errors import OpError, SpecError

pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning")  # of PEFT, not ours

F32 = {"dtype": torch.float32}
METHODS = ("prompt_tuning", "prefix_tuning", "p_tuning")
CONFIGS: Mapping[str, type[peft.PromptLearningConfig]] = {
    "prompt_tuning": peft.PromptTuningConfig,
    "prefix_tuning": peft.PrefixTuningConfig,
    "p_tuning": peft.PromptEncoderConfig,
}
TOKENS = [5, 17, 99]


def classifier(path: Path, **kwargs: Any) -> Path:
    config = transformers.BertConfig(
        vocab_size=160, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
        max_position_embeddings=64, num_labels=3,
    )  # fmt: skip
    return models._saved(transformers.BertForSequenceClassification, config, path, torch.float32, None)


def gemma(path: Path, **kwargs: Any) -> Path:
    return models.of_type("gemma3_text", path)


def qwen3(path: Path, **kwargs: Any) -> Path:
    return models.of_type("qwen3", path)


BASES: Mapping[str, tuple[Callable[..., Path], Any, str]] = {
    "llama": (models.llama, transformers.LlamaForCausalLM, "CAUSAL_LM"),
    "qwen2": (models.qwen2, transformers.Qwen2ForCausalLM, "CAUSAL_LM"),
    "gpt2": (models.gpt2, transformers.GPT2LMHeadModel, "CAUSAL_LM"),
    "bert": (classifier, transformers.BertForSequenceClassification, "SEQ_CLS"),
    "t5": (models.t5, transformers.T5ForConditionalGeneration, "SEQ_2_SEQ_LM"),
    "gemma3": (gemma, transformers.Gemma3ForCausalLM, "CAUSAL_LM"),
    "qwen3": (qwen3, transformers.Qwen3ForCausalLM, "CAUSAL_LM"),
}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    made: dict[str, Path] = {}

    def get(name: str) -> Path:
        if name not in made:
            made[name] = BASES[name][0](tmp_path_factory.mktemp(name) / "base", **F32)
        return made[name]

    return get


def attach(source: Path, out: Path, op: str, *before: dict[str, Any], seed: int = 0, **options: Any) -> Path:
    edit = {"op": f"attach.{op}", "name": "soft", **({"num_virtual_tokens": 6} | options)}
    spec = {"version": 1, "source": str(source), "edits": [*before, edit], "seed": seed}
    surgery.apply(surgery.plan(spec), out)
    return out / "adapters/soft"


def refusal(source: Path, op: str, **options: Any) -> str:
    edit = {"op": f"attach.{op}", "name": "soft", **({"num_virtual_tokens": 6} | options)}
    with pytest.raises((OpError, SpecError)) as caught:
        surgery.plan({"version": 1, "source": str(source), "edits": [edit]})
    return str(caught.value)


def live(name: str, path: Path) -> Any:
    return BASES[name][1].from_pretrained(path, dtype=torch.float32).eval()


def opened(name: str, path: Path, adapter: Path) -> Any:
    """As PEFT opens it; a warning is an error."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", ".*is_gradient_checkpointing.*", FutureWarning)
        return PeftModel.from_pretrained(live(name, path), adapter).eval()


def saved_by_peft(name: str, path: Path, out: Path, op: str, *, seed: int = 0, **options: Any) -> Path:
    config = CONFIGS[op](task_type=BASES[name][2], **({"num_virtual_tokens": 6} | options))
    model = live(name, path)
    torch.manual_seed(seed)
    get_peft_model(model, config).save_pretrained(out)
    return out


def tensors(adapter: Path) -> dict[str, Tensor]:
    return load_file(adapter / "adapter_model.safetensors")


def config_of(adapter: Path) -> dict[str, Any]:
    return json.loads((adapter / "adapter_config.json").read_text())


def ids(*shape: int, seed: int = 1) -> Tensor:
    return torch.randint(3, 150, shape, generator=torch.Generator().manual_seed(seed))


OPTIONS: list[tuple[str, dict[str, Any], dict[str, Any]]] = [
    ("prompt_tuning", {}, {}),
    ("prompt_tuning", {"init": "sample_vocab"}, {"prompt_tuning_init": "SAMPLE_VOCAB"}),
    ("prefix_tuning", {}, {}),
    ("prefix_tuning", {"init": "zero"}, {"init_weights": "zero"}),
    ("prefix_tuning", {"reparametrize": "mlp"}, {"prefix_projection": True}),
    (
        "prefix_tuning",
        {"reparametrize": "mlp", "encoder_hidden_size": 24},
        {"prefix_projection": True, "encoder_hidden_size": 24},
    ),
    ("p_tuning", {}, {}),
    ("p_tuning", {"encoder_hidden_size": 40}, {"encoder_hidden_size": 40}),
    ("p_tuning", {"encoder": "lstm"}, {"encoder_reparameterization_type": "LSTM"}),
    (
        "p_tuning",
        {"encoder": "lstm", "encoder_num_layers": 1, "encoder_hidden_size": 24},
        {"encoder_reparameterization_type": "LSTM", "encoder_num_layers": 1, "encoder_hidden_size": 24},
    ),
]


@pytest.mark.parametrize("name", ["llama", "qwen2", "gpt2", "bert", "t5", "gemma3", "qwen3"])
@pytest.mark.parametrize(("op", "options", "theirs"), OPTIONS)
def test_a_prompt_has_the_bits_and_the_config_that_peft_saves_with_the_same_seed(
    base: Callable[[str], Path], tmp_path: Path, name: str, op: str, options: dict[str, Any], theirs: dict[str, Any]
) -> None:
    source = base(name)
    ours = attach(source, tmp_path / "ours", op, seed=7, **options)
    expected = saved_by_peft(name, source, tmp_path / "theirs", op, seed=7, **theirs)
    a, b = tensors(ours), tensors(expected)
    assert a.keys() == b.keys()
    assert all(models.same_bytes(a[key], b[key].to(a[key].dtype)) for key in a)
    assert a["prompt_embeddings"].dtype == torch.float32
    left_out = {"base_model_name_or_path", "peft_version", "auto_mapping", "inference_mode"}
    expected_config = {key: value for key, value in config_of(expected).items() if key not in left_out}
    heads = expected_config["modules_to_save"]
    expected_config["modules_to_save"] = list(dict.fromkeys(heads)) if heads else None  # PEFT writes them twice
    assert {key: value for key, value in config_of(ours).items() if key not in left_out} == expected_config


@pytest.mark.parametrize("op", METHODS)
@pytest.mark.parametrize("name", ["llama", "qwen2", "gpt2", "bert", "t5"])
def test_peft_opens_a_prompt_without_a_warning_and_it_changes_what_the_model_says(
    base: Callable[[str], Path], tmp_path: Path, op: str, name: str
) -> None:
    adapter = attach(base(name), tmp_path / "out", op)
    model = opened(name, base(name), adapter)
    weight = model.prompt_encoder["default"].embedding.weight
    assert models.same_bytes(weight.detach(), tensors(adapter)["prompt_embeddings"])
    given = {"input_ids": ids(2, 7), "attention_mask": torch.ones(2, 7)}
    given |= {"decoder_input_ids": ids(2, 4)} if name == "t5" else {}
    with torch.no_grad():
        changed, plain = model(**given).logits, live(name, base(name))(**given).logits
    assert changed.isfinite().all()
    assert (changed[..., -1, :] - plain[..., -1, :]).abs().max() > 1e-3


@pytest.mark.parametrize("name", ["llama", "qwen2", "gpt2", "gemma3"])
def test_a_prompt_of_tokens_computes_what_these_tokens_before_the_input_do(
    base: Callable[[str], Path], tmp_path: Path, name: str
) -> None:
    adapter = attach(base(name), tmp_path / "out", "prompt_tuning", init_tokens=TOKENS, num_virtual_tokens=5)
    model = opened(name, base(name), adapter)
    given = ids(2, 7)
    tiled = torch.tensor([*TOKENS, *TOKENS[:2]]).expand(2, -1)
    with torch.no_grad():
        expected = live(name, base(name))(torch.cat([tiled, given], 1)).logits
        assert torch.allclose(model(given, attention_mask=torch.ones(2, 7)).logits, expected, atol=1e-5)


def test_a_prompt_of_tokens_stands_before_the_encoders_input(base: Callable[[str], Path], tmp_path: Path) -> None:
    adapter = attach(base("t5"), tmp_path / "out", "prompt_tuning", init_tokens=TOKENS, num_virtual_tokens=3)
    assert tensors(adapter)["prompt_embeddings"].shape == (6, 64)
    model = opened("t5", base("t5"), adapter)
    given, decoded = ids(2, 7), ids(2, 4)
    with torch.no_grad():
        expected = live("t5", base("t5"))(
            input_ids=torch.cat([torch.tensor(TOKENS).expand(2, -1), given], 1), decoder_input_ids=decoded
        )
        found = model(input_ids=given, attention_mask=torch.ones(2, 7), decoder_input_ids=decoded)
    assert torch.allclose(found.logits, expected.logits, atol=1e-5)


@pytest.mark.parametrize("name", ["llama", "qwen2", "gpt2", "qwen3"])
def test_a_prefix_is_what_the_model_computes_with_these_past_keys_and_values(
    base: Callable[[str], Path], tmp_path: Path, name: str
) -> None:
    adapter = attach(base(name), tmp_path / "out", "prefix_tuning", num_virtual_tokens=4)
    model, plain = opened(name, base(name), adapter), live(name, base(name))
    config = config_of(adapter)
    layers, heads = config["num_layers"], config["num_attention_heads"]
    prefix = tensors(adapter)["prompt_embeddings"].view(4, layers, 2, heads, config["token_dim"] // heads)
    cache = DynamicCache()
    for layer in range(layers):
        key, value = prefix[:, layer].permute(1, 2, 0, 3).unsqueeze(1).expand(2, 2, heads, 4, -1)
        cache.update(key, value, layer)
    given = {"input_ids": ids(2, 7)}
    with torch.no_grad():
        expected = plain(**given, attention_mask=torch.ones(2, 11), past_key_values=cache).logits
        found = model(**given, attention_mask=torch.ones(2, 7)).logits
    assert torch.allclose(found, expected, atol=1e-5)


@pytest.mark.parametrize(
    ("op", "name"), [*((op, "qwen2") for op in METHODS), ("prefix_tuning", "t5"), ("prompt_tuning", "bert")]
)
def test_a_step_of_training_lowers_the_loss_and_changes_the_adapter_alone(
    base: Callable[[str], Path], tmp_path: Path, op: str, name: str
) -> None:
    adapter = attach(base(name), tmp_path / "out", op)
    model = opened(name, base(name), adapter)
    before = {key: value.clone() for key, value in model.base_model.state_dict().items()}
    prompt = model.prompt_encoder["default"].embedding.weight.requires_grad_()
    given = {"input_ids": ids(2, 7), "attention_mask": torch.ones(2, 7)}
    given["labels"] = torch.tensor([0, 2]) if name == "bert" else ids(2, 7)
    given |= {"decoder_input_ids": ids(2, 7, seed=2)} if name == "t5" else {}
    loss = model(**given).loss
    loss.backward()
    with torch.no_grad():
        prompt -= 0.05 * prompt.grad / prompt.grad.norm()
        assert model(**given).loss < loss
    assert all(torch.equal(value, before[key]) for key, value in model.base_model.state_dict().items())
    trained = tmp_path / "trained"
    model.save_pretrained(trained)
    again, first = tensors(trained), tensors(adapter)
    assert {key for key in first if not torch.equal(first[key], again[key])} == {"prompt_embeddings"}


def test_the_head_of_a_classifier_is_written_with_the_prompt(base: Callable[[str], Path], tmp_path: Path) -> None:
    adapter = attach(base("bert"), tmp_path / "out", "prompt_tuning")
    source = models.read(base("bert"))
    written = tensors(adapter)
    for part in ("weight", "bias"):
        assert models.same_bytes(written[f"base_model.classifier.{part}"], source[f"classifier.{part}"])


def tokenizer_beside(path: Path) -> None:
    """Words and special tokens around them, with a truncation that transformers would not do."""
    vocabulary = {"[UNK]": 0, "[CLS]": 1, "[SEP]": 2, "is": 10, "it": 11, "good": 12, "or": 13, "bad": 14}
    made = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="[UNK]"))
    made.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    made.post_processor = tokenizers.processors.TemplateProcessing("[CLS] $A [SEP]", None, [("[CLS]", 1), ("[SEP]", 2)])
    made.enable_truncation(3)
    made.save(str(path / "tokenizer.json"))
    (path / "tokenizer_config.json").write_text('{"tokenizer_class": "PreTrainedTokenizerFast"}')


@pytest.mark.parametrize("num_virtual_tokens", [4, 6, 15])
def test_a_prompt_of_a_text_is_what_peft_makes_of_it(tmp_path: Path, num_virtual_tokens: int) -> None:
    source = models.llama(tmp_path / "base", **F32, num_hidden_layers=1)
    tokenizer_beside(source)
    text = "is it good or bad"
    size = {"num_virtual_tokens": num_virtual_tokens}
    ours = attach(
        source, tmp_path / "ours", "prompt_tuning", init_text=text, base_model_name_or_path="org/base", **size
    )
    theirs = saved_by_peft(
        "llama", source, tmp_path / "theirs", "prompt_tuning", prompt_tuning_init="TEXT",
        prompt_tuning_init_text=text, tokenizer_name_or_path=str(source), **size,
    )  # fmt: skip
    assert models.same_bytes(tensors(ours)["prompt_embeddings"], tensors(theirs)["prompt_embeddings"])
    config = config_of(ours)
    assert (config["prompt_tuning_init"], config["prompt_tuning_init_text"]) == ("TEXT", text)
    assert config["tokenizer_name_or_path"] == "org/base"
    opened("llama", source, ours)


def test_a_prompt_begins_as_rows_that_a_merge_has_just_made(tmp_path: Path) -> None:
    source = models.llama(tmp_path / "base", num_hidden_layers=1)
    other = models.tuned(tmp_path / "other", source)
    edits = [
        {"op": "merge.linear", "models": {"source": {"weight": 0.5}, "other": {"weight": 0.5}}},
        {"op": "quantize.nf4", "modules": "all-linear"},
        {"op": "attach.prompt_tuning", "name": "soft", "num_virtual_tokens": 4, "init_tokens": TOKENS},
    ]
    out = tmp_path / "out"
    spec = {"version": 1, "source": str(source), "models": {"other": str(other)}, "edits": edits}
    surgery.apply(surgery.plan(spec), out)
    merged = models.read(out)["model.embed_tokens.weight"]
    prompt = tensors(out / "adapters/soft")["prompt_embeddings"]
    assert torch.equal(prompt, merged[[*TOKENS, TOKENS[0]]].float())
    assert not torch.equal(prompt[0], models.read(source)["model.embed_tokens.weight"][TOKENS[0]].float())
    assert config_of(out / "adapters/soft")["base_model_name_or_path"] == "../.."


def test_a_prefix_is_for_the_layers_that_an_edit_before_has_left(tmp_path: Path) -> None:
    source = models.llama(tmp_path / "base", num_hidden_layers=3)
    adapter = attach(source, tmp_path / "out", "prefix_tuning", {"op": "layers.select", "drop": [1]})
    assert config_of(adapter)["num_layers"] == 2
    opened("llama", tmp_path / "out", adapter)


def test_rows_of_a_large_embedding_are_found_across_its_spans(tmp_path: Path) -> None:
    source = models.gpt2(tmp_path / "base", vocab_size=40_000, n_layer=1)
    tokens = [39_999, 0, 16_384, 16_383, 0]
    adapter = attach(source, tmp_path / "out", "prompt_tuning", init_tokens=tokens, num_virtual_tokens=5)
    rows = models.read(source)["transformer.wte.weight"][tokens]
    assert torch.equal(tensors(adapter)["prompt_embeddings"], rows.float())


@pytest.mark.parametrize("model_type", ["falcon", "gpt_bigcode", "mt5", "bart", "gptj", "bloom", "gemma2"])
def test_a_prefix_has_the_heads_that_the_model_keeps(tmp_path: Path, model_type: str) -> None:
    source = models.of_type(model_type, tmp_path / "base")
    adapter = attach(source, tmp_path / "out", "prefix_tuning")
    model = getattr(transformers, models.SIZES[model_type][0]).from_pretrained(source, dtype=torch.float32)
    given = {"input_ids": ids(2, 5), "attention_mask": torch.ones(2, 5)}
    given |= {"decoder_input_ids": ids(2, 4)} if model.config.is_encoder_decoder else {}
    with torch.no_grad():
        plain = model.eval()(**given).logits
        found = PeftModel.from_pretrained(model, adapter).eval()(**given).logits
    assert not torch.allclose(found, plain, atol=1e-3)


@pytest.mark.parametrize("model_type", ["albert", "deberta-v2", "distilbert", "mpnet", "openai-gpt"])
def test_a_model_that_takes_no_prefix_is_refused_by_name(tmp_path: Path, model_type: str) -> None:
    message = refusal(models.of_type(model_type, tmp_path / "base"), "prefix_tuning", task_type="FEATURE_EXTRACTION")
    assert f"a model of the type {model_type} takes no past keys and values" in message
    assert "attach.prompt_tuning" in message


def edited(source: Path, **entries: Any) -> Path:
    config = json.loads((source / "config.json").read_text()) | entries
    kept = {key: value for key, value in config.items() if value is not None}
    (source / "config.json").write_text(json.dumps(kept))
    return source


def test_a_prefix_for_layers_of_unlike_width_is_refused(tmp_path: Path) -> None:
    source = models.llama(tmp_path / "base")
    weights = models.read(source)
    name = "model.layers.1.self_attn.k_proj.weight"
    weights[name] = weights[name][:32].contiguous()
    models.handwritten(source / "model.safetensors", weights)
    message = refusal(source, "prefix_tuning")
    assert "layers of unlike key and value width" in message
    assert "`model.layers.0.self_attn.k_proj` gives 64, `model.layers.1.self_attn.k_proj` 32" in message
    listed = edited(models.llama(tmp_path / "listed"), num_key_value_heads=[2, 4])
    assert "layers of unlike key and value width" in refusal(listed, "prefix_tuning")


def test_a_config_that_contradicts_the_keys_is_refused(tmp_path: Path) -> None:
    source = edited(models.llama(tmp_path / "base"), num_key_value_heads=4)
    assert "keys and values are 128 wide by config.json" in refusal(source, "prefix_tuning")


@pytest.mark.parametrize(
    ("entry", "reason"),
    [
        ({"kv_lora_rank": 16}, "compresses its keys and values"),
        ({"num_kv_shared_layers": 1}, "shares keys and values"),
        ({"layer_types": ["full_attention", "linear_attention"]}, "layers of the type linear_attention"),
    ],
)
def test_layers_that_keep_something_else_are_refused(tmp_path: Path, entry: dict[str, Any], reason: str) -> None:
    assert reason in refusal(edited(models.llama(tmp_path / "base"), **entry), "prefix_tuning")


@pytest.mark.parametrize("op", METHODS)
def test_sizes_that_nothing_says_are_asked_for(tmp_path: Path, op: str) -> None:
    nobody = edited(models.llama(tmp_path / "heads"), num_attention_heads=None, num_key_value_heads=None)
    assert "how many heads there are" in refusal(nobody, op)
    weights = {"proj.weight": torch.zeros(4, 4)}
    source = models.handwritten(tmp_path / "lone" / "model.safetensors", weights).parent
    (source / "config.json").write_text(json.dumps({"num_attention_heads": 4}))
    message = refusal(source, op, task_type="CAUSAL_LM")
    assert "the width of a" in message
    assert "none of hidden_size, n_embd" in message or "none of head_dim, hidden_size" in message


@pytest.mark.parametrize("op", METHODS)
def test_a_task_that_cannot_be_known_is_asked_for(tmp_path: Path, op: str) -> None:
    source = models.bert(tmp_path / "base")
    message = refusal(source, op)
    assert "config.json names the class ['BertForMaskedLM']" in message
    assert "say it by `task_type`" in message
    assert surgery.plan(
        {
            "version": 1,
            "source": str(source),
            "edits": [
                {"op": f"attach.{op}", "name": "soft", "num_virtual_tokens": 6, "task_type": "FEATURE_EXTRACTION"}
            ],
        }
    )


def test_a_classifier_without_its_head_is_refused(tmp_path: Path) -> None:
    assert "the checkpoint has none" in refusal(models.llama(tmp_path / "base"), "prompt_tuning", task_type="SEQ_CLS")


def test_what_a_prompt_cannot_begin_as_is_said(tmp_path: Path) -> None:
    source = models.llama(tmp_path / "base")
    message = refusal(source, "prompt_tuning", init_tokens=[3, 160])
    assert "`model.embed_tokens` has 160 tokens, and none with the id 160" in message
    assert "needs a tokenizer.json" in refusal(source, "prompt_tuning", init_text="is it good")
    assert "exclude each other" in refusal(source, "prompt_tuning", init_text="is it good", init_tokens=[1])
    (source / "tokenizer.json").write_text("{}")
    assert "tokenizer.json cannot be used" in refusal(source, "prompt_tuning", init_text="is it good")


def test_a_text_without_the_package_that_reads_it_names_the_extra(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = models.llama(tmp_path / "base")
    tokenizer_beside(source)
    monkeypatch.setitem(__import__("sys").modules, "tokenizers", None)
    message = refusal(source, "prompt_tuning", init_text="is it good")
    assert "needs the package `tokenizers`" in message
    assert "model-surgery[text]" in message


@pytest.mark.parametrize("op", METHODS)
def test_options_out_of_place_are_refused(tmp_path: Path, op: str) -> None:
    source = models.llama(tmp_path / "base")
    assert "num_virtual_tokens" in refusal(source, op, num_virtual_tokens=0)
    stray = {
        "prompt_tuning": {"init": "sample_vocab", "init_tokens": [1]},
        "prefix_tuning": {"encoder_hidden_size": 8},
        "p_tuning": {"encoder_dropout": 0.1},
    }
    assert any(word in refusal(source, op, **stray[op]) for word in ("exclude", "say `"))


def test_a_model_that_peft_would_feed_another_scale_gets_no_prompt(tmp_path: Path) -> None:
    config = transformers.AutoConfig.for_model("marian", **models.SEQ2SEQ, scale_embedding=True)
    source = models._saved(transformers.MarianMTModel, config, tmp_path / "base", torch.float32, None)
    for op in ("prompt_tuning", "p_tuning"):
        assert "a marian scales embeddings" in refusal(source, op)
    assert attach(source, tmp_path / "out", "prefix_tuning")


def test_a_scaled_embedding_of_bart_scales_the_prompt(tmp_path: Path) -> None:
    config = transformers.AutoConfig.for_model("bart", **models.SEQ2SEQ, scale_embedding=True)
    model_class = transformers.BartForConditionalGeneration
    source = models._saved(model_class, config, tmp_path / "base", torch.bfloat16, None)
    adapter = attach(source, tmp_path / "out", "prompt_tuning", init_tokens=TOKENS, num_virtual_tokens=3)
    embedding = model_class.from_pretrained(source, dtype=torch.bfloat16).get_input_embeddings()
    assert isinstance(embedding, nn.Module)
    with torch.no_grad():
        expected = embedding(torch.tensor(TOKENS)).float()
    assert torch.equal(tensors(adapter)["prompt_embeddings"][:3], expected)


PUBLISHED = [
    ("bloomz-560m", {"model_type": "bloom", "n_embed": 1024, "n_layer": 24, "num_attention_heads": 16,
     "vocab_size": 64, "architectures": ["BloomForCausalLM"]}, "prompt_tuning", 8, 8_192),
    ("bloomz-560m", {"model_type": "bloom", "n_embed": 1024, "n_layer": 24, "num_attention_heads": 16,
     "vocab_size": 64, "architectures": ["BloomForCausalLM"]}, "prefix_tuning", 20, 983_040),
    ("gpt2-large", {"model_type": "gpt2", "n_embd": 1280, "n_layer": 36, "n_head": 20, "n_positions": 1024,
     "vocab_size": 64, "architectures": ["GPT2LMHeadModel"]}, "prefix_tuning", 20, 1_843_200),
]  # fmt: skip


@pytest.mark.parametrize(("name", "config", "op", "num_virtual_tokens", "published"), PUBLISHED)
def test_as_many_parameters_as_published(
    tmp_path: Path, name: str, config: dict[str, Any], op: str, num_virtual_tokens: int, published: int
) -> None:
    (tmp_path / "config.json").write_text(json.dumps(config))
    edit = {"op": f"attach.{op}", "name": "soft", "num_virtual_tokens": num_virtual_tokens}
    plan = surgery.plan({"version": 1, "source": str(tmp_path), "edits": [edit]}, config_only=True)
    assert [tensor.node.type.num_elements for tensor in plan.tensors] == [published]
