"""Comparing two open checkpoints: every pair of tensors of one shape under a kernel, streamed like an output."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import numpy as np

from surgery.checkpoint import ADAPTER_CONFIG, CONFIG, Checkpoint
from surgery.comparison.kernel import FIGURES, Difference, figures_of
from surgery.comparison.model import Comparison, ConfigDifference, Figures, TensorDifference, total
from surgery.comparison.weights import BITS_ONLY, Weight, weights_of
from surgery.cost import cost_of
from surgery.graph import ERROR_UNIT, Graph, Node
from surgery.layout import OutputFile, Placed
from surgery.op import SOURCE
from surgery.stream import Chunk, Resources, Stream

__all__ = ["compare"]

OTHER = "other"  # what the stream calls B; A is its source
ROW_BYTES = 8 * FIGURES

Report = Callable[[int, int], None]


def compare(first: Checkpoint, second: Checkpoint, resources: Resources, report: Report) -> Comparison:
    """What `second` is to `first`; `report` is called with the bytes compared so far, and in all.

    Raises OpError for a 4-bit weight that does not hold together, CheckpointError for a source that fails.
    """
    graph = Graph()
    before, after = weights_of(SOURCE, first, graph), weights_of(OTHER, second, graph)
    pairs = {name: list(_pairs(name, before[name], after[name], graph)) for name in before if name in after}
    nodes = {pair.name: pair.node for held in pairs.values() for pair in held if pair.node.type.num_elements}
    figures = _streamed(nodes, {SOURCE: first, OTHER: second}, resources, report)
    tensors = [_difference(name, before[name], after.get(name), pairs.get(name, []), figures) for name in before]
    tensors += [TensorDifference(name, None, weight.stored) for name, weight in after.items() if name not in before]
    return Comparison(
        first=first.identity,
        second=second.identity,
        tensors=tuple(tensors),
        config_name=ADAPTER_CONFIG if first.is_adapter else CONFIG,
        config=_configs(first, second),
        notes=tuple(_notes(first, second)),
    )


@dataclass(frozen=True, slots=True)
class _Pair:
    """A tensor, or a part of a 4-bit weight, under the kernel; `name` is unique."""

    name: str
    node: Node


def _pairs(name: str, a: Weight, b: Weight, graph: Graph) -> Iterator[_Pair]:
    """The value, if there is one to be compared; then the parts, where both are stored in the same ones."""
    bits_only = a.stored.type.dtype in BITS_ONLY or b.stored.type.dtype in BITS_ONLY
    if a.stored.type.shape == b.stored.type.shape and (not bits_only or a.stored == b.stored):
        yield _Pair(name, _pair(a.node, b.node, graph, bits_only=bits_only))
    if a.parts and _types(a) == _types(b):
        for part, node in a.parts.items():
            yield _Pair(f"{part}\0part", _pair(node, b.parts[part], graph, bits_only=True))


def _pair(a: Node, b: Node, graph: Graph, *, bits_only: bool) -> Node:
    (node,) = graph.apply(Difference(bits_only), a, b)
    return node


def _types(weight: Weight) -> dict[str, object]:
    return {part: node.type for part, node in weight.parts.items()}


def _difference(
    name: str, a: Weight, b: Weight | None, pairs: list[_Pair], figures: Mapping[str, Figures]
) -> TensorDifference:
    if b is None:
        return TensorDifference(name, a.stored, None)
    values = [figures.get(pair.name, Figures()) for pair in pairs if pair.name == name]
    parts = [figures[pair.name] for pair in pairs if pair.name != name]
    compared = parts or ([] if a.parts or b.parts else values)
    is_same = a.stored == b.stored and bool(compared) and not total(compared).num_different
    return TensorDifference(name, a.stored, b.stored, values[0] if values else None, is_same)


# Streaming


def _streamed(
    nodes: Mapping[str, Node], checkpoints: Mapping[str, Checkpoint], resources: Resources, report: Report
) -> dict[str, Figures]:
    """The figures of every node by its name."""
    if not nodes:
        return {}
    file = _laid_out(nodes)
    num_read = sum(model.num_bytes for model in checkpoints.values())
    num_remote = sum(model.is_remote for model in checkpoints.values())
    cost = cost_of(list(nodes.values()), num_read, file.num_bytes, len(checkpoints[OTHER].tensors), num_remote)
    figures: dict[str, Figures] = {}
    weights = {name: sum(child.type.num_bytes for child in node.inputs) for name, node in nodes.items()}
    done, in_all = 0.0, sum(weights.values())
    with tempfile.TemporaryDirectory(prefix="surgery-") as scratch:
        stream = Stream(checkpoints, cost, resources, (), Path(scratch))
        try:
            for chunk in stream.chunks([file], {}):
                name = chunk.placed.name
                figures[name] = total([figures.get(name, Figures()), *_rows(chunk)])
                done += weights[name] * len(chunk.data) / (chunk.placed.stop - chunk.placed.start)
                report(round(done), in_all)
        finally:
            stream.close()
    return figures


def _rows(chunk: Chunk) -> Iterator[Figures]:
    node = chunk.placed.node
    kernel = cast(Difference, node.kernel)
    num_elements = node.inputs[0].type.num_elements
    rows = np.frombuffer(chunk.data).reshape(-1, FIGURES).tolist()
    for number, row in enumerate(rows, chunk.start // ROW_BYTES):
        num_here = min(ERROR_UNIT, num_elements - number * ERROR_UNIT)
        yield figures_of(row, num_here, has_values=not kernel.bits_only)


def _laid_out(nodes: Mapping[str, Node]) -> OutputFile:
    """The figures as a file that is never written."""
    placed: list[Placed] = []
    offset = 0
    for name, node in nodes.items():
        placed.append(Placed(name, node, offset, offset + node.type.num_bytes))
        offset += node.type.num_bytes
    return OutputFile("figures", b"", tuple(placed))


# Configs


def _configs(first: Checkpoint, second: Checkpoint) -> tuple[ConfigDifference, ...]:
    if first.config is None or second.config is None:
        return ()
    return tuple(_config_differences(first.config, second.config))


def _config_differences(
    a: Mapping[str, object], b: Mapping[str, object], prefix: str = ""
) -> Iterator[ConfigDifference]:
    for key in dict.fromkeys([*a, *b]):
        name, before, after = f"{prefix}{key}", a.get(key), b.get(key)
        inner_a, inner_b = _map(before), _map(after)
        if key not in a:
            yield ConfigDifference(name, "add", after=after)
        elif key not in b:
            yield ConfigDifference(name, "drop", before=before)
        elif inner_a is not None and inner_b is not None:
            yield from _config_differences(inner_a, inner_b, f"{name}.")
        elif json.dumps(before) != json.dumps(after):
            yield ConfigDifference(name, "change", before, after)


def _map(value: object) -> Mapping[str, object] | None:
    return cast("Mapping[str, object]", value) if isinstance(value, Mapping) else None


def _notes(first: Checkpoint, second: Checkpoint) -> Iterator[str]:
    lacking = [side for side, model in (("A", first), ("B", second)) if model.config is None]
    if len(lacking) == 1:
        yield f"{lacking[0]} has no config: configs are not compared"
    if first.is_adapter != second.is_adapter:
        yield f"{'A' if first.is_adapter else 'B'} is an adapter, the other is none"
