"""Where a source lies: a directory, a file, or a Hub repository fetched at a pinned commit."""

from __future__ import annotations

import re
import sys
from dataclasses import dataclass
from pathlib import Path

from surgery.checkpoint.paths import stands
from surgery.errors import CheckpointError, Problem

__all__ = ["Location", "locate"]

HUB_ID = re.compile(r"[\w.-]+/[\w.-]+(@[\w./-]+)?")
COMMIT = re.compile(r"[0-9a-f]{40}")
NOT_FETCHED = ("*.bin", "*.pt", "*.pth", "*.h5", "*.msgpack", "*.ot", "*.onnx", "*.gguf", "onnx/*", "openvino/*")


@dataclass(frozen=True, slots=True)
class Location:
    """A local path, and for a Hub repository its id with the commit, `org/name@<40 hex digits>`."""

    path: Path
    hub: str = ""


def locate(source: str) -> Location:
    """The place `source` names; a local path wins over a Hub id. Raises CheckpointError."""
    path = Path(source).expanduser()
    if stands(path):
        return _cached(path) or Location(path)
    if source.startswith((".", "/", "~")) or not HUB_ID.fullmatch(source):
        fix = "give a directory, a .safetensors file, or a Hub id as org/name[@revision]"
        if not path.is_absolute():
            fix += f"; a relative path starts where you are, in {Path.cwd()}"
        raise CheckpointError(Problem("does not exist", source, fix))
    return _fetch(source)


def _cached(path: Path) -> Location | None:
    """The snapshot in a repository of the Hub client's cache (`models--org--name`): that of `main`, or the only one."""
    if not path.name.startswith("models--") or not stands(path / "snapshots"):
        return None
    main = path / "refs" / "main"
    found = sorted(snapshot.name for snapshot in (path / "snapshots").iterdir())
    commit = main.read_text().strip() if main.is_file() else found[0] if len(found) == 1 else ""
    if commit not in found or not COMMIT.fullmatch(commit):
        what = f"is a Hub cache with {len(found)} snapshots and no `refs/main` among them"
        raise CheckpointError(Problem(what, str(path), "name one: its directory below `snapshots`"))
    repository = "/".join(path.name.split("--")[1:])
    return Location(path / "snapshots" / commit, f"{repository}@{commit}")


def _fetch(source: str) -> Location:
    from huggingface_hub import snapshot_download  # pyright: ignore[reportUnknownVariableType]
    from huggingface_hub.utils import disable_progress_bars

    repo_id, _, revision = source.partition("@")
    if not sys.stderr.isatty():
        disable_progress_bars()
    try:
        found = snapshot_download(repo_id, revision=revision or None, ignore_patterns=list(NOT_FETCHED))
    except Exception as error:  # the client raises its own, httpx's and OSErrors alike
        raise CheckpointError(_hub_problem(source, error)) from error
    path = Path(found)
    if not COMMIT.fullmatch(path.name):
        what = f"the Hub client did not say at which commit it fetched {repo_id}"
        raise CheckpointError(Problem(what, source, "pin one: org/name@<commit>"))
    return Location(path, f"{repo_id}@{path.name}")


def _hub_problem(source: str, error: Exception) -> Problem:
    first_line = (str(error).strip() or type(error).__name__).splitlines()[0]
    fixes = {
        "RepositoryNotFoundError": "check the name, and log in with `hf auth login` if the repository is private",
        "GatedRepoError": "accept its terms on the Hub, and log in with `hf auth login`",
        "RevisionNotFoundError": "check what follows the @",
    }
    fix = fixes.get(type(error).__name__, "check the network and HF_ENDPOINT, or give a local directory")
    return Problem(f"is no local path, and cannot be had from the Hub: {first_line}", source, fix)
