"""`Checkpoint`: tensor name → type and extent, plus config and side files, from headers alone."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from surgery.checkpoint.header import Header, read_header
from surgery.checkpoint.hub import locate
from surgery.checkpoint.index import ADAPTER_CONFIG, CONFIG, INDEX_NAME, Weights, find_weights
from surgery.checkpoint.paths import SideFiles, contained, read_json, side_files, stands
from surgery.errors import CheckpointError, Problem
from surgery.types import TensorType

__all__ = ["ADAPTER_CONFIG", "CONFIG", "Checkpoint", "SourceFile", "TensorEntry", "open_checkpoint"]

MAX_RECORD_BYTES = 65536  # a quantization record is a few hundred bytes of JSON


@dataclass(frozen=True, slots=True)
class SourceFile:
    """One weight file: its name in the checkpoint, its real path, and what tells it from another."""

    name: str
    path: Path
    header: Header
    mtime_ns: int


@dataclass(frozen=True, slots=True)
class TensorEntry:
    """A tensor on disk: its type, its file, and its bytes [start, stop) in it."""

    type: TensorType
    file: SourceFile
    start: int
    stop: int


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """What a source holds. `tensors` are in order of file and offset; no weight has been read.

    `config` is config.json; of an adapter directory it is adapter_config.json.
    """

    path: Path
    identity: str  # `org/name@commit`, or `sha256:…` over the names and headers of a local one
    tensors: Mapping[str, TensorEntry]
    files: tuple[SourceFile, ...]
    config: Mapping[str, object] | None
    metadata: Mapping[str, str]
    sides: SideFiles
    notes: tuple[str, ...]
    is_adapter: bool = False

    def read_record(self, name: str) -> bytes:
        """The bytes of a small tensor that describes others (at most 64 KiB)."""
        entry = self.tensors[name]
        if entry.stop - entry.start > MAX_RECORD_BYTES:
            raise CheckpointError(Problem(f"`{name}` is {entry.type}: too large for a record", str(entry.file.path)))
        with entry.file.path.open("rb") as file:
            file.seek(entry.start)
            return file.read(entry.stop - entry.start)


def open_checkpoint(source: str) -> Checkpoint:
    """Open a directory, a `.safetensors` file or a Hub id (`org/name[@revision]`), reading headers only.

    Raises CheckpointError with every problem found: missing or truncated files, headers that lie,
    an index that does not match its shards, links that lead out.
    """
    location = locate(source)
    if location.path.is_dir():
        return _open_directory(location.path, location.hub)
    file = _source_file(location.path.name, location.path)
    tensors = {name: _entry(file, name) for name in file.header.tensors}
    return Checkpoint(
        path=location.path,
        identity=_fingerprint((file,)),
        tensors=_in_disk_order(tensors),
        files=(file,),
        config=None,
        metadata=file.header.metadata,
        sides=SideFiles((), ()),
        notes=(),
    )


def _open_directory(directory: Path, hub: str) -> Checkpoint:
    weights = find_weights(directory)
    is_adapter = weights.is_adapter
    config_name = ADAPTER_CONFIG if is_adapter else CONFIG
    for name in weights.files:
        contained(directory / name, directory)
    files = tuple(_source_file(name, directory / name) for name in weights.files)
    tensors, notes = _join(directory, weights, files)
    sides = side_files(directory, (*weights.files, config_name))
    if sides.left:
        notes.append(f"weights in other formats are left behind: {', '.join(sides.left)}")
    return Checkpoint(
        path=directory,
        identity=hub or _fingerprint(files),
        tensors=_in_disk_order(tensors),
        files=files,
        config=_read_config(directory, config_name),
        metadata={key: value for file in reversed(files) for key, value in file.header.metadata.items()},
        sides=sides,
        notes=tuple(notes),
        is_adapter=is_adapter,
    )


def _source_file(name: str, path: Path) -> SourceFile:
    header = read_header(path)
    return SourceFile(name, path, header, path.stat().st_mtime_ns)


def _entry(file: SourceFile, name: str) -> TensorEntry:
    extent = file.header.tensors[name]
    return TensorEntry(extent.type, file, extent.start, extent.stop)


def _join(directory: Path, weights: Weights, files: tuple[SourceFile, ...]) -> tuple[dict[str, TensorEntry], list[str]]:
    """The tensors of all shards, held against the index."""
    tensors: dict[str, TensorEntry] = {}
    problems: list[Problem] = []
    at = str(directory / INDEX_NAME)
    for file in files:
        for name in file.header.tensors:
            if name in tensors:
                what = f"tensor `{name}` is in both `{tensors[name].file.name}` and `{file.name}`"
                problems.append(Problem(what, at, "remove one of them: which one is meant cannot be known"))
            tensors[name] = _entry(file, name)
    weight_map = weights.weight_map or {}
    for name, where in weight_map.items():
        if name not in tensors or tensors[name].file.name != where:
            elsewhere = f"; it is in `{tensors[name].file.name}`" if name in tensors else ""
            what = f"maps tensor `{name}` to `{where}`, which lacks it{elsewhere}"
            problems.append(Problem(what, at, f"download `{where}` and the index again"))
    if problems:
        raise CheckpointError(*problems)
    unlisted = [name for name in tensors if name not in weight_map] if weights.weight_map else []
    notes = [f"{len(unlisted)} tensors are in shards but not in the index: {', '.join(unlisted[:3])}"]
    return tensors, notes if unlisted else []


def _in_disk_order(tensors: dict[str, TensorEntry]) -> dict[str, TensorEntry]:
    return dict(sorted(tensors.items(), key=lambda item: (item[1].file.name, item[1].start, item[1].stop)))


def _read_config(directory: Path, name: str) -> dict[str, object] | None:
    path = directory / name
    return read_json(path, directory) if stands(path) else None


def _fingerprint(files: tuple[SourceFile, ...]) -> str:
    lines = [f"{file.name}\0{file.header.file_bytes}\0{file.header.sha256}" for file in files]
    return "sha256:" + hashlib.sha256("\n".join(lines).encode()).hexdigest()
