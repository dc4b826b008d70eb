"""`layers.select`: what transformers loads computes what a model does whose layers were edited in memory."""

import json
import subprocess
from collections.abc import Callable, Sequence
from copy import deepcopy
from pathlib import Path
from typing import Any

import models
import pytest
import torch
import yaml
from conftest import Convert
from torch import Tensor, nn
from transformers import AutoModel, AutoModelForCausalLM, AutoModelForMaskedLM, AutoModelForSeq2SeqLM, PreTrainedModel

import surgery
from surgery.checkpoint.layer_config import config_for

IDS = torch.tensor([[3, 1, 4, 1, 5, 9, 2, 6]])
LAYERS = 4


def select(**fields: Any) -> dict[str, Any]:
    return {"op": "layers.select", **fields}


def config_of(checkpoint: Path) -> dict[str, Any]:
    return json.loads((checkpoint / "config.json").read_bytes())


def loaded(auto: Any, path: Path) -> PreTrainedModel:
    """The model in float32, with nothing missing and nothing left over."""
    model, info = auto.from_pretrained(path, dtype=torch.float32, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    return model.eval()


@torch.no_grad()
def outputs(model: PreTrainedModel, **inputs: Tensor) -> list[Tensor]:
    result = model(input_ids=IDS, output_hidden_states=True, use_cache=False, **inputs)
    states = [*(result.get("encoder_hidden_states") or ()), *(result.get("decoder_hidden_states") or ())]
    return [result.logits, *states, *(result.get("hidden_states") or ())]


def assert_same(ours: PreTrainedModel, edited: PreTrainedModel, **inputs: Tensor) -> None:
    expected = outputs(edited, **inputs)
    given = outputs(ours, **inputs)
    assert len(given) == len(expected)
    for a, b in zip(given, expected, strict=True):
        assert torch.equal(a, b)


def edit(model: PreTrainedModel, path: str, layers: Sequence[tuple[PreTrainedModel, int]], *counts: str) -> None:
    """Put copies of `layers` in the place of the stack at `path`, and count them in the config."""
    parent, _, name = path.rpartition(".")
    chosen = [deepcopy(other.get_submodule(f"{path}.{index}")) for other, index in layers]
    types = [other.config.layer_types[index] for other, index in layers if getattr(other.config, "layer_types", None)]
    if types:
        model.config.layer_types = types
    setattr(model.get_submodule(parent), name, nn.ModuleList(chosen))
    for count in counts:
        setattr(model.config, count, len(chosen))


def donor(make: Callable[..., Path], path: Path, **options: Any) -> Path:
    """Another model of the same architecture: its weights are those of the first, permuted."""
    made = make(path, **options)
    file = made / "model.safetensors"
    tensors = {name: tensor.flip(0).contiguous() for name, tensor in models.read(made).items()}
    models.handwritten(file, tensors)
    file.write_bytes(file.read_bytes())
    return made


# What loads computes what a model edited in memory does


CASES = {
    "llama": (models.llama, AutoModelForCausalLM, "model.layers", "num_hidden_layers"),
    "qwen2": (models.qwen2, AutoModelForCausalLM, "model.layers", "num_hidden_layers"),
    "gpt2": (models.gpt2, AutoModelForCausalLM, "transformer.h", "n_layer"),
    "bert": (models.bert, AutoModelForMaskedLM, "bert.encoder.layer", "num_hidden_layers"),
    "mixtral": (models.mixtral, AutoModelForCausalLM, "model.layers", "num_hidden_layers"),
}
SELECTIONS = {
    "keep": (select(keep=[[0, 2], -1]), [0, 1, 3]),
    "drop": (select(drop=[[2, 4]]), [0, 1]),
    "repeat": (select(slices=[{"layers": [0, 3]}, {"layers": [1, 4]}]), [0, 1, 2, 1, 2, 3]),
}


@pytest.mark.parametrize("selection", SELECTIONS)
@pytest.mark.parametrize("name", CASES)
def test_selected_layers_compute_what_they_did(name: str, selection: str, convert: Convert, tmp_path: Path) -> None:
    make, auto, path, count = CASES[name]
    source = make(tmp_path / "source", **{count if name == "gpt2" else "num_hidden_layers": LAYERS})
    op, layers = SELECTIONS[selection]
    out = convert(source, [op])
    assert config_of(out)[count] == len(layers)
    edited = loaded(auto, source)
    edit(edited, path, [(edited, index) for index in layers], count)
    assert_same(loaded(auto, out), edited)


def test_two_models_interleave(convert: Convert, tmp_path: Path) -> None:
    source, other = models.llama(tmp_path / "a", num_hidden_layers=3), donor(models.llama, tmp_path / "b")
    slices = [{"layers": [0, 2]}, {"model": "b", "layers": [0, 2]}, {"model": "source", "layers": [1, 3]}]
    out = tmp_path / "out"
    surgery.apply(surgery.plan(spec(source, {"b": other}, select(slices=slices))), out)
    edited, b = loaded(AutoModelForCausalLM, source), loaded(AutoModelForCausalLM, other)
    layers = [(edited, 0), (edited, 1), (b, 0), (b, 1), (edited, 1), (edited, 2)]
    edit(edited, "model.layers", layers, "num_hidden_layers")
    assert_same(loaded(AutoModelForCausalLM, out), edited)


def spec(source: Path, others: dict[str, Path], *edits: dict[str, Any]) -> dict[str, Any]:
    named = {name: str(path) for name, path in others.items()}
    return {"version": 1, "source": str(source), "models": named, "edits": list(edits)}


@pytest.mark.parametrize(("stack", "counts"), [("encoder.block", (2, 3)), ("decoder.block", (3, 2))])
def test_t5_keeps_its_position_bias_in_the_first_layer(
    stack: str, counts: tuple[int, int], convert: Convert, tmp_path: Path
) -> None:
    source = models.t5(tmp_path / "source", num_layers=3, num_decoder_layers=3)
    out = convert(source, [select(drop=[0], stack=stack)])
    assert (config_of(out)["num_layers"], config_of(out)["num_decoder_layers"]) == counts
    edited = loaded(AutoModelForSeq2SeqLM, source)
    first = edited.get_submodule(f"{stack}.0.layer.0.SelfAttention")
    edit(edited, stack, [(edited, 1), (edited, 2)], "num_layers" if "encoder" in stack else "num_decoder_layers")
    new = edited.get_submodule(f"{stack}.0.layer.0.SelfAttention")
    new.relative_attention_bias, new.has_relative_attention_bias = first.relative_attention_bias, True
    assert_same(loaded(AutoModelForSeq2SeqLM, out), edited, decoder_input_ids=IDS[:, :5])


def test_a_config_that_leaves_the_decoder_to_the_encoder_is_made_to_say_both(convert: Convert, tmp_path: Path) -> None:
    source = models.t5(tmp_path / "source", num_layers=2)
    config = {key: value for key, value in config_of(source).items() if key != "num_decoder_layers"}
    (source / "config.json").write_text(json.dumps(config))
    out = convert(source, [select(keep=[0], stack="encoder.block")])
    assert (config_of(out)["num_layers"], config_of(out)["num_decoder_layers"]) == (1, 2)
    loaded(AutoModelForSeq2SeqLM, out)


def test_sliding_windows_stay_with_their_layers(convert: Convert, tmp_path: Path) -> None:
    windows: dict[str, Any] = {"use_sliding_window": True, "sliding_window": 3, "max_window_layers": 2}
    source = models.qwen2(tmp_path / "source", num_hidden_layers=LAYERS, **windows)
    assert config_of(source)["layer_types"] == ["full_attention"] * 2 + ["sliding_attention"] * 2
    out = convert(source, [select(keep=[0, 3])])
    assert config_of(out)["layer_types"] == ["full_attention", "sliding_attention"]
    assert config_of(out)["max_window_layers"] == 2
    edited = loaded(AutoModelForCausalLM, source)
    edit(edited, "model.layers", [(edited, 0), (edited, 3)], "num_hidden_layers")
    assert_same(loaded(AutoModelForCausalLM, out), edited)


def test_two_selections_follow_each_other(convert: Convert, tmp_path: Path) -> None:
    source = models.llama(tmp_path / "source", num_hidden_layers=LAYERS)
    out = convert(source, [select(drop=[0]), select(drop=[0])])
    assert config_of(out)["num_hidden_layers"] == 2
    edited = loaded(AutoModelForCausalLM, source)
    edit(edited, "model.layers", [(edited, 2), (edited, 3)], "num_hidden_layers")
    assert_same(loaded(AutoModelForCausalLM, out), edited)


def test_the_skipped_modules_of_a_4_bit_model_follow_its_layers(convert: Convert, tmp_path: Path) -> None:
    source = models.llama(tmp_path / "source", num_hidden_layers=3)
    nf4 = {"op": "quantize.nf4", "modules": r"model\.layers\.[02]\.mlp\.\w+_proj"}
    both = convert(source, [nf4, select(drop=[0])])
    after = convert(convert(source, [nf4]), [select(drop=[0])])
    for out in (both, after):
        skipped = config_of(out)["quantization_config"]["llm_int8_skip_modules"]
        assert "model.layers.0.mlp.up_proj" in skipped and "model.layers.1.mlp.up_proj" not in skipped
    assert models.read(both).keys() == models.read(after).keys()


# The words of config.json


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ({"mlp_only_layers": [0, 3]}, {"mlp_only_layers": [2]}),
        ({"no_rope_layers": [1, 1, 1, 0]}, {"no_rope_layers": [1, 1, 0]}),
        ({"num_key_value_heads": [1, 2, 3, 4]}, {"num_key_value_heads": [2, 3, 4]}),
        ({"layer_rope_theta": [1, 2, 3, 4]}, {"layer_rope_theta": [2, 3, 4]}),
        ({"hybrid_override_pattern": "M-*E"}, {"hybrid_override_pattern": "-*E"}),
        ({"attention_types": [[["global", "local"], 2]]}, {"attention_types": [[["local", "global", "local"], 1]]}),
        ({"first_k_dense_replace": 2}, {"first_k_dense_replace": 1}),
        ({"max_window_layers": 28}, {"max_window_layers": 3}),
        ({"vision_feature_layer": [0, 1, 2, 3]}, {"vision_feature_layer": [0, 1, 2, 3]}),
        (
            {"quantization_config": {"ignore": ["h.0.mlp", "h.1.mlp", "h.3", "lm_head"]}},
            {"quantization_config": {"ignore": ["h.0.mlp", "h.2", "lm_head"]}},
        ),
    ],
)
def test_what_the_config_says_of_single_layers_follows_them(before: dict[str, Any], after: dict[str, Any]) -> None:
    layers = [("source", index) for index in (1, 2, 3)]
    assert config_for({"n_layer": 4, **before}, "h", layers, {}) == {"n_layer": 3, **after}
    nested = {"vision_config": {"depth": 4}, "text_config": {"n_layer": 4, **before}}
    if "quantization_config" not in before:
        expected = {"vision_config": {"depth": 4}, "text_config": {"n_layer": 3, **after}}
        assert config_for(nested, "model.language_model.h", layers, {}) == expected


