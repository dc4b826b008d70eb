"""The inventory's rows of other models that generate: GPT, OPT, BLOOM, Falcon, T5, BART.

Names are those on disk, order is that of the live model.
"""

from __future__ import annotations

from surgery.checkpoint.inventory.family import LABELS, Family, heads_after

__all__ = ["DECODERS"]

HEAD = "lm_head vocab_size hidden ?!tied"
BIASED_HEAD = f"{HEAD}\n@lm_head.bias vocab_size"
SCORE = "score labels hidden"
CLASSIFIER = "classifier labels hidden +"
QUESTIONS = "qa_outputs 2 hidden +"

PHI = """
embed_tokens vocab_size hidden
layers.* num_hidden_layers
  self_attn.q_proj q hidden +
  self_attn.k_proj kv hidden +
  self_attn.v_proj kv hidden +
  self_attn.dense hidden q +
  self_attn.q_layernorm hidden//num_attention_heads + ?qk_layernorm
  self_attn.k_layernorm hidden//num_attention_heads + ?qk_layernorm
  mlp.fc1 intermediate_size hidden +
  mlp.fc2 hidden intermediate_size +
  input_layernorm hidden +
final_layernorm hidden +
"""
PHI_SIZES = {
    "hidden": "hidden_size",
    "size": "head_dim | hidden // num_attention_heads",
    "q": "num_attention_heads * size",
    "kv": "(num_key_value_heads | num_attention_heads) * size",
}

# GPT-2's linear layers are `Conv1D`, whose weight is [in, out].
GPT2 = """
wte vocab_size hidden
wpe n_positions|max_position_embeddings hidden
h.* n_layer|num_hidden_layers
  ln_1 hidden +
  @attn.c_attn.weight hidden 3*hidden
  @attn.c_attn.bias 3*hidden
  @attn.c_proj.weight hidden hidden
  @attn.c_proj.bias hidden
  ln_2 hidden +
  @mlp.c_fc.weight hidden ffn
  @mlp.c_fc.bias ffn
  @mlp.c_proj.weight ffn hidden
  @mlp.c_proj.bias hidden
ln_f hidden +
"""
GPTJ = """
wte vocab_size hidden
h.* n_layer|num_hidden_layers
  ln_1 hidden +
  attn.k_proj hidden hidden
  attn.v_proj hidden hidden
  attn.q_proj hidden hidden
  attn.out_proj hidden hidden
  mlp.fc_in ffn hidden +
  mlp.fc_out hidden ffn +
ln_f hidden +
"""
GPT_SIZES = {"hidden": "n_embd | hidden_size", "ffn": "n_inner | 4 * hidden"}

