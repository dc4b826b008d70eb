"""The keys and values that a prefix stands before: how many heads there are in each layer, and how wide one is.

Why not PEFT's own rule: it knows only configs that say `num_key_value_heads`; where a model shares one head among
all (Falcon) or has heads of a width of their own (T5), it takes another shape and fails at the first forward.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import cast

from surgery.checkpoint.architecture import Kind
from surgery.errors import OpError, Problem
from surgery.formats.peft.prompts import (
    HEAD_COUNTS,
    LAYER_COUNTS,
    WIDTHS,
    Sizes,
    count,
    num_layers,
    text_config,
    token_width,
)
from surgery.op import Scene

__all__ = ["prefix_sizes"]

DECODER_LAYERS = ("num_decoder_layers", "decoder_layers")  # whose cache a prefix of an encoder-decoder fills
DECODER_HEADS = ("decoder_attention_heads",)
T5 = ("t5", "mt5", "umt5", "longt5", "switch_transformers", "pop2piano", "udop")

# Models that take no past keys and values, or not those of a prefix (transformers 5.23, each tried with PEFT 0.21.2).
WITHOUT_PREFIX = (
    "albert",
    "deberta",
    "deberta-v2",
    "distilbert",
    "longformer",
    "mobilebert",
    "modernbert",
    "mpnet",
    "openai-gpt",
    "xlnet",
)

# Entries of a config by which a model's layers keep something else than keys and values of one width.
OTHER_STATES = {
    "kv_lora_rank": "compresses its keys and values (MLA)",
    "num_kv_shared_layers": "shares keys and values among layers",
    "global_head_dim": "has layers of unlike key and value width",
    "num_global_key_value_heads": "has layers of unlike key and value width",
    "per_layer_config": "has layers of unlike key and value width",
    "ssm_cfg": "has layers without keys and values",
    "mamba_d_state": "has layers without keys and values",
    "state_size": "has layers without keys and values",
    "linear_num_key_heads": "has layers without keys and values",
}
_ATTENDING = re.compile(r"(full|sliding|chunked|global|local)(_attention)?|attention|block_sparse")
_KEYS_AND_VALUES = re.compile(r"(.*\.)?(self_attn|attn|attention|SelfAttention|self)\.(\w+\.)*(k|v|key|value)(_proj)?")


def prefix_sizes(scene: Scene) -> Sizes:
    """Width of all heads together, layers and heads of the keys and values.

    Raises OpError for a model that takes no prefix, layers of unlike width, and what config.json does not say.
    """
    config = text_config(scene)
    _check_takes_prefix(config)
    is_t5 = config.get("model_type") in T5
    query_heads = count(config, ("num_heads",) if is_t5 else (*DECODER_HEADS, *HEAD_COUNTS))
    heads = _key_value_heads(config, query_heads)
    width = _head_width(scene, query_heads, "d_kv" if is_t5 else "head_dim")
    _check_widths(scene, heads * width)
    keys = (*DECODER_LAYERS, *LAYER_COUNTS)
    return Sizes(heads * width, num_layers(scene, keys), heads)


def _check_takes_prefix(config: Mapping[str, object]) -> None:
    model_type = config.get("model_type")
    reason = "takes no past keys and values" if model_type in WITHOUT_PREFIX else None
    reason = reason or next((reason for key, reason in OTHER_STATES.items() if config.get(key)), None)
    layer_types = config.get("layer_types")
    for layer_type in cast("list[object]", layer_types) if isinstance(layer_types, list) else []:
        if not _ATTENDING.fullmatch(str(layer_type)):
            reason = reason or f"has layers of the type {layer_type}, without keys and values"
    if reason:
        what = f"a model of the type {model_type} {reason}: PEFT cannot put a prefix before it"
        raise OpError(Problem(what, fix="use `attach.prompt_tuning` or `attach.p_tuning`"))


def _key_value_heads(config: Mapping[str, object], heads: int | None) -> int:
    """Heads of the keys and values in the cache of one layer, where the queries have `heads`."""
    model_type = config.get("model_type")
    if model_type in ("falcon", "gpt_bigcode") and heads is not None:
        return _shared_heads(config, heads)
    listed = config.get("num_key_value_heads")
    if isinstance(listed, list) and len(set(map(str, cast("list[object]", listed)))) > 1:
        what = f"layers of unlike key and value width: config.json says `num_key_value_heads: {listed}`"
        raise OpError(Problem(what, fix="one prefix cannot fit them all; use `attach.prompt_tuning`"))
    known = count(config, ("num_key_value_heads",)) or heads
    if known is None:
        what = f"config.json says by none of num_key_value_heads, {', '.join(HEAD_COUNTS)} how many heads there are"
        raise OpError(Problem(what, fix="complete config.json: the tensors do not tell where a head ends"))
    return known


def _shared_heads(config: Mapping[str, object], heads: int) -> int:
    """Falcon's and StarCoder's: one head for all queries, unless the config says otherwise."""
    if config.get("new_decoder_architecture"):
        return heads  # repeated before they are cached
    if config.get("multi_query", True):
        return 1
    return count(config, ("num_kv_heads",)) or heads


def _head_width(scene: Scene, heads: int | None, key: str) -> int:
    config = text_config(scene)
    said = count(config, (key,))
    if said is not None:
        return said
    width = count(config, WIDTHS) or token_width(scene)
    if width is None or heads is None:
        what = f"the width of a head is not known: config.json has none of {', '.join((key, *WIDTHS))}"
        raise OpError(Problem(what, fix="complete config.json"))
    if width % heads:
        what = f"config.json says that {width} is the width of {heads} heads together, which does not divide"
        raise OpError(Problem(what, fix="say `head_dim` in config.json"))
    return width // heads


def _check_widths(scene: Scene, width: int) -> None:
    """Where keys and values have Linears of their own, their outputs are what config.json says."""
    found: dict[int, str] = {}
    for path, module in scene.modules.items():
        weight = module.tensors.get(f"{path}.weight")
        if weight is None or len(weight.shape) != 2 or not weight.dtype.is_float:
            continue
        if module.kind is Kind.LINEAR and _KEYS_AND_VALUES.fullmatch(path):
            found.setdefault(weight.shape[0], path)
    if len(found) > 1:
        (one, first), (other, second), *_ = found.items()
        what = f"layers of unlike key and value width: `{first}` gives {one}, `{second}` {other}"
        raise OpError(Problem(what, fix="one prefix cannot fit them all; use `attach.prompt_tuning`"))
    for actual, path in found.items():
        if actual != width:
            what = f"keys and values are {width} wide by config.json, but `{path}` gives {actual}"
            raise OpError(Problem(what, fix="correct num_key_value_heads or head_dim in config.json"))