@pytest.mark.parametrize(
    "said",
    [
        {"sliding_window_pattern": 2},
        {"model_type": "gemma2"},
        {"attn_layer_period": 4, "attn_layer_offset": 1},
        {"block_types": ["recurrent", "attention"]},
        {"quantization_config": {"ignore": ["re:.*layers.1.mlp"]}},
    ],
)
def test_a_config_that_cannot_say_the_new_layers_is_refused(said: dict[str, Any]) -> None:
    config = {"num_hidden_layers": 4, **said}
    with pytest.raises(ValueError, match=r"what each layer is|cannot be followed"):
        config_for(config, "layers", [("source", index) for index in (1, 2, 3)], {})
    if "quantization_config" not in said:
        assert config_for(config, "layers", [("source", index) for index in (0, 1, 2)], {})["num_hidden_layers"] == 3


def test_a_threshold_that_would_be_torn_is_refused() -> None:
    config = {"num_hidden_layers": 3, "first_k_dense_replace": 1}
    with pytest.raises(ValueError, match="the new layer 1"):
        config_for(config, "layers", [("source", 1), ("source", 0)], {})


# Refusals


def refusal(source: Path, others: dict[str, Path] | None = None, **fields: Any) -> str:
    with pytest.raises(surgery.SurgeryError) as caught:
        surgery.plan(spec(source, others or {}, select(**fields)))
    return str(caught.value)


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({}, "one of `keep`, `drop` and `slices` is missing"),
        ({"keep": [0], "drop": [1]}, "`keep` and `drop` exclude each other"),
        ({"keep": [2]}, "there is no layer 2: the source has 2, 0 to 1"),
        ({"drop": [[0, 2]]}, "no layer is left"),
        ({"keep": [1, 0]}, "layer 0 does not come after layer 1"),
        ({"keep": [[1, 1]]}, "[1, 1] is no range"),
        ({"slices": [{"layers": [1, 3]}]}, "there is no layer 2: `source` has 2, 0 to 1"),
        ({"keep": [0], "stack": "model.layer"}, "there are no layers at `model.layer`"),
        ({"slices": [{"layers": [0, 1], "scale": {"o_proj": 0}}]}, "`o_proj` of `scale` matches no tensor"),
        ({"slices": [{"layers": [0, 1], "scale": {"(": 0}}]}, "`(` is no regex"),
        ({"slices": [{"layers": [0, 1], "model": "b"}]}, "there is no model `b`"),
    ],
)
def test_a_selection_that_does_not_hold_is_refused(fields: dict[str, Any], words: str, tmp_path: Path) -> None:
    assert words in refusal(models.llama(tmp_path / "source"), **fields)


