"""`Checkpoint`: tensor name → type and extent, plus config and side files, from headers alone."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from surgery.checkpoint.header import Header, read_header
from surgery.checkpoint.home import Directory, Home, LoneFile, read_json
from surgery.checkpoint.hub import find
from surgery.checkpoint.index import ADAPTER_CONFIG, CONFIG, INDEX_NAME, Weights, find_weights
from surgery.checkpoint.paths import ADAPTER_BESIDE, SideFiles, assorted, contained, modified, open_regular, side_files
from surgery.checkpoint.remote import RemoteFile, fetch_once, in_parallel
from surgery.checkpoint.repository import Repository, read_headers
from surgery.errors import CheckpointError, Problem
from surgery.types import TensorType

__all__ = ["ADAPTER_CONFIG", "CONFIG", "Checkpoint", "SourceFile", "TensorEntry", "open_checkpoint"]

SHA256 = re.compile(r"[0-9a-f]{64}")
MAX_RECORD_BYTES = 65536  # a quantization record is a few hundred bytes of JSON
SMALL_RECORD_BYTES = 1024
MOST_RECORDS_AHEAD = 10_000


@dataclass(frozen=True, slots=True)
class SourceFile:
    """One weight file: its name in the checkpoint, where it lies, and what tells it from another."""

    name: str
    place: Path | RemoteFile
    header: Header
    changed_ns: int  # 0 on the Hub, where a file of a commit never changes
    sha256: str = ""  # as the Hub lists it; empty for what is not from there


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

    home: Home  # where its other files are
    identity: str  # `org/name@commit`, or `sha256:…` over the names and headers of a local one
    tensors: Mapping[str, TensorEntry]
    files: tuple[SourceFile, ...]
    config: Mapping[str, object] | None
    metadata: Mapping[str, str]
    sides: SideFiles
    notes: tuple[str, ...]
    is_adapter: bool = False
    is_config_only: bool = False  # types from the config alone: there are no files, and nothing can be read

    @property
    def num_bytes(self) -> int:
        """Bytes of its weight files; of its tensors, where there are no files."""
        if self.is_config_only:
            return sum(entry.type.num_bytes for entry in self.tensors.values())
        return sum(file.header.file_bytes for file in self.files)

    @property
    def is_remote(self) -> bool:
        """Whether weights of it are read from the Hub."""
        return any(isinstance(file.place, RemoteFile) for file in self.files)

    def read_record(self, name: str) -> bytes:
        """The bytes of a small tensor that describes others (at most 64 KiB)."""
        entry = self.tensors[name]
        if entry.stop - entry.start > MAX_RECORD_BYTES:
            raise CheckpointError(Problem(f"`{name}` is {entry.type}: too large for a record", str(entry.file.place)))
        if isinstance(entry.file.place, RemoteFile):
            if entry.file.place.known.gaps(entry.start, entry.stop):
                in_parallel(_fetch, self._records_like(name))
            return fetch_once(entry.file.place, entry.start, entry.stop)
        with open_regular(entry.file.place) as file:
            file.seek(entry.start)
            return file.read(entry.stop - entry.start)

    def _records_like(self, name: str) -> list[TensorEntry]:
        """That record, and small ones of the same kind: they are wanted one after the other, and wait side by side."""
        kind = name.rpartition(".")[2]
        others = (entry for other, entry in self.tensors.items() if other != name and other.rpartition(".")[2] == kind)
        small = [entry for entry in others if entry.stop - entry.start <= SMALL_RECORD_BYTES]
        return [self.tensors[name], *small[:MOST_RECORDS_AHEAD]]


def _fetch(entry: TensorEntry) -> None:
    if isinstance(entry.file.place, RemoteFile):
        fetch_once(entry.file.place, entry.start, entry.stop)


def open_checkpoint(source: str, *, download: bool = False) -> Checkpoint:
    """Open a directory, a `.safetensors` file or a Hub id (`org/name[@revision]`), reading headers only.

    What is on the Hub is read there, or fetched to the client's cache first if `download` says so.
    Raises CheckpointError with every problem found: missing or truncated files, headers that lie,
    an index that does not match its shards, links that lead out.
    """
    location = find(source, download=download)
    if isinstance(location, Repository):
        return _open_repository(location)
    if location.path.is_dir():
        return _open_directory(location.path, location.hub)
    file = _source_file(location.path.name, location.path)
    tensors = {name: _entry(file, name) for name in file.header.tensors}
    return Checkpoint(
        home=LoneFile(location.path),
        identity=_fingerprint((file,)),
        tensors=_in_disk_order(tensors),
        files=(file,),
        config=None,
        metadata=file.header.metadata,
        sides=SideFiles((), ()),
        notes=(),
    )


def _open_directory(directory: Path, hub: str) -> Checkpoint:
    home = Directory(directory)
    weights = find_weights(home)
    for name in weights.files:
        contained(directory / name, directory)
    files = tuple(_source_file(name, directory / name, is_blob=bool(hub)) for name in weights.files)
    sides = side_files(directory, (*weights.files, _config_name(weights)))
    return _joined(home, hub or _fingerprint(files), weights, files, sides)


def _open_repository(repository: Repository) -> Checkpoint:
    weights = find_weights(repository)
    cached = {name: repository.cached(name) for name in weights.files}
    remote = {name: repository.files[name] for name, path in cached.items() if path is None}
    headers = read_headers(remote, weights.weight_map)
    files = tuple(
        _source_file(name, path, is_blob=True)
        if path
        else SourceFile(name, remote[name], headers[name], 0, remote[name].sha256)
        for name, path in cached.items()
    )
    sides = assorted(repository.files, (*weights.files, _config_name(weights)))
    return _joined(repository, str(repository), weights, files, sides)


def _config_name(weights: Weights) -> str:
    return ADAPTER_CONFIG if weights.is_adapter else CONFIG


def _joined(home: Home, identity: str, weights: Weights, files: tuple[SourceFile, ...], sides: SideFiles) -> Checkpoint:
    tensors, notes = _join(home, weights, files)
    if sides.left:
        notes.append(f"weights in other formats are left behind: {', '.join(sides.left)}")
    if ADAPTER_BESIDE in sides.left:
        notes.append(
            f"`{ADAPTER_BESIDE}` is left behind: transformers would put the adapter beside a base into the model"
        )
    config_name = _config_name(weights)
    return Checkpoint(
        home=home,
        identity=identity,
        tensors=_in_disk_order(tensors),
        files=files,
        config=read_json(home, config_name) if home.has(config_name) else None,
        metadata={key: value for file in reversed(files) for key, value in file.header.metadata.items()},
        sides=sides,
        notes=tuple(notes),
        is_adapter=weights.is_adapter,
    )


def _source_file(name: str, path: Path, *, is_blob: bool = False) -> SourceFile:
    """A local file; `is_blob` if it is of the Hub client's cache, where blobs are named by their digest."""
    header = read_header(path)
    changed_ns = modified(path)
    blob = path.resolve().name if is_blob else ""
    return SourceFile(name, path, header, changed_ns, blob if SHA256.fullmatch(blob) else "")


def _entry(file: SourceFile, name: str) -> TensorEntry:
    extent = file.header.tensors[name]
    return TensorEntry(extent.type, file, extent.start, extent.stop)


def _join(home: Home, weights: Weights, files: tuple[SourceFile, ...]) -> tuple[dict[str, TensorEntry], list[str]]:
    """The tensors of all shards, held against the index."""
    tensors: dict[str, TensorEntry] = {}
    problems: list[Problem] = []
    at = home.at(INDEX_NAME)
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


def _fingerprint(files: tuple[SourceFile, ...]) -> str:
    lines = [f"{file.name}\0{file.header.file_bytes}\0{file.header.sha256}" for file in files]
    return "sha256:" + hashlib.sha256("\n".join(lines).encode()).hexdigest()
