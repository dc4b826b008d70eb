"""The order of the live model: how `model.named_modules()` visits what a checkpoint holds.

Why: initial values are drawn one module after the other, so the order decides who gets which; and
files keep their tensors sorted by name or size.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence

from surgery.checkpoint.inventory.families import family_of, head_of, parameters
from surgery.checkpoint.inventory.family import Family
from surgery.checkpoint.inventory.template import Missing
from surgery.checkpoint.modules import QUANTIZED_PARTS
from surgery.errors import CheckpointError

__all__ = ["live_order"]

# Tensors of no parameter, which old checkpoints hold, and copies of tied ones.
BUFFERS = re.compile(
    r"(.*\.)?(masked_bias|attn(\.attention)?\.bias|attention\.bias|inv_freq|position_ids|final_logits_bias"
    r"|(en|de)coder\.embed_tokens\.weight)"
)
OLD_NAMES = {"gamma": "weight", "beta": "bias"}

# Where no table helps: what usually comes first among the parts of one module. A name of two words is the
# first of these that it is, ends with or starts with.
USUAL = (
    "weight", "bias", "shared", "embeddings", "embed_tokens", "word_embeddings", "wte", "embed_in", "tok_embeddings",
    "embed_positions", "position_embeddings", "wpe", "token_type_embeddings", "model", "transformer", "encoder",
    "decoder", "layers", "layer", "h", "blocks", "block", "ln_1", "self_attn", "self_attention", "attn", "attention",
    "self", "q_proj", "query", "q", "q_lin", "k_proj", "key", "k", "k_lin", "v_proj", "value", "v", "v_lin",
    "qkv_proj", "query_key_value", "c_attn", "o_proj", "out_proj", "dense", "o", "out_lin", "q_norm", "k_norm",
    "encoder_attn", "crossattention", "ln_2", "block_sparse_moe", "mlp", "ffn", "feed_forward", "gate", "experts",
    "gate_proj", "up_proj", "gate_up_proj", "down_proj", "w1", "w2", "w3", "c_fc", "c_proj", "fc1", "fc2", "lin1",
    "lin2", "dense_h_to_4h", "dense_4h_to_h", "intermediate", "output", "shared_expert", "shared_expert_gate",
    "input_layernorm", "post_attention_layernorm", "LayerNorm", "layer_norm", "norm", "final_layernorm", "ln_f",
    "pooler", "lm_head", "embed_out", "score", "classifier", "cls", "qa_outputs",
)  # fmt: skip
RANKS = {word: rank for rank, word in enumerate(USUAL)}
UNKNOWN_RANK = RANKS["pooler"] - 0.5

Key = tuple[object, ...]


def live_order(names: Iterable[str], config: Mapping[str, object] | None) -> tuple[list[str], bool]:
    """`names` of a checkpoint in the order of the live model, and whether the inventory vouches for it.

    The prefix of the base model may be there or not. Of a model that the inventory does not know, numbers
    come in order, and within a layer what usually comes first.
    """
    given = list(names)
    positions = _positions(given, config or {})
    unknown = [name for name in given if _parameter(name) not in positions]
    certain = bool(positions) and all(BUFFERS.fullmatch(name) for name in unknown)
    if not certain:
        return sorted(given, key=_natural), False
    ends = _ends(positions)
    return sorted(given, key=lambda name: _place(name, positions, ends)), True


def _positions(names: Sequence[str], config: Mapping[str, object]) -> dict[str, int]:
    """The places of the family's parameters, with the head that leaves the fewest of `names` unknown."""
    family = family_of(config)
    best: dict[str, int] = {}
    fewest = len(names)
    for head in _heads(family, config) if family else ():
        try:
            found = _with_head(family, head, config) if family else {}
        except Missing:
            continue
        unknown = sum(_parameter(name) not in found for name in names)
        if unknown < fewest:
            best, fewest = found, unknown
    return best


def _heads(family: Family, config: Mapping[str, object]) -> list[str]:
    """The head that the config names first."""
    try:
        first = [head_of(family, config)]
    except CheckpointError:
        first = []
    return list(dict.fromkeys([*first, *family.heads]))


def _with_head(family: Family, head: str, config: Mapping[str, object]) -> dict[str, int]:
    """Places by name, with the base model's prefix and without; optional parts are all there."""
    prefix = next((line[:-2] for line in family.heads[head].splitlines() if line.endswith(".**")), "")
    full = [name for name, _ in parameters(family, head, config, whole=True)]
    positions = {name: index for index, name in enumerate(full)}
    for index, name in enumerate(full):
        if name.startswith(prefix):
            positions.setdefault(name.removeprefix(prefix), index)
    return positions


def _parameter(name: str) -> str:
    """The parameter that a tensor is, or is a part of."""
    part = QUANTIZED_PARTS.fullmatch(name)
    path, _, last = name.rpartition(".")
    return f"{part['module']}.weight" if part else f"{path}.{OLD_NAMES[last]}" if last in OLD_NAMES else name


def _ends(positions: Mapping[str, int]) -> dict[str, int]:
    """The last place below each path."""
    ends: dict[str, int] = {}
    for name, index in positions.items():
        path = name
        while path:
            path = path.rpartition(".")[0]
            ends[path] = max(index, ends.get(path, 0))
    return ends


def _place(name: str, positions: Mapping[str, int], ends: Mapping[str, int]) -> Key:
    found = positions.get(_parameter(name))
    if found is not None:
        return found, name != _parameter(name), name
    path = name
    while path not in ends:
        path = path.rpartition(".")[0]
    return ends[path], True, name


def _natural(name: str) -> Key:
    """Numbers as numbers, words by their usual rank."""
    return tuple((_rank(word), int(word) if word.isdecimal() else -1, word) for word in name.split("."))


def _rank(word: str) -> float:
    if word in RANKS or word.isdecimal():
        return RANKS.get(word, UNKNOWN_RANK)
    near = [known for known in USUAL if len(known) > 1 and (word.endswith(f"_{known}") or word.startswith(f"{known}_"))]
    return RANKS[near[0]] if near else UNKNOWN_RANK