GPT_NEO = """
wte vocab_size hidden
wpe max_position_embeddings hidden
h.* num_layers|num_hidden_layers
  ln_1 hidden +
  attn.attention.k_proj hidden hidden
  attn.attention.v_proj hidden hidden
  attn.attention.q_proj hidden hidden
  attn.attention.out_proj hidden hidden +
  ln_2 hidden +
  mlp.c_fc ffn hidden +
  mlp.c_proj hidden ffn +
ln_f hidden +
"""
GPT_NEOX = """
embed_in vocab_size hidden
layers.* num_hidden_layers
  input_layernorm hidden +
  post_attention_layernorm hidden +
  attention.query_key_value 3*hidden hidden +has_bias
  attention.dense hidden hidden +has_bias
  mlp.dense_h_to_4h intermediate_size hidden +
  mlp.dense_4h_to_h hidden intermediate_size +
final_layer_norm hidden +
"""
OPT = """
decoder.embed_tokens vocab_size embedded
decoder.embed_positions max_position_embeddings+2 hidden
decoder.project_out embedded hidden ?!embedded==hidden
decoder.project_in hidden embedded ?!embedded==hidden
decoder.final_layer_norm hidden + ?has_last_norm ?has_norm_weights
decoder.layers.* num_hidden_layers
  self_attn.k_proj hidden hidden +has_bias
  self_attn.v_proj hidden hidden +has_bias
  self_attn.q_proj hidden hidden +has_bias
  self_attn.out_proj hidden hidden +has_bias
  self_attn_layer_norm hidden + ?has_norm_weights
  fc1 ffn_dim hidden +has_bias
  fc2 hidden ffn_dim +has_bias
  final_layer_norm hidden + ?has_norm_weights
"""
OPT_SIZES = {
    "hidden": "hidden_size",
    "embedded": "word_embed_proj_dim | hidden_size",
    "has_bias": "enable_bias | True",
    "has_norm_weights": "layer_norm_elementwise_affine | True",
    "has_last_norm": "(do_layer_norm_before | True) and not _remove_final_layer_norm",
}
BLOOM = """
word_embeddings vocab_size hidden
word_embeddings_layernorm hidden +
h.* n_layer|num_hidden_layers
  input_layernorm hidden +
  self_attention.query_key_value 3*hidden hidden +
  self_attention.dense hidden hidden +
  post_attention_layernorm hidden +
  mlp.dense_h_to_4h 4*hidden hidden +
  mlp.dense_4h_to_h hidden 4*hidden +
ln_f hidden +
"""
FALCON = """
word_embeddings vocab_size hidden
h.* num_hidden_layers|n_layer
  self_attention.query_key_value qkv hidden +bias
  self_attention.dense hidden hidden +bias
  mlp.dense_h_to_4h ffn hidden +bias
  mlp.dense_4h_to_h hidden ffn +bias
  post_attention_layernorm hidden + ?!is_parallel
  input_layernorm hidden + ?!is_parallel
  ln_attn hidden + ?is_parallel ?has_two_norms
  ln_mlp hidden + ?is_parallel ?has_two_norms
  input_layernorm hidden + ?is_parallel ?!has_two_norms
ln_f hidden +
"""
FALCON_SIZES = {
    "hidden": "hidden_size",
    "heads": "num_attention_heads | n_head",
    "size": "hidden // heads",
    "kv_heads": "num_kv_heads | n_head_kv | heads if new_decoder_architecture else 1 if multi_query | True else heads",
    "qkv": "hidden + 2 * kv_heads * size",
    "ffn": "ffn_hidden_size | 4 * hidden",
    "is_parallel": "parallel_attn | True",
    "has_two_norms": "(num_ln_in_parallel_attn | (2 if new_decoder_architecture else 1)) == 2",
}


def _t5_stack(stack: str, num_layers: str, cross: str, last: int, condition: str = "") -> str:
    return f"""
{stack}.block.* {num_layers} {condition}
  layer.0.SelfAttention.q inner d_model
  layer.0.SelfAttention.k inner d_model
  layer.0.SelfAttention.v inner d_model
  layer.0.SelfAttention.o d_model inner
  layer.0.SelfAttention.relative_attention_bias buckets num_heads ?has_positions
  layer.0.layer_norm d_model
{cross}
  layer.{last}.DenseReluDense.wi d_ff d_model ?!gated
  layer.{last}.DenseReluDense.wi_0 d_ff d_model ?gated
  layer.{last}.DenseReluDense.wi_1 d_ff d_model ?gated
  layer.{last}.DenseReluDense.wo d_model d_ff
  layer.{last}.layer_norm d_model
{stack}.final_layer_norm d_model {condition}
"""


T5_CROSS = """
  layer.1.EncDecAttention.q inner d_model
  layer.1.EncDecAttention.k inner d_model
  layer.1.EncDecAttention.v inner d_model
  layer.1.EncDecAttention.o d_model inner
  layer.1.layer_norm d_model
"""
T5_ENCODER = "shared vocab_size d_model" + _t5_stack("encoder", "num_layers", "", 1)
T5_DECODER = _t5_stack("decoder", "num_decoder_layers|num_layers", T5_CROSS, 2, "?has_decoder")
T5_SIZES = {
    **LABELS,
    "hidden": "d_model",
    "inner": "num_heads * d_kv",
    "buckets": "relative_attention_num_buckets | 32",
    "has_positions": "layer == 0",
    "gated": "is_gated_act | ('gated-' in (feed_forward_proj | 'relu'))",
    "has_decoder": "not (head in ('ForTokenClassification', 'EncoderModel'))",
}
DENSE_HEAD = "classification_head.dense hidden hidden +\nclassification_head.out_proj labels hidden +"
T5_HEADS = {
    # From 1.1 on, checkpoints have a head of their own and say `tie_word_embeddings: false`.
    "ForConditionalGeneration": "**\nlm_head vocab_size hidden ?!tied",
    "ForSequenceClassification": f"transformer.**\n{DENSE_HEAD}",
    "ForTokenClassification": f"transformer.**\n{CLASSIFIER}",
    "ForQuestionAnswering": "**\nqa_outputs labels hidden +",
    "EncoderModel": "**",
    "Model": "**",
}


