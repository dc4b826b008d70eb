"""Which files of a directory hold its tensors: one file, or shards and their index."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import cast

from surgery.checkpoint.home import Home, read_json
from surgery.checkpoint.paths import is_text
from surgery.errors import CheckpointError, Problem

__all__ = ["ADAPTER_CONFIG", "CONFIG", "INDEX_NAME", "Weights", "find_weights"]

INDEX_NAME = "model.safetensors.index.json"
SINGLE_NAME = "model.safetensors"
CONFIG = "config.json"
ADAPTER_CONFIG = "adapter_config.json"
ADAPTER_NAMES = ("adapter_model.safetensors", "adapter.safetensors")  # of PEFT, of AdapterHub
MOST_PROBLEMS = 50  # more of them are read by nobody
PICKLE_SUFFIXES = (".bin", ".pt", ".pth", ".ckpt")


@dataclass(frozen=True, slots=True)
class Weights:
    """The weight files of a directory in order, and for each tensor the file the index says it is in."""

    files: tuple[str, ...]
    weight_map: dict[str, str] | None  # None: there is no index
    is_adapter: bool = False


def find_weights(home: Home) -> Weights:
    """The weight files of a directory in the Hub's layout. Raises CheckpointError if there are none."""
    if home.has(INDEX_NAME):
        weight_map = _read_weight_map(home)
        _check_files(home, weight_map)
        return Weights(tuple(sorted(set(weight_map.values()))), weight_map)
    if home.has(SINGLE_NAME):
        return Weights((SINGLE_NAME,), None)
    if home.has(ADAPTER_CONFIG):
        for name in ADAPTER_NAMES:
            if home.has(name):
                return Weights((name,), None, is_adapter=True)
    return Weights((_only_safetensors(home),), None)


def _read_weight_map(home: Home) -> dict[str, str]:
    weight_map = read_json(home, INDEX_NAME).get("weight_map")
    items = cast(dict[str, object], weight_map) if isinstance(weight_map, dict) else {}
    if not items or not all(is_text(key) and isinstance(value, str) for key, value in items.items()):
        what = "has no `weight_map` from tensor names to file names"
        raise CheckpointError(Problem(what, home.at(INDEX_NAME), "download the index again"))
    return cast(dict[str, str], items)


def _check_files(home: Home, weight_map: dict[str, str]) -> None:
    problems: list[Problem] = []
    index = home.at(INDEX_NAME)
    held: dict[str, list[str]] = {}
    for name, file in weight_map.items():
        held.setdefault(file, []).append(name)
    for file, tensors in sorted(held.items()):
        if not _is_file_name(file):
            what = f"maps `{tensors[0]}` to {file!r}, which is no safetensors file beside it"
            problems.append(Problem(what, index, "an index names files in its own directory only"))
        elif not home.has(file):
            what = f"names the shard `{file}` ({len(tensors)} tensors), which is missing"
            problems.append(Problem(what, index, f"download `{file}` again"))
    problems += _twins(home, held) if home.path and not problems else ()
    if problems:
        raise CheckpointError(*problems[:MOST_PROBLEMS])


def _twins(home: Home, files: Iterable[str]) -> Iterator[Problem]:
    """Names that lead to one file: its header would be read once for each of them."""
    seen: dict[tuple[int, int], str] = {}
    for file in files:
        try:
            found = Path(home.at(file)).stat()
        except OSError:  # a link that leads nowhere, which is reported when it is read
            continue
        first = seen.setdefault((found.st_dev, found.st_ino), file)
        if first != file:
            yield Problem(
                f"names `{first}` and `{file}`, which are one file", home.at(INDEX_NAME), "remove one of them"
            )


def _is_file_name(name: str) -> bool:
    return name.isprintable() and Path(name).name == name and name.endswith(".safetensors")


def _only_safetensors(home: Home) -> str:
    names = [name for name in home.names() if name.endswith(".safetensors")]
    if len(names) == 1:
        return names[0]
    if names:
        what = f"has {len(names)} safetensors files and no {INDEX_NAME}"
        raise CheckpointError(Problem(what, str(home), "name one file as the source, or restore the index"))
    pickles = [name for name in home.names() if name.endswith(PICKLE_SUFFIXES)]
    if pickles:
        what = f"has weights only as pickles ({', '.join(pickles[:3])}), which surgery never loads"
        fix = "convert them with a tool you trust: transformers' `save_pretrained` writes safetensors"
        raise CheckpointError(Problem(what, str(home), fix))
    raise CheckpointError(Problem("holds no safetensors file", str(home), f"expected {SINGLE_NAME} or {INDEX_NAME}"))