def test_a_model_with_two_stacks_wants_to_be_told_which(tmp_path: Path) -> None:
    text = refusal(models.t5(tmp_path / "source"), keep=[0])
    assert (
        "more than one stack" in text and "`encoder.block` (1 layers)" in text and "`decoder.block` (1 layers)" in text
    )


def test_layers_that_share_their_weights_are_refused(tmp_path: Path) -> None:
    assert "'albert'" in refusal(models.of_type("albert", tmp_path / "source"), keep=[0])


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"intermediate_size": 160}, "`mlp.down_proj.weight` is bf16[128, 160], the source's bf16[128, 192]"),
        ({"dtype": torch.float32}, "`input_layernorm.weight` is f32[128], the source's bf16[128]"),
        ({"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 64}, "says num_attention_heads: 2"),
    ],
)
def test_layers_of_another_kind_are_refused(options: dict[str, Any], words: str, tmp_path: Path) -> None:
    source, other = models.llama(tmp_path / "a"), models.llama(tmp_path / "b", **options)
    assert words in refusal(source, {"b": other}, slices=[{"model": "b", "layers": [0, 2]}])


def test_layers_with_other_tensors_are_refused(tmp_path: Path) -> None:
    source, other = models.llama(tmp_path / "a"), models.qwen2(tmp_path / "b", tie=False)
    text = refusal(source, {"b": other}, slices=[{"model": "b", "layers": [0, 2]}])
    assert "layer 0 of `b` is unlike every layer of the source: the source has no `self_attn.k_proj.bias`" in text


