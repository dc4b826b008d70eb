"""Which files of a directory hold its tensors: one file, or shards and their index."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import cast

from surgery.checkpoint.paths import is_text, read_json, stands
from surgery.errors import CheckpointError, Problem

__all__ = ["ADAPTER_CONFIG", "CONFIG", "INDEX_NAME", "Weights", "find_weights"]

INDEX_NAME = "model.safetensors.index.json"
SINGLE_NAME = "model.safetensors"
CONFIG = "config.json"
ADAPTER_CONFIG = "adapter_config.json"
ADAPTER_NAMES = ("adapter_model.safetensors", "adapter.safetensors")  # of PEFT, of AdapterHub
PICKLE_SUFFIXES = (".bin", ".pt", ".pth", ".ckpt")


@dataclass(frozen=True, slots=True)
class Weights:
    """The weight files of a directory in order, and for each tensor the file the index says it is in."""

    files: tuple[str, ...]
    weight_map: dict[str, str] | None  # None: there is no index
    is_adapter: bool = False


def find_weights(directory: Path) -> Weights:
    """The weight files of a Hub-layout `directory`. Raises CheckpointError if there are none."""
    index = directory / INDEX_NAME
    if stands(index):
        weight_map = _read_weight_map(index)
        _check_files(directory, index, weight_map)
        return Weights(tuple(sorted(set(weight_map.values()))), weight_map)
    if stands(directory / SINGLE_NAME):
        return Weights((SINGLE_NAME,), None)
    if stands(directory / ADAPTER_CONFIG):
        for name in ADAPTER_NAMES:
            if stands(directory / name):
                return Weights((name,), None, is_adapter=True)
    return Weights((_only_safetensors(directory),), None)


def _read_weight_map(index: Path) -> dict[str, str]:
    weight_map = read_json(index, index.parent).get("weight_map")
    items = cast(dict[str, object], weight_map) if isinstance(weight_map, dict) else {}
    if not items or not all(is_text(key) and isinstance(value, str) for key, value in items.items()):
        what = "has no `weight_map` from tensor names to file names"
        raise CheckpointError(Problem(what, str(index), "download the index again"))
    return cast(dict[str, str], items)


def _check_files(directory: Path, index: Path, weight_map: dict[str, str]) -> None:
    problems: list[Problem] = []
    for file in sorted(set(weight_map.values())):
        tensors = [name for name, where in weight_map.items() if where == file]
        if not _is_file_name(file):
            what = f"maps `{tensors[0]}` to {file!r}, which is no safetensors file beside it"
            problems.append(Problem(what, str(index), "an index names files in its own directory only"))
        elif not stands(directory / file):
            what = f"names the shard `{file}` ({len(tensors)} tensors), which is missing"
            problems.append(Problem(what, str(index), f"download `{file}` again"))
    if problems:
        raise CheckpointError(*problems)


def _is_file_name(name: str) -> bool:
    return is_text(name) and Path(name).name == name and name.endswith(".safetensors") and "\0" not in name


def _only_safetensors(directory: Path) -> str:
    names = sorted(path.name for path in directory.glob("*.safetensors"))
    if len(names) == 1:
        return names[0]
    if names:
        what = f"has {len(names)} safetensors files and no {INDEX_NAME}"
        raise CheckpointError(Problem(what, str(directory), "name one file as the source, or restore the index"))
    pickles = sorted(path.name for path in directory.iterdir() if path.suffix in PICKLE_SUFFIXES)
    if pickles:
        what = f"has weights only as pickles ({', '.join(pickles[:3])}), which surgery never loads"
        fix = "convert them with a tool you trust: transformers' `save_pretrained` writes safetensors"
        raise CheckpointError(Problem(what, str(directory), fix))
    raise CheckpointError(
        Problem("holds no safetensors file", str(directory), f"expected {SINGLE_NAME} or {INDEX_NAME}")
    )
