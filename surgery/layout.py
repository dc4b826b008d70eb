"""Where every output tensor will lie: its file and its offset, known before anything is read.

Tensors keep the order of the source. Since the format allows no gaps and loaders view tensors in
place, what would push the next tensor off its alignment goes to the end of its file.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from surgery.checkpoint.header import encode_header
from surgery.graph import Call, Node

__all__ = ["Layout", "OutputFile", "Placed", "lay_out"]


@dataclass(frozen=True, slots=True)
class Placed:
    """An output tensor and its bytes [start, stop), counted from the start of the data as in the header."""

    name: str
    node: Node
    start: int
    stop: int


@dataclass(frozen=True, slots=True)
class OutputFile:
    """One weight file. `tensors` are in order of their bytes."""

    name: str
    header: bytes
    tensors: tuple[Placed, ...]

    @property
    def num_bytes(self) -> int:
        """The size of the file."""
        return len(self.header) + (self.tensors[-1].stop if self.tensors else 0)

    def by_call(self) -> dict[Call, list[Placed]]:
        """The tensors by the evaluation that they are outputs of, in order of its first."""
        groups: dict[Call, list[Placed]] = {}
        for placed in self.tensors:
            groups.setdefault(placed.node.call, []).append(placed)
        return groups


@dataclass(frozen=True, slots=True)
class Layout:
    """The weight files, and the index where there are several."""

    files: tuple[OutputFile, ...]
    index: bytes  # empty with one file


def lay_out(
    outputs: Mapping[str, Node], shard_bytes: int, metadata: Mapping[str, str], stem: str, num_parameters: int
) -> Layout:
    """Shards of at most `shard_bytes` of data; outputs of one evaluation, and a larger tensor, stay whole."""
    shards = _split(_groups(outputs), shard_bytes)
    names = _file_names(stem, len(shards))
    metadata = {"format": "pt", **metadata}
    files = tuple(_file(name, shard, dict(metadata)) for name, shard in zip(names, shards, strict=True))
    return Layout(files, _index(files, num_parameters) if len(files) > 1 else b"")


Named = tuple[str, Node]


def _groups(outputs: Mapping[str, Node]) -> list[list[Named]]:
    groups: dict[object, list[Named]] = {}
    for name, node in outputs.items():
        groups.setdefault(node.call, []).append((name, node))
    return list(groups.values())


def _split(groups: Sequence[list[Named]], shard_bytes: int) -> list[list[Named]]:
    shards: list[list[Named]] = [[]]
    filled = 0
    for group in groups:
        num_bytes = sum(node.type.num_bytes for _, node in group)
        if shards[-1] and filled + num_bytes > shard_bytes:
            shards.append([])
            filled = 0
        shards[-1] += group
        filled += num_bytes
    return shards


def _file_names(stem: str, num_files: int) -> list[str]:
    if num_files == 1:
        return [f"{stem}.safetensors"]
    return [f"{stem}-{number:05d}-of-{num_files:05d}.safetensors" for number in range(1, num_files + 1)]


def _alignment_class(item: Named) -> tuple[int, int]:
    type_ = item[1].type
    alignment = type_.dtype.alignment
    if alignment == 8:
        return (0, 0)
    return (1, 0) if type_.num_bytes % 4 == 0 else (2, -alignment)


def _file(name: str, shard: list[Named], metadata: dict[str, str]) -> OutputFile:
    placed: list[Placed] = []
    offset = 0
    for tensor, node in sorted(shard, key=_alignment_class):
        placed.append(Placed(tensor, node, offset, offset + node.type.num_bytes))
        offset += node.type.num_bytes
    header = encode_header({item.name: (item.node.type, item.start) for item in placed}, metadata)
    return OutputFile(name, header, tuple(placed))


def _index(files: Sequence[OutputFile], num_parameters: int) -> bytes:
    total_size = sum(item.stop - item.start for file in files for item in file.tensors)
    weight_map = {item.name: file.name for file in files for item in file.tensors}
    content = {
        "metadata": {"total_parameters": num_parameters, "total_size": total_size},
        "weight_map": dict(sorted(weight_map.items())),
    }
    return (json.dumps(content, indent=2, ensure_ascii=False) + "\n").encode()
