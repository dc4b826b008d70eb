"""The inventory, held to what transformers builds from the same config and writes to disk."""

import json
import random
import warnings

import pytest
import torch
import transformers
from safetensors import safe_open

from surgery.checkpoint.inventory import inventory, live_order, model_types
from surgery.checkpoint.inventory.families import TABLE

SMALL = {
    "hidden_size": 32,
    "num_attention_heads": 4,
    "num_hidden_layers": 2,
    "intermediate_size": 48,
    "vocab_size": 64,
    "max_position_embeddings": 24,
}
GROUPED = {**SMALL, "num_key_value_heads": 2}
GPT = {"n_embd": 32, "n_head": 4, "n_layer": 2, "vocab_size": 64, "n_positions": 24}
T5 = {"d_model": 32, "d_kv": 4, "num_heads": 4, "num_layers": 2, "d_ff": 48, "vocab_size": 64}
EXPERTS = {
    **GROUPED,
    "num_experts": 3,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 24,
    "shared_expert_intermediate_size": 40,
}
BART = {
    "d_model": 32,
    "encoder_layers": 2,
    "decoder_layers": 1,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 48,
    "decoder_ffn_dim": 40,
    "vocab_size": 64,
    "max_position_embeddings": 24,
}
DEBERTA = {
    **SMALL,
    "relative_attention": True,
    "pos_att_type": ["p2c", "c2p"],
    "position_biased_input": False,
    "norm_rel_ebd": "layer_norm",
    "type_vocab_size": 0,
    "position_buckets": 8,
}
OPT = {**SMALL, "ffn_dim": 48}
FALCON = {"hidden_size": 32, "num_attention_heads": 4, "num_hidden_layers": 2, "vocab_size": 64}
BLOOM = {"hidden_size": 32, "n_head": 4, "n_layer": 2, "vocab_size": 64}
DISTILBERT = {
    "dim": 32,
    "n_heads": 4,
    "n_layers": 2,
    "hidden_dim": 48,
    "vocab_size": 64,
    "max_position_embeddings": 24,
}
GPT_NEO = {
    "hidden_size": 32,
    "num_heads": 4,
    "num_layers": 2,
    "attention_types": [[["global", "local"], 1]],
    "vocab_size": 64,
    "max_position_embeddings": 24,
}
LLAMA_CLASSES = (
    "Model", "ForCausalLM", "ForSequenceClassification", "ForTokenClassification", "ForQuestionAnswering",
)  # fmt: skip
GPT_CLASSES = LLAMA_CLASSES
GEMMA_CLASSES = LLAMA_CLASSES[:4]
BERT_CLASSES = ("Model", "ForMaskedLM", *LLAMA_CLASSES[2:])
ELECTRA_CLASSES = (*BERT_CLASSES, "ForPreTraining", "ForCausalLM")
T5_CLASSES = ("Model", "ForConditionalGeneration", *LLAMA_CLASSES[2:], "EncoderModel")

