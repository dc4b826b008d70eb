"""A checkpoint known by its config alone: tensors with types, and no weights."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path

from surgery.checkpoint import CONFIG, Checkpoint, SourceFile, TensorEntry
from surgery.checkpoint.header import Header
from surgery.checkpoint.home import Directory
from surgery.checkpoint.hub import locate
from surgery.checkpoint.inventory import inventory, model_types
from surgery.checkpoint.paths import SideFiles, read_json, stands
from surgery.errors import CheckpointError, Problem
from surgery.types import TensorType

__all__ = ["open_config"]


def open_config(source: str) -> Checkpoint:
    """The checkpoint that a config.json describes: a directory that holds one, the file itself, or a Hub id.

    Weights that lie beside it are not looked at. Raises CheckpointError where there is none, or for a
    model that the inventory does not know.
    """
    location = locate(source, (CONFIG,))
    path = location.path / CONFIG if location.path.is_dir() else location.path
    if not stands(path) or path.suffix != ".json":
        fix = "--config-only takes a directory with a config.json, the file itself, or a Hub id"
        raise CheckpointError(Problem("holds no config.json", str(location.path), fix))
    config = read_json(path, path.parent)
    return Checkpoint(
        home=Directory(path.parent),
        identity=location.hub or _fingerprint(config),
        tensors=_entries(_types(config, path), path),
        files=(),
        config=config,
        metadata={},
        sides=SideFiles((), ()),
        notes=("planned from config.json alone: names and shapes are those of the class that it names",),
        is_config_only=True,
    )


def _types(config: Mapping[str, object], path: Path) -> dict[str, TensorType]:
    try:
        found = inventory(config)
    except CheckpointError as error:
        raise CheckpointError(*(Problem(problem.what, str(path), problem.fix) for problem in error.problems)) from None
    if found is None:
        what = f"has the model_type {config.get('model_type')!r}, whose tensors are not in the inventory"
        fix = f"plan with the weights at hand, without --config-only; known are {', '.join(model_types())}"
        raise CheckpointError(Problem(what, str(path), fix))
    return found


def _entries(types: Mapping[str, TensorType], path: Path) -> dict[str, TensorEntry]:
    nowhere = SourceFile(path.name, path, Header({}, {}, 0, 0, ""), 0)
    return {name: TensorEntry(type_, nowhere, 0, 0) for name, type_ in types.items()}


def _fingerprint(config: Mapping[str, object]) -> str:
    return "sha256:" + hashlib.sha256(b"config\0" + json.dumps(config, sort_keys=True).encode()).hexdigest()