def test_an_adapter_has_no_layers(tmp_path: Path) -> None:
    source, adapter = models.llama(tmp_path / "a"), tmp_path / "adapter"
    models.handwritten(adapter / "adapter_model.safetensors", {"base_model.model.x.lora_A.weight": torch.ones(2, 2)})
    (adapter / "adapter_config.json").write_text('{"peft_type": "LORA"}')
    text = refusal(source, {"b": adapter}, slices=[{"model": "b", "layers": [0, 1]}])
    assert "`b` is an adapter: it has no layers of its own" in text


# Bytes of mergekit


def mergekit(tmp_path: Path, config: dict[str, Any]) -> dict[str, Tensor]:
    try:
        from peers import mergekit_python
    except ImportError:
        pytest.skip("no mergekit at hand")
    python = mergekit_python()
    if python is None:
        pytest.skip("no mergekit at hand: SURGERY_MERGEKIT_PYTHON names its interpreter")
    file, out = tmp_path / "mergekit.yaml", tmp_path / "theirs"
    file.write_text(yaml.safe_dump(config))
    command = [str(Path(python).parent / "mergekit-yaml"), str(file), str(out), "--no-copy-tokenizer"]
    subprocess.run(command, check=True, capture_output=True)
    return models.read(out)


def test_a_frankenmerge_has_the_bytes_of_mergekit(tmp_path: Path) -> None:
    a, b = models.llama(tmp_path / "a", num_hidden_layers=3), donor(models.llama, tmp_path / "b", num_hidden_layers=3)
    scale = {"scale": [{"filter": "o_proj", "value": 0.3}, {"filter": "down_proj", "value": 0.0}, {"value": 1.0}]}
    sources = [
        {"model": str(a), "layer_range": [0, 2]},
        {"model": str(b), "layer_range": [0, 2], "parameters": scale},
        {"model": str(a), "layer_range": [1, 3]},
        {"model": str(b), "layer_range": [2, 3]},
    ]
    theirs = mergekit(tmp_path, {"merge_method": "passthrough", "slices": [{"sources": [item]} for item in sources]})
    slices = [
        {"layers": [0, 2]},
        {"model": "b", "layers": [0, 2], "scale": {r".*o_proj\.weight": 0.3, r".*down_proj\.weight": 0}},
        {"layers": [1, 3]},
        {"model": "b", "layers": [2, 3]},
    ]
    surgery.apply(surgery.plan(spec(a, {"b": b}, select(slices=slices, head="b"))), tmp_path / "ours")
    ours = models.read(tmp_path / "ours")
    assert sorted(ours) == sorted(theirs)
    for name, tensor in theirs.items():
        assert models.same_bytes(ours[name], tensor), name


def test_a_lone_file_without_a_config_is_enough(convert: Convert, tmp_path: Path) -> None:
    tensors = {f"layers.{index}.w": torch.full((2,), float(index)) for index in range(3)}
    source = models.handwritten(tmp_path / "source.safetensors", {**tensors, "head.0.w": torch.ones(1)})
    after = models.read(convert(source, [select(drop=[1])]))
    assert {name: tensor.tolist() for name, tensor in after.items()} == {
        "layers.0.w": [0.0, 0.0], "layers.1.w": [2.0, 2.0], "head.0.w": [1.0],
    }  # fmt: skip


def test_a_base_model_without_head_is_selected_from_too(convert: Convert, tmp_path: Path) -> None:
    source = models.bert(tmp_path / "source", head=False)
    assert loaded(AutoModel, convert(source, [select(keep=[1])])).config.num_hidden_layers == 1
