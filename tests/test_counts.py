"""Published parameter counts, from the published configs alone; and what is counted, held to PEFT."""

import json
import re
from pathlib import Path
from typing import Any

import jsonschema
import peft
import pytest
import torch
import transformers
from click.testing import CliRunner
from safetensors.torch import save_file

import surgery
from surgery.cli import main
from surgery.errors import CheckpointError, OutputError
from surgery.op import op_names

SCHEMAS = Path(__file__).parents[1] / "schemas"

LLAMA_2_7B = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 4096, "intermediate_size": 11008,
    "num_attention_heads": 32, "num_key_value_heads": 32, "num_hidden_layers": 32, "vocab_size": 32000,
    "max_position_embeddings": 4096, "tie_word_embeddings": False, "torch_dtype": "float16",
}  # fmt: skip
LLAMA_3_8B = {
    **LLAMA_2_7B, "intermediate_size": 14336, "num_key_value_heads": 8, "vocab_size": 128256, "torch_dtype": "bfloat16",
}  # fmt: skip
QWEN_2_5_3B = {
    "architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2", "hidden_size": 2048, "intermediate_size": 11008,
    "num_attention_heads": 16, "num_key_value_heads": 2, "num_hidden_layers": 36, "vocab_size": 151936,
    "tie_word_embeddings": True, "torch_dtype": "bfloat16",
}  # fmt: skip
MT0_LARGE = {
    "architectures": ["MT5ForConditionalGeneration"], "model_type": "mt5", "d_model": 1024, "d_kv": 64, "d_ff": 2816,
    "num_heads": 16, "num_layers": 24, "num_decoder_layers": 24, "vocab_size": 250112, "tie_word_embeddings": False,
    "feed_forward_proj": "gated-gelu", "is_gated_act": True, "relative_attention_num_buckets": 32,
}  # fmt: skip
VIT_BASE = {
    "architectures": ["ViTForImageClassification"], "model_type": "vit", "hidden_size": 768, "num_hidden_layers": 12,
    "num_attention_heads": 12, "intermediate_size": 3072, "image_size": 224, "patch_size": 16, "num_channels": 3,
    "qkv_bias": True, "id2label": {str(number): f"food {number}" for number in range(101)},
}  # fmt: skip
BLOOMZ_560M = {
    "architectures": ["BloomForCausalLM"], "model_type": "bloom", "n_embed": 1024, "n_layer": 24,
    "num_attention_heads": 16, "vocab_size": 250880, "torch_dtype": "float16",
}  # fmt: skip
GPT2_LARGE = {
    "architectures": ["GPT2LMHeadModel"], "model_type": "gpt2", "n_embd": 1280, "n_layer": 36, "n_head": 20,
    "n_positions": 1024, "n_ctx": 1024, "vocab_size": 50257,
}  # fmt: skip
OPT_6_7B = {
    "architectures": ["OPTForCausalLM"], "model_type": "opt", "hidden_size": 4096, "word_embed_proj_dim": 4096,
    "ffn_dim": 16384, "num_hidden_layers": 32, "num_attention_heads": 32, "vocab_size": 50272,
    "max_position_embeddings": 2048, "do_layer_norm_before": True, "_remove_final_layer_norm": False,
}  # fmt: skip
# The paper counts q and v of GPT-3 as matrices of their own. GPT-2's class has them in one `c_attn`; OPT-175B has
# GPT-3's sizes, and theirs apart.
GPT_3_175B = {
    **OPT_6_7B, "hidden_size": 12288, "word_embed_proj_dim": 12288, "ffn_dim": 49152, "num_hidden_layers": 96,
    "num_attention_heads": 96,
}  # fmt: skip
ROBERTA_BASE = {
    "architectures": ["RobertaForMaskedLM"], "model_type": "roberta", "hidden_size": 768, "num_hidden_layers": 12,
    "num_attention_heads": 12, "intermediate_size": 3072, "vocab_size": 50265, "max_position_embeddings": 514,
    "type_vocab_size": 1,
}  # fmt: skip
ROBERTA_LARGE = {
    **ROBERTA_BASE, "hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16, "intermediate_size": 4096,
}  # fmt: skip
DEBERTA_XXL = {
    "model_type": "deberta-v2", "hidden_size": 1536,
    "num_hidden_layers": 48, "num_attention_heads": 24, "intermediate_size": 6144, "vocab_size": 128100,
    "max_position_embeddings": 512, "type_vocab_size": 0, "relative_attention": True, "position_buckets": 256,
    "norm_rel_ebd": "layer_norm", "share_att_key": True, "pos_att_type": "p2c|c2p", "conv_kernel_size": 3,
    "conv_act": "gelu", "position_biased_input": False, "max_relative_positions": -1,
}  # fmt: skip
ONE_MATRIX = {
    **LLAMA_2_7B, "hidden_size": 512, "intermediate_size": 512, "num_attention_heads": 8, "num_key_value_heads": 8,
    "num_hidden_layers": 1,
}  # fmt: skip


