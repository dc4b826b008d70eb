"""What transformers 5 calls otherwise when it loads a checkpoint, and adapters with it.

Single experts are left out: PEFT renames these itself.
Source: transformers 5.23, `conversion_mapping.py`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

__all__ = ["live_name"]

# Pieces of paths, in order, by `model_type`.
_ATTENTION = (
    (r"attention\.attention\.([qkv])\w+", r"attention.\1_proj"),
    (r"attention\.output\.dense\b", "attention.o_proj"),
)
_VIT = (
    (r"\bencoder\.layer\.", "layers."),
    *_ATTENTION,
    (r"\bintermediate\.dense\b", "mlp.fc1"),
    (r"\boutput\.dense\b", "mlp.fc2"),
)
RENAMED = {
    "vit": _VIT,
    "deit": _VIT,
    "dinov2": _ATTENTION,
    "gpt_neox": ((r"^embed_out$", "lm_head"),),
    "mixtral": ((r"\bblock_sparse_moe\.gate\b", "mlp.gate"),),
}


def live_name(path: str, config: Mapping[str, object]) -> str:
    """What the module `path` of a checkpoint is called once it is loaded, but for the base model's prefix."""
    for piece, new in RENAMED.get(str(config.get("model_type")), ()):
        path = re.sub(piece, new, path)
    return path
