"""The inventory's rows of models that read: BERT and its kin, DeBERTa, ViT.

Names are those on disk, order is that of the live model. A class that classifies words or answers
questions has no pooler; RoBERTa's has none for sentences either.
"""

from __future__ import annotations

from surgery.checkpoint.inventory.family import LABELS, Family, heads_after

__all__ = ["ENCODERS"]


def _layer(ending: str, more: str = "") -> str:
    return f"""
encoder.layer.* num_hidden_layers
  attention.self.query{ending} hidden_size hidden_size +
  attention.self.key{ending} hidden_size hidden_size +
  attention.self.value{ending} hidden_size hidden_size +
{more}
  attention.output.dense hidden_size hidden_size +
  attention.output.LayerNorm hidden_size +
  intermediate.dense intermediate_size hidden_size +
  output.dense hidden_size intermediate_size +
  output.LayerNorm hidden_size +
"""


LAYERS = _layer("")
DEBERTA_PAIRS = """
  attention.self.pos_key_proj hidden_size hidden_size + ?has_pairs ?'c2p'in(pos_att_type|())
  attention.self.pos_query_proj hidden_size hidden_size + ?has_pairs ?'p2c'in(pos_att_type|())
"""
POOLER = "pooler.dense hidden_size hidden_size + ?has_pooler"

BERT = f"""
embeddings.word_embeddings vocab_size embedded
embeddings.position_embeddings max_position_embeddings embedded
embeddings.token_type_embeddings type_vocab_size|2 embedded
embeddings.LayerNorm embedded +
embeddings_project hidden_size embedded + ?!embedded==hidden_size
{LAYERS}
{POOLER}
"""
ROBERTA = f"""
embeddings.word_embeddings vocab_size hidden_size
embeddings.token_type_embeddings type_vocab_size|2 hidden_size
embeddings.LayerNorm hidden_size +
embeddings.position_embeddings max_position_embeddings hidden_size
{LAYERS}
{POOLER}
"""
DEBERTA = f"""
embeddings.word_embeddings vocab_size embedded
embeddings.position_embeddings max_position_embeddings embedded ?position_biased_input|True
embeddings.token_type_embeddings type_vocab_size embedded ?type_vocab_size>0
embeddings.embed_proj hidden_size embedded ?!embedded==hidden_size
embeddings.LayerNorm hidden_size +
{_layer("_proj", DEBERTA_PAIRS)}
encoder.rel_embeddings 2*span hidden_size ?relative_attention
encoder.LayerNorm hidden_size + ?has_norm
encoder.conv.conv hidden_size hidden_size//(conv_groups|1) conv_kernel_size + ?conv_kernel_size>0
encoder.conv.LayerNorm hidden_size + ?conv_kernel_size>0
"""

ALBERT = """
embeddings.word_embeddings vocab_size embedding_size
embeddings.position_embeddings max_position_embeddings embedding_size
embeddings.token_type_embeddings type_vocab_size|2 embedding_size
embeddings.LayerNorm embedding_size +
encoder.embedding_hidden_mapping_in hidden_size embedding_size +
encoder.albert_layer_groups.* num_hidden_groups|1
  albert_layers.* inner_group_num|1
    full_layer_layer_norm hidden_size +
    attention.query hidden_size hidden_size +
    attention.key hidden_size hidden_size +
    attention.value hidden_size hidden_size +
    attention.dense hidden_size hidden_size +
    attention.LayerNorm hidden_size +
    ffn intermediate_size hidden_size +
    ffn_output hidden_size intermediate_size +
pooler hidden_size hidden_size + ?has_pooler
"""
DISTILBERT = """
embeddings.word_embeddings vocab_size dim
embeddings.position_embeddings max_position_embeddings dim
embeddings.LayerNorm dim +
transformer.layer.* n_layers
  attention.q_lin dim dim +
  attention.k_lin dim dim +
  attention.v_lin dim dim +
  attention.out_lin dim dim +
  sa_layer_norm dim +
  ffn.lin1 hidden_dim dim +
  ffn.lin2 dim hidden_dim +
  output_layer_norm dim +
"""
VIT = """
@embeddings.cls_token 1 1 hidden_size
@embeddings.mask_token 1 1 hidden_size ?head=='ForMaskedImageModeling'
@embeddings.position_embeddings 1 side*side+1 hidden_size
embeddings.patch_embeddings.projection hidden_size channels patch_size patch_size +
encoder.layer.* num_hidden_layers
  attention.attention.query hidden_size hidden_size +qkv_bias|True
  attention.attention.key hidden_size hidden_size +qkv_bias|True
  attention.attention.value hidden_size hidden_size +qkv_bias|True
  attention.output.dense hidden_size hidden_size +
  layernorm_before hidden_size +
  layernorm_after hidden_size +
  intermediate.dense intermediate_size hidden_size +
  output.dense hidden_size intermediate_size +
layernorm hidden_size +
pooler.dense pooler_output_size|hidden_size hidden_size + ?has_pooler
"""

