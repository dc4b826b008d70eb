"""Where a source lies: a directory, a file, or a Hub repository at a pinned commit, fetched or read where it is."""

from __future__ import annotations

import re
import sys
from dataclasses import dataclass
from pathlib import Path

from surgery.checkpoint.paths import read_small, stands
from surgery.checkpoint.remote import hub_problem
from surgery.checkpoint.repository import COMMIT, Repository, list_repository
from surgery.errors import CheckpointError, Problem

__all__ = ["Location", "find", "locate"]

HUB_ID = re.compile(r"[\w.-]+/[\w.-]+(@[\w./-]+)?")
NOT_FETCHED = ("*.bin", "*.pt", "*.pth", "*.h5", "*.msgpack", "*.ot", "*.onnx", "*.gguf", "onnx/*", "openvino/*")


@dataclass(frozen=True, slots=True)
class Location:
    """A local path, and for a Hub repository its id with the commit, `org/name@<40 hex digits>`."""

    path: Path
    hub: str = ""


def find(source: str, *, download: bool) -> Location | Repository:
    """The place `source` names; a local path wins over a Hub id. Raises CheckpointError.

    A Hub repository is resolved to its commit; it is fetched to the client's cache if `download` says so, and looked
    for there if the Hub cannot be reached.
    """
    local = _local(source)
    if local or download:
        return local or _fetch(source, None)
    repo, _, revision = source.partition("@")
    try:
        return list_repository(repo, revision)
    except CheckpointError:
        raise
    except Exception as error:  # the client raises its own, httpx's and OSErrors alike
        found = _fetched(repo, revision) if type(error).__name__ != "RevisionNotFoundError" else None
        if found is None:
            raise CheckpointError(hub_problem(source, error)) from error
        return found


def locate(source: str, patterns: tuple[str, ...] | None = None) -> Location:
    """A local path, or where a Hub repository was fetched to. Raises CheckpointError.

    Of a repository, only files that match one of `patterns` are fetched; by default all but foreign weights.
    """
    return _local(source) or _fetch(source, patterns)


def _local(source: str) -> Location | None:
    """None for what can only be a Hub id."""
    path = Path(source).expanduser()
    if stands(path):
        return _cached(path) or Location(path)
    if source.startswith((".", "/", "~")) or not HUB_ID.fullmatch(source):
        fix = "give a directory, a .safetensors file, or a Hub id as org/name[@revision]"
        if not path.is_absolute():
            fix += f"; a relative path starts where you are, in {Path.cwd()}"
        raise CheckpointError(Problem("does not exist", source, fix))
    return None


def _cached(path: Path) -> Location | None:
    """The snapshot in a repository of the Hub client's cache (`models--org--name`): that of `main`, or the only one."""
    if not path.name.startswith("models--") or not stands(path / "snapshots"):
        return None
    main = path / "refs" / "main"
    found = sorted(snapshot.name for snapshot in (path / "snapshots").iterdir())
    commit = (
        read_small(main, path).decode(errors="replace").strip()
        if main.is_file()
        else found[0]
        if len(found) == 1
        else ""
    )
    if commit not in found or not COMMIT.fullmatch(commit):
        what = f"is a Hub cache with {len(found)} snapshots and no `refs/main` among them"
        raise CheckpointError(Problem(what, str(path), "name one: its directory below `snapshots`"))
    repository = "/".join(path.name.split("--")[1:])
    return Location(path / "snapshots" / commit, f"{repository}@{commit}")


def _fetched(repo: str, revision: str) -> Location | None:
    """What the client's cache holds of a revision, where the Hub cannot be asked."""
    try:
        from huggingface_hub import snapshot_download  # pyright: ignore[reportUnknownVariableType]

        found = snapshot_download(
            repo, revision=revision or None, ignore_patterns=list(NOT_FETCHED), local_files_only=True
        )
    except Exception:  # not there, not all of it, or settings that the client does not take
        return None
    path = Path(found)
    return Location(path, f"{repo}@{path.name}") if COMMIT.fullmatch(path.name) else None


def _fetch(source: str, patterns: tuple[str, ...] | None) -> Location:
    repo_id, _, revision = source.partition("@")
    try:
        from huggingface_hub import snapshot_download  # pyright: ignore[reportUnknownVariableType]
        from huggingface_hub.utils import disable_progress_bars

        if not sys.stderr.isatty():
            disable_progress_bars()
        found = snapshot_download(
            repo_id,
            revision=revision or None,
            allow_patterns=None if patterns is None else list(patterns),
            ignore_patterns=list(NOT_FETCHED),
        )
    except Exception as error:  # the client raises its own, httpx's and OSErrors alike
        raise CheckpointError(hub_problem(source, error)) from error
    path = Path(found)
    if not COMMIT.fullmatch(path.name):
        what = f"the Hub client did not say at which commit it fetched {repo_id}"
        raise CheckpointError(Problem(what, source, "pin one: org/name@<commit>"))
    return Location(path, f"{repo_id}@{path.name}")
