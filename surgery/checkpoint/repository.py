"""A repository on the Hub at one commit, as the Hub lists it: nothing is fetched before it is asked for.

What the client's cache holds of that commit, whole by its size, is read from there.
"""

from __future__ import annotations

import json
import re
import threading
from collections.abc import Iterable, Iterator, Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any, BinaryIO, cast

from surgery.checkpoint.header import Header, parse_header
from surgery.checkpoint.home import Directory
from surgery.checkpoint.paths import check_small, is_text
from surgery.checkpoint.remote import (
    Digest,
    RemoteFile,
    attempts,
    fetch_bytes,
    fetch_once,
    hub_problem,
    in_parallel,
    pieces,
)
from surgery.errors import CheckpointError, Problem

if TYPE_CHECKING:
    from huggingface_hub.hf_api import RepoFile, RepoFolder, RepoSibling

__all__ = ["COMMIT", "Repository", "list_repository", "read_headers"]

COMMIT = re.compile(r"[0-9a-f]{40}")
LENGTH_BYTES = 8  # which a safetensors file starts with
LARGE_HEADER_BYTES = 1 << 20  # more is read of one file after the other
UNKNOWN_HEADER_BYTES = 64 << 10  # of a file that no index says anything of
HEADER_BYTES = 128  # of a header besides its tensors
ENTRY_BYTES = 64  # of a tensor's entry besides its name and its offsets


_large = threading.Lock()


@dataclass(frozen=True, slots=True)
class Repository:
    """The files of a repository by name."""

    repo: str
    commit: str
    files: Mapping[str, RemoteFile]

    def __str__(self) -> str:
        return f"{self.repo}@{self.commit}"

    @property
    def path(self) -> Path | None:
        """None: it is nowhere in the file system."""
        return None

    def names(self) -> list[str]:
        """The files at its top, sorted."""
        return sorted(name for name in self.files if "/" not in name)

    def has(self, name: str) -> bool:
        """Whether it is listed."""
        return name in self.files

    def at(self, name: str) -> str:
        """What errors call the file."""
        return f"{self}/{name}"

    def size(self, name: str) -> int:
        """Bytes of the file."""
        return self.files[name].size

    def cached(self, name: str) -> Path | None:
        """Where the client's cache holds the whole file, if it does."""
        from huggingface_hub import try_to_load_from_cache

        found = try_to_load_from_cache(self.repo, name, revision=self.commit)
        if not isinstance(found, str) or Path(found).stat().st_size != self.files[name].size:
            return None
        return Path(found)

    def read(self, name: str) -> bytes:
        """All of a small file. Raises CheckpointError."""
        check_small(self.files[name].size, self.at(name))
        cached = self._sound(name)
        return Directory(_snapshot(cached, name)).read(name) if cached else fetch_bytes(self.files[name])

    def pieces(self, name: str) -> Iterator[bytes]:
        """All of a file, a piece at a time. Raises CheckpointError."""
        cached = self._sound(name)
        return Directory(_snapshot(cached, name)).pieces(name) if cached else pieces(self.files[name])

    def _sound(self, name: str) -> Path | None:
        """Where the cache holds the file as it is listed: what is no weights is small enough to look."""
        cached = self.cached(name)
        if cached is None:
            return None
        digest = Digest(self.files[name])
        try:
            for piece in Directory(_snapshot(cached, name)).pieces(name):
                digest.update(piece)
            digest.check()
        except CheckpointError:
            return None
        return cached