BERT_LM = """
@cls.predictions.bias vocab_size
cls.predictions.transform.dense embedded hidden_size +
cls.predictions.transform.LayerNorm embedded +
cls.predictions.decoder vocab_size embedded + ?!tied
"""
ROBERTA_LM = """
@lm_head.bias vocab_size
lm_head.dense hidden_size hidden_size +
lm_head.layer_norm hidden_size +
lm_head.decoder vocab_size hidden_size + ?!tied
"""
ELECTRA_LM = """
generator_predictions.LayerNorm embedded +
generator_predictions.dense embedded hidden_size +
generator_lm_head vocab_size embedded ?!tied
@generator_lm_head.bias vocab_size
"""
ALBERT_LM = """
@predictions.bias vocab_size
predictions.LayerNorm embedding_size +
predictions.dense embedding_size hidden_size +
predictions.decoder vocab_size embedding_size + ?!tied
"""
DISTILBERT_LM = """
vocab_transform dim dim +
vocab_layer_norm dim +
vocab_projector vocab_size dim ?!tied
@vocab_projector.bias vocab_size
"""

CLASSIFIER = "classifier labels hidden_size +"
DENSE_CLASSIFIER = "classifier.dense hidden_size hidden_size +\nclassifier.out_proj labels hidden_size +"
QUESTIONS = "qa_outputs labels hidden_size +"
WORDS = {"ForTokenClassification": CLASSIFIER, "ForQuestionAnswering": QUESTIONS}
ROBERTA_HEADS = {
    "ForMaskedLM": ROBERTA_LM,
    "ForCausalLM": ROBERTA_LM,
    "ForSequenceClassification": DENSE_CLASSIFIER,
    **WORDS,
}
DEBERTA_POOLER = "pooler.dense pooler_hidden_size|hidden_size pooler_hidden_size|hidden_size +"

SIZES = {
    **LABELS,
    "embedded": "embedding_size | hidden_size",
    "has_pooler": "head in ('Model', 'ForSequenceClassification', 'ForPreTraining')",
}
ROBERTA_SIZES = {**LABELS, "has_pooler": "head == 'Model'"}
DEBERTA_SIZES = {
    **LABELS,
    "embedded": "embedding_size | hidden_size",
    "span": "position_buckets if position_buckets > 0 else "
    "max_relative_positions if max_relative_positions > 0 else max_position_embeddings",
    "has_norm": "'layer_norm' in (norm_rel_ebd | 'none')",
    "has_pairs": "relative_attention and not share_att_key",
}

ENCODERS = (
    Family(
        ("bert",), BERT,
        heads_after("bert", ForMaskedLM=BERT_LM, LMHeadModel=BERT_LM, ForSequenceClassification=CLASSIFIER, **WORDS,
        ForPreTraining=f"{BERT_LM}\ncls.seq_relationship 2 hidden_size +"), {**SIZES, "embedded": "hidden_size"},
    ),
    Family(
        ("roberta",), ROBERTA,
        heads_after("roberta", **ROBERTA_HEADS), ROBERTA_SIZES,
    ),
    Family(
        ("xlm-roberta",), ROBERTA,
        {head: f"{template}\nroberta.**" for head, template in ROBERTA_HEADS.items()} | {"Model": "**"}, ROBERTA_SIZES,
    ),
    Family(
        ("electra",), BERT,
        heads_after("electra", ForPreTraining="discriminator_predictions.dense hidden_size hidden_size +\n"
        "discriminator_predictions.dense_prediction 1 hidden_size +", ForMaskedLM=ELECTRA_LM, ForCausalLM=ELECTRA_LM,
        ForSequenceClassification=DENSE_CLASSIFIER, **WORDS), {**SIZES, "has_pooler": "False"},
    ),
    Family(
        ("albert",), ALBERT,
        heads_after("albert", ForMaskedLM=ALBERT_LM, ForSequenceClassification=CLASSIFIER, **WORDS,
        ForPreTraining=f"{ALBERT_LM}\nsop_classifier.classifier labels hidden_size +"), SIZES,
    ),
    Family(
        ("distilbert",), DISTILBERT,
        heads_after("distilbert", ForMaskedLM=DISTILBERT_LM,
        ForSequenceClassification=f"pre_classifier dim dim +\n{CLASSIFIER}", **WORDS),
        {**LABELS, "hidden_size": "dim"},
    ),
    Family(
        ("deberta-v2",), DEBERTA,
        heads_after("deberta", ForMaskedLM=BERT_LM, ForSequenceClassification=f"{DEBERTA_POOLER}\n{CLASSIFIER}",
        **WORDS), DEBERTA_SIZES,
    ),
    Family(
        ("vit",), VIT, heads_after("vit", ForImageClassification=CLASSIFIER),
        {**LABELS, "side": "image_size // patch_size", "channels": "num_channels | 3", "has_pooler": "head == 'Model'"},
    ),
)  # fmt: skip
