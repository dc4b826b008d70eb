"""The size of the vocabulary: rows of embeddings and heads, and what config.json says of them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import cast

from surgery.checkpoint.architecture import Kind
from surgery.checkpoint.modules import Module, module_of
from surgery.graph import Node
from surgery.op import SOURCE, Finished, Model

__all__ = ["vocabulary_sizes", "with_vocabulary"]


def _nested(config: Mapping[str, object]) -> Mapping[str, object]:
    nested = config.get("text_config")
    return cast("Mapping[str, object]", nested) if isinstance(nested, Mapping) else {}


def _stated(config: Mapping[str, object]) -> object:
    return config.get("vocab_size", _nested(config).get("vocab_size"))


def vocabulary_sizes(
    config: Mapping[str, object], source: Model, nodes: Mapping[str, Node], modules: Mapping[str, Module]
) -> set[int]:
    """The rows of those embeddings and heads that had one for each token that `config` counts."""
    size = _stated(config)
    return {
        node.type.shape[0]
        for name, node in nodes.items()
        if name in source.nodes and source.nodes[name].type.shape[:1] == (size,)
        if (module := modules.get(module_of(name))) and module.kind in (Kind.EMBEDDING, Kind.HEAD)
    }


def with_vocabulary(config: Mapping[str, object], finished: Finished) -> Mapping[str, object]:
    """`config` with the new number of tokens, where the edits left embeddings of another one."""
    sizes = vocabulary_sizes(config, finished.models[SOURCE], finished.nodes, finished.modules) - {_stated(config)}
    if len(sizes) != 1:
        return config
    (size,) = sizes
    if "vocab_size" in _nested(config):
        config = {**config, "text_config": {**_nested(config), "vocab_size": size}}
    return {**config, "vocab_size": size} if "vocab_size" in config else config