def list_repository(repo: str, revision: str) -> Repository:
    """The repository at the commit that `revision` is now; in one request. Raises what the client raises."""
    from huggingface_hub import HfApi, constants

    api = HfApi(endpoint=constants.ENDPOINT)
    timeout = constants.HF_HUB_DOWNLOAD_TIMEOUT
    found = attempts(lambda: api.model_info(repo, revision=revision or None, files_metadata=True, timeout=timeout))
    commit = found.sha or ""
    if not COMMIT.fullmatch(commit):
        what = f"the Hub does not say at which commit {repo} is"
        raise CheckpointError(Problem(what, f"{repo}@{revision}", "pin one: org/name@<commit>"))
    listed: Iterable[RepoSibling | RepoFile] = found.siblings or []
    if any(entry.size is None for entry in listed):  # not every mirror knows `blobs`
        tree = attempts(lambda: _distinct(api.list_repo_tree(repo, revision=commit, recursive=True)))
        listed = cast("list[RepoFile]", [entry for entry in tree if hasattr(entry, "size")])
    files = [_file(repo, commit, entry) for entry in listed]
    return Repository(repo, commit, {file.name: file for file in files if _is_seen(file.name)})


def _distinct(tree: Iterable[RepoFile | RepoFolder]) -> list[RepoFile | RepoFolder]:
    """All entries of a listing that comes in pages, unless one leads back to another."""
    found: dict[str, RepoFile | RepoFolder] = {}
    for entry in tree:
        if entry.path in found:
            raise CheckpointError(Problem("is listed twice", entry.path, "ask whoever runs that Hub"))
        found[entry.path] = entry
    return list(found.values())


def _file(repo: str, commit: str, entry: RepoSibling | RepoFile) -> RemoteFile:
    lfs = cast("Mapping[str, object]", entry.lfs or {})
    name = str(cast("Any", entry).rfilename)
    file = RemoteFile(repo, commit, name, entry.size or 0, str(lfs.get("sha256", "")), entry.blob_id or "")
    if not _is_inside(file.name):
        what = f"lists a file whose name is no path in it: {file.name!r}"
        raise CheckpointError(Problem(what, f"{repo}@{commit}", "ask whoever runs that Hub"))
    return file


def _is_inside(name: str) -> bool:
    parts = PurePosixPath(name).parts
    is_plain = is_text(name) and "\0" not in name and "\\" not in name and "/".join(parts) == name
    return is_plain and ".." not in parts and name not in ("", ".") and not name.startswith("/")


def _is_seen(name: str) -> bool:
    return not any(part.startswith(".") for part in name.split("/"))


def _snapshot(cached: Path, name: str) -> Path:
    """The directory of a snapshot in the client's cache, from one of its files."""
    return cached.parents[name.count("/")]


def read_headers(files: Mapping[str, RemoteFile], weight_map: Mapping[str, str] | None) -> dict[str, Header]:
    """The headers of weight files, most of them in one small request each. Raises CheckpointError.

    `weight_map` says which tensors are where: from their names the length of a header can be guessed.
    """
    tensors: dict[str, list[str]] = {name: [] for name in files}
    for tensor, where in (weight_map or {}).items():
        tensors.get(where, []).append(tensor)
    headers = in_parallel(lambda name: _read_header(files[name], tensors[name]), files)
    return dict(zip(files, headers, strict=True))


def _read_header(file: RemoteFile, tensors: list[str]) -> Header:
    try:
        start = fetch_once(file, 0, min(_guess(file, tensors), file.size))
        with _large if int.from_bytes(start[:LENGTH_BYTES], "little") > LARGE_HEADER_BYTES else nullcontext():
            return parse_header(cast(BinaryIO, _Head(file)), file.size, str(file))
    except CheckpointError:
        raise
    except Exception as error:  # of the client
        raise CheckpointError(hub_problem(str(file), error)) from error


def _guess(file: RemoteFile, tensors: list[str]) -> int:
    if not tensors:
        return UNKNOWN_HEADER_BYTES
    offsets = 2 * len(str(file.size))
    guess = HEADER_BYTES + sum(ENTRY_BYTES + offsets + len(json.dumps(name)) for name in tensors)
    return min(guess, LARGE_HEADER_BYTES)


class _Head:
    """The start of a file, of which no more is fetched than is asked for."""

    def __init__(self, file: RemoteFile) -> None:
        self._file = file
        self._position = 0

    def read(self, size: int) -> bytes:
        """The next bytes, fewer at the end of the file."""
        stop = min(self._position + size, self._file.size)
        data = fetch_once(self._file, self._position, stop)
        self._position = stop
        return data