def lora(rank: int, modules: str, **options: Any) -> dict[str, Any]:
    return {"op": "attach.lora", "name": "trained", "rank": rank, "modules": modules, **options}


PROMPT = {"op": "attach.prompt_tuning", "name": "trained", "num_virtual_tokens": 8}
PREFIX = {"op": "attach.prefix_tuning", "name": "trained", "num_virtual_tokens": 20}

# config, edit, trainable, all (None where it was not published)
PUBLISHED = {
    "mt0-large": (MT0_LARGE, lora(8, r".*\.(q|v)"), 2_359_296, 1_231_940_608),
    "Qwen2.5-3B": (QWEN_2_5_3B, lora(16, r".*\.(q|v)_proj"), 3_686_400, 3_089_625_088),
    "ViT-base": (VIT_BASE, lora(16, r".*\.(query|value)", modules_to_save=["classifier"]), 667_493, 86_543_818),
    "bloomz-560m, prompt": (BLOOMZ_560M, PROMPT, 8_192, None),
    "bloomz-560m, prefix": (BLOOMZ_560M, PREFIX, 983_040, None),
    "GPT2-large": (GPT2_LARGE, PREFIX, 1_843_200, 775_873_280),
    "Llama-2-7B": (LLAMA_2_7B, lora(8, r".*\.(q|v)_proj"), 4_194_304, 6_742_609_920),
    "Llama-3-8B": (LLAMA_3_8B, lora(16, "all-linear"), 41_943_040, 8_072_204_288),
    "OPT-6.7B": (OPT_6_7B, lora(16, r".*\.(q|v)_proj"), 8_388_608, 6_666_862_592),
    "GPT-3 175B": (GPT_3_175B, lora(1, r".*\.(q|v)_proj"), 4_718_592, None),
    "GPT-3 175B, rank 8": (GPT_3_175B, lora(8, r".*\.(q|v)_proj"), 37_748_736, None),
    "RoBERTa-base": (ROBERTA_BASE, lora(8, r".*\.(query|value)"), 294_912, None),
    "RoBERTa-large": (ROBERTA_LARGE, lora(8, r".*\.(query|value)"), 786_432, None),
    "DeBERTa-XXL": (DEBERTA_XXL, lora(16, r".*\.(query|value)_proj"), 4_718_592, None),
    "one matrix": (ONE_MATRIX, lora(2, r".*\.q_proj"), 2_048, None),
}


def planned(directory, config, edit, **options):
    (directory / "config.json").write_text(json.dumps(config))
    spec = {"version": 1, "source": str(directory), "edits": [edit]}
    return surgery.plan(spec, config_only=True, **options)


def counted(plan):
    (training,) = plan.to_json()["training"].values()
    return training


@pytest.mark.parametrize("name", PUBLISHED)
def test_counts_are_those_published(name, tmp_path):
    config, edit, trainable, total = PUBLISHED[name]
    if edit["op"] not in op_names():
        pytest.skip(f"there is no {edit['op']}")
    training = counted(planned(tmp_path, config, edit))
    assert training["trainable_params"] == trainable
    assert total is None or training["all_params"] == total