def _bart_stack(stack: str, cross: str) -> str:
    return f"""
{stack}.embed_positions max_position_embeddings+2 d_model
{stack}.layers.* {stack}_layers
  self_attn.k_proj d_model d_model +
  self_attn.v_proj d_model d_model +
  self_attn.q_proj d_model d_model +
  self_attn.out_proj d_model d_model +
  self_attn_layer_norm d_model +
{cross}
  fc1 {stack}_ffn_dim d_model +
  fc2 d_model {stack}_ffn_dim +
  final_layer_norm d_model +
{stack}.layernorm_embedding d_model +
"""


BART_CROSS = """
  encoder_attn.k_proj d_model d_model +
  encoder_attn.v_proj d_model d_model +
  encoder_attn.q_proj d_model d_model +
  encoder_attn.out_proj d_model d_model +
  encoder_attn_layer_norm d_model +
"""
BART = "shared vocab_size d_model" + _bart_stack("encoder", "") + _bart_stack("decoder", BART_CROSS)

GPT_HEADS = {"ForSequenceClassification": SCORE, "ForTokenClassification": CLASSIFIER}
ALL_HEADS = {**GPT_HEADS, "ForQuestionAnswering": QUESTIONS}

DECODERS = (
    Family(
        ("phi",), PHI, heads_after("model", ForCausalLM=BIASED_HEAD,
        ForSequenceClassification=SCORE, ForTokenClassification="score labels hidden +"), {**LABELS, **PHI_SIZES},
    ),
    Family(("gpt2",), GPT2, heads_after("transformer", LMHeadModel=HEAD, **ALL_HEADS), {**LABELS, **GPT_SIZES}),
    Family(
        ("gptj",), GPTJ, heads_after("transformer", ForCausalLM=BIASED_HEAD,
        ForSequenceClassification=SCORE, ForQuestionAnswering="qa_outputs labels hidden +"), {**LABELS, **GPT_SIZES},
    ),
    Family(
        ("gpt_neo",), GPT_NEO, heads_after("transformer", ForCausalLM=HEAD, **ALL_HEADS),
        {**LABELS, "hidden": "hidden_size", "ffn": "intermediate_size | 4 * hidden"},
    ),
    Family(
        ("gpt_neox",), GPT_NEOX,
        heads_after("gpt_neox", ForCausalLM="embed_out vocab_size hidden ?!tied", **ALL_HEADS),
        {**LABELS, "hidden": "hidden_size", "has_bias": "attention_bias | True"},
    ),
    Family(
        ("opt",), OPT, heads_after("model", ForCausalLM="lm_head vocab_size embedded ?!tied",
        ForSequenceClassification="score labels embedded", ForQuestionAnswering="qa_outputs 2 embedded +"),
        {**LABELS, **OPT_SIZES},
    ),
    Family(
        ("bloom",), BLOOM, heads_after("transformer", ForCausalLM=HEAD, **ALL_HEADS),
        {**LABELS, "hidden": "n_embed | hidden_size"},
    ),
    Family(("falcon",), FALCON, heads_after("transformer", ForCausalLM=HEAD, **ALL_HEADS), {**LABELS, **FALCON_SIZES}),
    Family(("t5", "mt5"), T5_ENCODER + T5_DECODER, T5_HEADS, T5_SIZES),
    Family(("umt5",), T5_ENCODER + T5_DECODER, T5_HEADS, {**T5_SIZES, "has_positions": "True"}),
    Family(
        ("bart",), BART, heads_after("model", ForConditionalGeneration=HEAD, ForSequenceClassification=DENSE_HEAD,
        ForQuestionAnswering=QUESTIONS), {"hidden": "d_model", "labels": "num_labels | len(id2label) | 3"},
    ),
)  # fmt: skip
