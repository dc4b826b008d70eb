"""Trained tokens: single rows of an embedding, beside whatever else an adapter does.

Source: PEFT 0.21, `TrainableTokensLayer`; of a tied pair it sets the rows on both sides.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import cast

from surgery.formats.peft.base import Misfit, Target
from surgery.formats.peft.method import Change, Part
from surgery.formats.peft.patch import Step
from surgery.formats.peft.scaling import SetRows
from surgery.formats.peft.settings import Settings

__all__ = ["TOKENS", "TOKEN_SUFFIXES", "token_change"]

TOKENS = "tokens"
TOKEN_SUFFIXES = {"token_adapter.trainable_tokens_delta": TOKENS, "trainable_tokens_delta": TOKENS}


def token_change(part: Part, target: Target, settings: Settings) -> Change:
    """The rows of the embedding that are set. Raises Misfit if they do not fit."""
    ((num_rows, width),) = part.matrices(TOKENS)
    weight = target.type(target.weight)
    indices = _indices(part.path, settings)
    if len(indices) != num_rows or weight.shape[1:] != (width,):
        raise Misfit(f"has {num_rows} rows of {width} for {len(indices)} token indices and a weight {weight}")
    if not all(0 <= index < weight.shape[0] for index in indices):
        raise Misfit(f"sets row {max(indices)} of a weight {weight}: the vocabulary is another")
    return Change(target.weight, Step(SetRows(weight.shape, indices), part.inputs(TOKENS)), ties=True)


def _indices(path: str, settings: Settings) -> tuple[int, ...]:
    found = settings.config.get("trainable_token_indices") or settings.config.get("token_indices") or ()
    if isinstance(found, Mapping):
        named = cast("Mapping[str, object]", found)
        found = next((held for name, held in named.items() if path == name or path.endswith(f".{name}")), ())
    held = cast("list[object]", found) if isinstance(found, list) else []
    if not all(isinstance(index, int) for index in held):
        raise Misfit("has token indices that are no integers")
    return tuple(cast("list[int]", held))