def test_the_plan_prints_them_as_peft_does(tmp_path):
    plan = planned(tmp_path, LLAMA_2_7B, lora(8, r".*\.(q|v)_proj"))
    assert "trainable params: 4,194,304 || all params: 6,742,609,920 || trainable%: 0.0622\n" in str(plan)
    schema = json.loads((SCHEMAS / "plan.v1.schema.json").read_text())
    jsonschema.validate(plan.to_json(), schema)


def test_memory_is_weights_gradients_and_states(tmp_path):
    memory = counted(planned(tmp_path, LLAMA_2_7B, lora(8, r".*\.(q|v)_proj")))["memory_bytes"]
    linear = 32 * (4 * 4096 * 4096 + 3 * 4096 * 11008)
    base, trained = 6_738_415_616, 4_194_304
    assert memory["full"] == 16 * base
    assert memory["lora"] == 2 * base + 16 * trained
    in_nf4 = linear // 2 + linear // 64 + 4 * linear // (64 * 256)
    assert memory["qlora"] == pytest.approx(in_nf4 + 2 * (base - linear) + 16 * trained, abs=1000)


def test_a_plan_from_the_config_alone_is_not_applied(tmp_path):
    plan = planned(tmp_path, ONE_MATRIX, lora(2, r".*\.q_proj"))
    with pytest.raises(OutputError, match=r"config\.json alone"):
        surgery.apply(plan, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_the_source_may_be_the_config_itself(tmp_path):
    plan = planned(tmp_path, ONE_MATRIX, lora(2, r".*\.q_proj"))
    spec = {"version": 1, "source": str(tmp_path / "config.json"), "edits": [lora(2, r".*\.q_proj")]}
    assert surgery.plan(spec, config_only=True).digest == plan.digest


def test_the_command_line_has_it_too(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(ONE_MATRIX))
    spec = tmp_path / "spec.yaml"
    spec.write_text(json.dumps({"version": 1, "source": str(tmp_path), "edits": [lora(2, r".*\.q_proj")]}))
    result = CliRunner().invoke(main, ["plan", str(spec), "--config-only"])
    assert result.exit_code == 0
    assert "trainable params: 2,048 ||" in result.output
    result = CliRunner().invoke(main, ["plan", str(spec)])
    assert result.exit_code == 1
    assert "holds no safetensors file" in result.output


MISTAKES = {
    "an unknown model": ({"model_type": "mamba"}, "whose tensors are not in the inventory"),
    "an unknown class": ({**LLAMA_2_7B, "architectures": ["LlamaForVision"]}, "names the class LlamaForVision"),
    "a missing key": ({**LLAMA_2_7B, "hidden_size": None}, "has no fit `hidden_size`"),
    "a size that is none": ({**LLAMA_2_7B, "intermediate_size": "11008"}, "has no fit `intermediate_size`"),
    "layers without end": ({**LLAMA_2_7B, "num_hidden_layers": 10**12}, "has no fit `num_hidden_layers`"),
    "a quantized checkpoint": ({**LLAMA_2_7B, "quantization_config": {"quant_method": "gptq"}}, "are quantized"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_what_the_config_does_not_tell_is_refused(mistake, tmp_path):
    config, message = MISTAKES[mistake]
    with pytest.raises(CheckpointError, match=message) as caught:
        planned(tmp_path, config, lora(2, r".*\.q_proj"))
    assert caught.value.problems[0].at == str(tmp_path / "config.json")


def test_a_directory_without_a_config_is_refused(tmp_path):
    with pytest.raises(CheckpointError, match=r"holds no config\.json"):
        surgery.plan({"version": 1, "source": str(tmp_path), "edits": [lora(2, r".*\.q_proj")]}, config_only=True)


SMALL = {
    "hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4, "num_hidden_layers": 2, "vocab_size": 64,
    "max_position_embeddings": 24,
}  # fmt: skip
MODELS = {
    "LlamaForCausalLM": ("LlamaConfig", {**SMALL, "tie_word_embeddings": True}, "self_attn.q_proj"),
    "MistralForCausalLM": ("MistralConfig", SMALL, "mlp.down_proj"),
    "GPT2LMHeadModel": ("GPT2Config", {"n_embd": 32, "n_head": 4, "n_layer": 2, "vocab_size": 64}, "attn.c_attn"),
    "T5ForConditionalGeneration": (
        "T5Config", {"d_model": 32, "d_kv": 8, "num_heads": 4, "num_layers": 2, "d_ff": 48, "vocab_size": 64},
        "SelfAttention.q",
    ),
    "BertForMaskedLM": ("BertConfig", SMALL, "attention.self.value"),
    "XLMRobertaForMaskedLM": ("XLMRobertaConfig", SMALL, "attention.self.value"),
    "BartForConditionalGeneration": (
        "BartConfig", {"d_model": 32, "encoder_layers": 1, "decoder_layers": 1, "encoder_ffn_dim": 48,
                       "decoder_ffn_dim": 48, "vocab_size": 64, "encoder_attention_heads": 4,
                       "decoder_attention_heads": 4, "max_position_embeddings": 24}, "self_attn.v_proj",
    ),
}  # fmt: skip


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")  # of PEFT
@pytest.mark.parametrize("class_name", MODELS)
def test_counts_are_those_of_peft_with_weights_and_without(class_name, tmp_path):
    config_name, settings, target = MODELS[class_name]
    model = getattr(transformers, class_name)(getattr(transformers, config_name)(**settings))
    model.save_pretrained(tmp_path)
    is_conv1d = class_name.startswith("GPT2")
    wrapped = peft.get_peft_model(model, peft.LoraConfig(r=4, target_modules=[target], fan_in_fan_out=is_conv1d))
    edit = lora(4, rf".*\.{re.escape(target)}")
    spec = {"version": 1, "source": str(tmp_path), "edits": [edit]}
    for config_only in (False, True):
        training = counted(surgery.plan(spec, config_only=config_only))
        assert (training["trainable_params"], training["all_params"]) == wrapped.get_nb_trainable_parameters()


def test_a_4_bit_weight_counts_its_elements(tmp_path):
    config = transformers.LlamaConfig(**SMALL)
    transformers.LlamaForCausalLM(config).save_pretrained(tmp_path / "model")
    edit = lora(4, r".*\.q_proj")
    edits = [edit, {"op": "quantize.nf4", "modules": "all-linear"}]
    spec = {"version": 1, "source": str(tmp_path / "model"), "edits": edits}
    both, alone = surgery.plan(spec), surgery.plan({**spec, "edits": [edit]})
    assert counted(both)["all_params"] == counted(alone)["all_params"]
    assert counted(both)["memory_bytes"]["lora"] == counted(both)["memory_bytes"]["qlora"]
    surgery.apply(surgery.plan({**spec, "edits": edits[1:]}), tmp_path / "quantized")
    later = counted(surgery.plan({**spec, "source": str(tmp_path / "quantized"), "edits": [edit]}))
    assert later == counted(both)


def test_buffers_and_copies_of_old_checkpoints_are_not_counted(tmp_path):
    config_name, settings, target = MODELS["GPT2LMHeadModel"]
    model = transformers.GPT2LMHeadModel(getattr(transformers, config_name)(**settings))
    model.save_pretrained(tmp_path)
    spec = {"version": 1, "source": str(tmp_path), "edits": [lora(4, rf".*\.{target}")]}
    before = counted(surgery.plan(spec))
    tensors = {name: tensor.contiguous() for name, tensor in model.state_dict().items()}
    tensors["lm_head.weight"] = tensors["lm_head.weight"].clone()
    for layer in range(2):
        tensors[f"transformer.h.{layer}.attn.bias"] = torch.ones(1, 1, 24, 24)
        tensors[f"transformer.h.{layer}.attn.masked_bias"] = torch.tensor(-1e4)
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    after = counted(surgery.plan(spec))
    assert (after["trainable_params"], after["all_params"]) == (before["trainable_params"], before["all_params"])
