"""Whether two models mean the same tokens by the same rows."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import cast

from surgery.checkpoint import Checkpoint
from surgery.checkpoint.home import Home

__all__ = ["unlike_tokens"]

VOCABULARIES = ("tokenizer.model", "vocab.json", "vocab.txt", "spiece.model", "sentencepiece.bpe.model")


def unlike_tokens(first: Checkpoint, second: Checkpoint) -> str:
    """How the tokenizers beside two checkpoints differ; empty if they do not, or one has none."""
    mine, theirs = _tokens(first.home), _tokens(second.home)
    if mine is not None and theirs is not None:
        unlike = [token for token in {**mine, **theirs} if mine.get(token) != theirs.get(token)]
        if not unlike:
            return ""
        token = unlike[0]
        return f"{len(unlike)} tokens, such as {token!r}: {mine.get(token)} here, {theirs.get(token)} there"
    for name in VOCABULARIES:
        here, there = _bytes(first.home, name), _bytes(second.home, name)
        if here is not None and there is not None and here != there:
            return f"the two `{name}`"
    return ""


def _bytes(home: Home, name: str) -> bytes | None:
    return home.read(name) if home.has(name) else None


def _tokens(home: Home) -> Mapping[str, object] | None:
    """Token → id, of a tokenizer.json; None without one that can be read so."""
    raw = _bytes(home, "tokenizer.json")
    try:
        content = cast("object", json.loads(raw)) if raw else None
        assert isinstance(content, dict)
        fields = cast("dict[str, dict[str, object] | list[dict[str, object]]]", content)
        vocabulary = cast("dict[str, object]", fields["model"])["vocab"]
        added = cast("list[dict[str, object]]", fields.get("added_tokens", []))
        if isinstance(vocabulary, list):  # of a unigram model: [token, score], in order of the ids
            pieces = cast("list[list[object]]", vocabulary)
            vocabulary = {str(piece[0]): index for index, piece in enumerate(pieces)}
        tokens = cast("dict[str, object]", vocabulary)
        return {**tokens, **{str(token["content"]): token["id"] for token in added}}
    except (AssertionError, ValueError, KeyError, IndexError, TypeError, RecursionError):
        return None