# model_type, what its classes are called, their endings, config
FAMILIES = (
    ("llama", "Llama", LLAMA_CLASSES, GROUPED),
    ("llama", "Llama", ("ForCausalLM",), {**GROUPED, "attention_bias": True, "mlp_bias": True, "head_dim": 12}),
    ("llama", "Llama", ("ForCausalLM",), {**SMALL, "tie_word_embeddings": True}),
    ("mistral", "Mistral", LLAMA_CLASSES, GROUPED),
    ("mixtral", "Mixtral", LLAMA_CLASSES, {**GROUPED, "num_local_experts": 3}),
    ("qwen2", "Qwen2", LLAMA_CLASSES, GROUPED),
    ("qwen2", "Qwen2", ("ForCausalLM",), {**GROUPED, "tie_word_embeddings": True}),
    ("qwen2_moe", "Qwen2Moe", LLAMA_CLASSES, EXPERTS),
    ("qwen2_moe", "Qwen2Moe", ("ForCausalLM",), {**EXPERTS, "mlp_only_layers": [1], "qkv_bias": False}),
    ("qwen3", "Qwen3", LLAMA_CLASSES, {**GROUPED, "head_dim": 16}),
    ("qwen3", "Qwen3", ("ForCausalLM",), {**GROUPED, "attention_bias": True}),
    ("qwen3_moe", "Qwen3Moe", LLAMA_CLASSES, {**EXPERTS, "head_dim": 16}),
    ("qwen3_moe", "Qwen3Moe", ("ForCausalLM",), {**EXPERTS, "decoder_sparse_step": 2}),
    ("gemma", "Gemma", GEMMA_CLASSES, {**GROUPED, "head_dim": 16}),
    ("gemma2", "Gemma2", GEMMA_CLASSES, {**GROUPED, "head_dim": 16}),
    ("gemma3_text", "Gemma3Text", ("Model", "ForSequenceClassification"), {**GROUPED, "head_dim": 16}),
    ("gemma3_text", "Gemma3", ("ForCausalLM",), {**GROUPED, "head_dim": 16}),
    ("phi", "Phi", GEMMA_CLASSES, GROUPED),
    ("phi", "Phi", ("ForCausalLM",), {**GROUPED, "qk_layernorm": True}),
    ("phi3", "Phi3", GEMMA_CLASSES, {**GROUPED, "pad_token_id": 0}),
    ("gpt2", "GPT2", ("LMHeadModel", "Model", *LLAMA_CLASSES[2:]), GPT),
    ("gpt2", "GPT2", ("LMHeadModel",), {**GPT, "n_inner": 40, "tie_word_embeddings": False}),
    ("gptj", "GPTJ", ("Model", "ForCausalLM", "ForSequenceClassification", "ForQuestionAnswering"),
     {**GPT, "rotary_dim": 4}),
    ("gpt_neo", "GPTNeo", GPT_CLASSES, GPT_NEO),
    ("gpt_neox", "GPTNeoX", GPT_CLASSES, SMALL),
    ("gpt_neox", "GPTNeoX", ("ForCausalLM",), {**SMALL, "attention_bias": False}),
    ("opt", "OPT", ("Model", "ForCausalLM", "ForSequenceClassification", "ForQuestionAnswering"), OPT),
    ("opt", "OPT", ("ForCausalLM",), {**OPT, "word_embed_proj_dim": 16, "do_layer_norm_before": False}),
    ("opt", "OPT", ("ForCausalLM",), {**OPT, "enable_bias": False, "layer_norm_elementwise_affine": False}),
    ("bloom", "Bloom", GPT_CLASSES, BLOOM),
    ("falcon", "Falcon", GPT_CLASSES, FALCON),
    ("falcon", "Falcon", ("ForCausalLM",), {**FALCON, "new_decoder_architecture": True, "num_kv_heads": 2}),
    ("falcon", "Falcon", ("ForCausalLM",),
     {**FALCON, "parallel_attn": False, "bias": True, "multi_query": False, "alibi": True}),
    ("t5", "T5", T5_CLASSES, T5),
    ("t5", "T5", ("ForConditionalGeneration",), {**T5, "feed_forward_proj": "gated-gelu", "num_decoder_layers": 1}),
    ("mt5", "MT5", T5_CLASSES, T5),
    ("umt5", "UMT5", T5_CLASSES, T5),
    ("bart", "Bart", ("Model", "ForConditionalGeneration", "ForSequenceClassification", "ForQuestionAnswering"), BART),
    ("bert", "Bert", (*BERT_CLASSES, "ForPreTraining", "LMHeadModel"), SMALL),
    ("roberta", "Roberta", (*BERT_CLASSES, "ForCausalLM"), SMALL),
    *((model_type, name, ("ForMaskedLM",), {**config, "tie_word_embeddings": False}) for model_type, name, config in (
        ("bert", "Bert", SMALL), ("roberta", "Roberta", SMALL), ("xlm-roberta", "XLMRoberta", SMALL),
        ("electra", "Electra", {**SMALL, "embedding_size": 16}), ("albert", "Albert", {**SMALL, "embedding_size": 16}),
        ("distilbert", "DistilBert", DISTILBERT), ("deberta-v2", "DebertaV2", DEBERTA))),
    *((model_type, name, ("ForCausalLM",), {**config, "tie_word_embeddings": tied})
      for tied in (False, True) for model_type, name, config in (
        ("gemma", "Gemma", GROUPED), ("phi", "Phi", GROUPED), ("gptj", "GPTJ", GPT), ("gpt_neo", "GPTNeo", GPT_NEO),
        ("gpt_neox", "GPTNeoX", SMALL), ("opt", "OPT", OPT), ("bloom", "Bloom", BLOOM), ("falcon", "Falcon", FALCON))),
    ("xlm-roberta", "XLMRoberta", (*BERT_CLASSES, "ForCausalLM"), SMALL),
    ("electra", "Electra", ELECTRA_CLASSES, {**SMALL, "embedding_size": 16}),
    ("electra", "Electra", ("Model",), {**SMALL, "embedding_size": 32}),
    ("albert", "Albert", (*BERT_CLASSES, "ForPreTraining"),
     {**SMALL, "embedding_size": 16, "num_hidden_groups": 2, "inner_group_num": 2}),
    ("distilbert", "DistilBert", BERT_CLASSES, DISTILBERT),
    ("deberta-v2", "DebertaV2", BERT_CLASSES, {**DEBERTA, "share_att_key": True}),
    ("deberta-v2", "DebertaV2", ("ForSequenceClassification",),
     {**DEBERTA, "conv_kernel_size": 3, "conv_act": "gelu", "type_vocab_size": 2, "position_biased_input": True}),
    ("vit", "ViT", ("Model", "ForImageClassification"), {
        "hidden_size": 32, "num_attention_heads": 4, "num_hidden_layers": 2, "intermediate_size": 48,
        "image_size": 32, "patch_size": 8, "num_labels": 5}),
)  # fmt: skip
CASES = [
    pytest.param(model_type, name + ending, config, id=f"{name}{ending}-{number}")
    for number, (model_type, name, endings, config) in enumerate(FAMILIES)
    for ending in endings
]


