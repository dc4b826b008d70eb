"""The inventory's rows of Llama and its kin: they differ in biases, norms and feed-forward.

Names are those on disk, order is that of the live model: the tensors of one expert are fused at run
time, so among themselves they stand in the order of the module that they once were.
"""

from __future__ import annotations

from surgery.checkpoint.inventory.family import LABELS, Family, heads_after

__all__ = ["LLAMAS"]

ATTENTION = """
  self_attn.q_proj q hidden_size +has_qkv_bias
  self_attn.k_proj kv hidden_size +has_qkv_bias
  self_attn.v_proj kv hidden_size +has_qkv_bias
  self_attn.o_proj hidden_size q +has_o_bias
"""
HEAD_NORMS = """
  self_attn.q_norm size
  self_attn.k_norm size
"""
FFN = """
  mlp.gate_proj intermediate_size hidden_size +mlp_bias
  mlp.up_proj intermediate_size hidden_size +mlp_bias
  mlp.down_proj hidden_size intermediate_size +mlp_bias
"""
ROUTER = """
  mlp.gate experts hidden_size ?sparse
"""
EXPERTS = """
  mlp.experts.* experts ?sparse
    gate_proj moe_intermediate_size hidden_size
    up_proj moe_intermediate_size hidden_size
    down_proj hidden_size moe_intermediate_size
"""
SHARED_EXPERT = """
  mlp.shared_expert.gate_proj shared_expert_intermediate_size hidden_size ?sparse
  mlp.shared_expert.up_proj shared_expert_intermediate_size hidden_size ?sparse
  mlp.shared_expert.down_proj hidden_size shared_expert_intermediate_size ?sparse
  mlp.shared_expert_gate 1 hidden_size ?sparse
"""
DENSE_FFN = """
  mlp.gate_proj intermediate_size hidden_size ?!sparse
  mlp.up_proj intermediate_size hidden_size ?!sparse
  mlp.down_proj hidden_size intermediate_size ?!sparse
"""
MIXTRAL_FFN = """
  block_sparse_moe.gate experts hidden_size
  block_sparse_moe.experts.* experts
    w1 intermediate_size hidden_size
    w2 hidden_size intermediate_size
    w3 intermediate_size hidden_size
"""
PHI3 = """
  self_attn.o_proj hidden_size q
  self_attn.qkv_proj q+2*kv hidden_size
  mlp.gate_up_proj 2*intermediate_size hidden_size
  mlp.down_proj hidden_size intermediate_size
"""
NORMS = """
  input_layernorm hidden_size
  post_attention_layernorm hidden_size
"""
GEMMA2_NORMS = """
  pre_feedforward_layernorm hidden_size
  post_feedforward_layernorm hidden_size
"""


def _decoder(*parts: str) -> str:
    return f"embed_tokens vocab_size hidden_size\nlayers.* num_hidden_layers\n{''.join(parts)}\nnorm hidden_size"


LLAMA = _decoder(ATTENTION, FFN, NORMS)

SIZES = {
    **LABELS,
    "size": "head_dim | hidden_size // num_attention_heads",
    "q": "num_attention_heads * size",
    "kv": "(num_key_value_heads | num_attention_heads) * size",
    "has_qkv_bias": "attention_bias",
    "has_o_bias": "attention_bias",
    "experts": "num_experts | num_local_experts",
    "sparse": "not (layer in (mlp_only_layers | ())) and experts > 0 and (layer + 1) % (decoder_sparse_step | 1) == 0",
}
NO_BIAS = {**SIZES, "has_qkv_bias": "False", "has_o_bias": "False", "mlp_bias": "False"}

GEMMA_HEADS = heads_after(
    "model",
    ForCausalLM="lm_head vocab_size hidden_size ?!tied",
    ForSequenceClassification="score labels hidden_size",
    ForTokenClassification="score labels hidden_size +",
)
MIXTRAL_HEADS = {**GEMMA_HEADS, "ForQuestionAnswering": "model.**\nqa_outputs 2 hidden_size +"}
LLAMA_HEADS = {**GEMMA_HEADS, "ForQuestionAnswering": "transformer.**\nqa_outputs 2 hidden_size +"}

LLAMAS = (
    Family(("llama",), LLAMA, LLAMA_HEADS, SIZES),
    Family(("mistral",), LLAMA, MIXTRAL_HEADS, NO_BIAS),
    Family(("qwen2",), LLAMA, LLAMA_HEADS, {**NO_BIAS, "has_qkv_bias": "True"}),
    Family(
        ("qwen3",), _decoder(ATTENTION, HEAD_NORMS, FFN, NORMS), LLAMA_HEADS,
        {**SIZES, "mlp_bias": "False", "size": "head_dim | 128"},
    ),
    Family(("gemma",), LLAMA, GEMMA_HEADS, {**SIZES, "mlp_bias": "False", "size": "head_dim | 256"}),
    Family(
        ("gemma2",), _decoder(ATTENTION, FFN, NORMS, GEMMA2_NORMS), GEMMA_HEADS,
        {**SIZES, "mlp_bias": "False", "size": "head_dim | 256"},
    ),
    Family(
        ("gemma3_text",), _decoder(ATTENTION, HEAD_NORMS, FFN, NORMS, GEMMA2_NORMS),
        {head: template for head, template in GEMMA_HEADS.items() if head != "ForTokenClassification"},
        {**SIZES, "mlp_bias": "False", "size": "head_dim | 256"},
    ),
    Family(("phi3",), _decoder(PHI3, NORMS), GEMMA_HEADS, SIZES),
    Family(("mixtral",), _decoder(ATTENTION, MIXTRAL_FFN, NORMS), MIXTRAL_HEADS, NO_BIAS),
    Family(
        ("qwen2_moe",), _decoder(ATTENTION, ROUTER, EXPERTS, SHARED_EXPERT, DENSE_FFN, NORMS), MIXTRAL_HEADS,
        {**NO_BIAS, "has_qkv_bias": "qkv_bias | True"},
    ),
    Family(("qwen3_moe",), _decoder(ATTENTION, HEAD_NORMS, EXPERTS, ROUTER, DENSE_FFN, NORMS), LLAMA_HEADS, SIZES),
)  # fmt: skip