def build(model_type, class_name, settings):
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(model_type, **settings)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return getattr(transformers, class_name)(config)


def marked(model):
    """Every parameter filled with its place in the order of the live model; the places by name."""
    with torch.no_grad():
        for place, parameter in enumerate(model.parameters()):
            parameter.fill_(place)
    return {name: place for place, (name, _) in enumerate(model.named_parameters(remove_duplicate=False))}


def saved(model, directory):
    """What `save_pretrained` writes: shape and mark of every parameter by its name on disk; and the config."""
    buffers = {name for name, _ in model.named_buffers()}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model.save_pretrained(directory)
    with safe_open(directory / "model.safetensors", "pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys() if name not in buffers}  # noqa: SIM118
    found = {name: (tuple(tensor.shape), int(tensor.flatten()[0])) for name, tensor in tensors.items()}
    return found, json.loads((directory / "config.json").read_text())


def settled(names, places):
    """Experts are one module at run time, so their order among themselves is nobody's: all have the first's place."""
    modules = [name.split(".experts.")[0] if ".experts." in name else name for name in names]
    first = dict(sorted(zip(modules, places, strict=True), key=lambda item: -item[1]))
    return [first[module] for module in modules]


@pytest.mark.parametrize(("model_type", "class_name", "settings"), CASES)
def test_names_shapes_and_order_are_those_of_the_class(model_type, class_name, settings, tmp_path):
    model = build(model_type, class_name, settings)
    live = marked(model)
    disk, config = saved(model, tmp_path)
    found = inventory(config)
    assert found is not None
    assert {name: type_.shape for name, type_ in found.items()} == {name: shape for name, (shape, _) in disk.items()}
    first = {name: place for place, name in enumerate(dict(model.named_parameters()))}
    number = {mark: live[name] for name, mark in first.items()}
    places = [live.get(name, number[disk[name][1]]) for name in found]
    assert settled(found, places) == sorted(settled(found, places))
    shuffled = random.Random(0).sample(list(found), len(found))
    assert live_order(shuffled, config) == (list(found), True)


def test_every_family_of_the_table_is_held_to_its_class():
    assert {model_type for model_type, *_ in FAMILIES} == set(model_types())
    for model_type, heads in ((name, set(row.heads)) for row in TABLE for name in row.model_types):
        held = {ending for row in FAMILIES if row[0] == model_type for ending in row[2]}
        assert heads <= held, model_type


FULL_SIZE = {
    "LlamaForCausalLM": ("llama", {"num_key_value_heads": 8, "intermediate_size": 14336, "vocab_size": 128256}),
    "GPT2LMHeadModel": ("gpt2", {"n_embd": 1600, "n_head": 25, "n_layer": 48}),
    "T5ForConditionalGeneration": (
        "t5", {"d_model": 1024, "d_ff": 16384, "d_kv": 128, "num_heads": 32, "num_layers": 24}),
    "DebertaV2ForSequenceClassification": (
        "deberta-v2", {**DEBERTA, "hidden_size": 1536, "num_hidden_layers": 48, "num_attention_heads": 24,
                       "conv_kernel_size": 3, "conv_act": "gelu", "share_att_key": True}),
    "ElectraForPreTraining": (
        "electra", {"hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16, "embedding_size": 1024}),
}  # fmt: skip


@pytest.mark.parametrize("class_name", FULL_SIZE)
def test_full_size_models_have_the_same_parameters(class_name):
    model_type, settings = FULL_SIZE[class_name]
    with torch.device("meta"):
        model = build(model_type, class_name, settings)
    config = {**model.config.to_dict(), "architectures": [class_name]}
    found = inventory(config)
    assert found is not None
    expected = [(name, tuple(parameter.shape)) for name, parameter in model.named_parameters()]
    assert [(name, type_.shape) for name, type_ in found.items()] == expected


def llama_config(**more):
    return {"model_type": "llama", "architectures": ["LlamaForCausalLM"], **GROUPED, **more}


def test_the_dtype_is_that_of_the_config():
    def dtype(**said):
        found = inventory(llama_config(**said))
        return found and str(found["model.norm.weight"].dtype)

    assert dtype() == "f32"
    assert dtype(torch_dtype="bfloat16") == "bf16"
    assert dtype(dtype="float16", torch_dtype="bfloat16") == "f16"


def test_an_unknown_model_has_no_inventory():
    assert inventory({"model_type": "mamba"}) is None
    assert inventory({}) is None


def test_the_usual_class_stands_in_for_one_that_is_not_named():
    config = llama_config()
    del config["architectures"]
    assert inventory(config) == inventory(llama_config())


ORDERED = [
    "model.embed_tokens.weight",
    "model.layers.1.self_attn.q_proj.weight",
    "model.layers.1.self_attn.q_proj.weight.absmax",
    "model.layers.1.mlp.down_proj.weight",
    "model.layers.1.input_layernorm.weight",
    "model.norm.weight",
    "lm_head.weight",
]


def test_the_live_order_knows_parts_of_parameters_and_a_head_that_should_be_tied():
    config = llama_config(tie_word_embeddings=True)
    assert live_order(sorted(ORDERED), config) == (ORDERED, True)


def test_the_live_order_does_not_mind_the_base_models_prefix():
    bare = [name.removeprefix("model.") for name in ORDERED]
    assert live_order(sorted(bare), llama_config()) == (bare, True)
    config = llama_config(architectures=["LlamaModel"])
    assert live_order(sorted(ORDERED), config) == (ORDERED, True)


def test_the_live_order_knows_the_buffers_of_old_checkpoints():
    config = {"model_type": "gpt2", "architectures": ["GPT2LMHeadModel"], **GPT}
    names = ["h.0.attn.c_attn.weight", "h.0.attn.c_proj.weight", "h.0.attn.bias", "h.1.ln_1.weight"]
    assert live_order(sorted(names), config) == (names, True)
    config = {"model_type": "bert", "architectures": ["BertForPreTraining"], **SMALL}
    names = ["bert.embeddings.word_embeddings.weight", "bert.embeddings.LayerNorm.gamma", "cls.predictions.bias"]
    assert live_order(sorted(names), config) == (names, True)


def test_a_model_that_the_inventory_does_not_know_is_in_natural_order():
    names = [f"model.layers.{layer}.self_attn.{part}_proj.weight" for layer in range(12) for part in "qkvo"]
    assert live_order(sorted(names), {"model_type": "new"}) == (names, False)
    assert live_order(sorted(names), None) == (names, False)


def test_what_does_not_belong_to_the_model_makes_the_order_uncertain():
    names = [*ORDERED, "model.extra.weight"]
    ordered, certain = live_order(names, llama_config())
    assert not certain
    assert sorted(ordered) == sorted(names)
