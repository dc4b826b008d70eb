"""A verified output on the Hub: one commit with its files, its manifest and a model card, by the Hub's own client.

Only what the manifest lists goes up, and what the Hub then lists is held against it: a file that a `.gitignore` there
leaves out, or one that changed meanwhile, is an error.
"""

from __future__ import annotations

import sys
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, cast

from surgery.card import CARD_NAME, make_card
from surgery.errors import OutputError, Problem, SurgeryError
from surgery.manifest import MANIFEST_NAME, Manifest
from surgery.verification import verify_output

if TYPE_CHECKING:
    from huggingface_hub import CommitOperationAdd, HfApi
    from huggingface_hub.hf_api import ModelInfo, RepoFile

__all__ = ["push_output"]

MAIN = "main"
WEIGHTS = (".safetensors", ".safetensors.index.json", ".bin", ".bin.index.json")
LOG_IN = "log in with `hf auth login`, or set HF_TOKEN, as one who may write there"
FIXES = {
    "GatedRepoError": "accept its terms on the Hub, and " + LOG_IN,
    "OfflineModeIsEnabled": "unset HF_HUB_OFFLINE",
    "RepositoryNotFoundError": "check the name; " + LOG_IN,
    "RevisionNotFoundError": "give a branch with --revision",
}
FIXES_BY_STATUS = {
    401: LOG_IN,
    403: LOG_IN,
    412: "the repository has changed meanwhile: push again",
}


def push_output(out: Path, repo: str, *, private: bool, revision: str) -> str:
    """Verify `out` and commit it to `repo`, which is made if it is not there; the URL of the commit.

    Raises VerifyError if the output differs from its manifest, OutputError for what the Hub, or its state, refuses.
    """
    _check_name(repo)
    manifest = verify_output(out)
    card = make_card(out, manifest, repo, "" if revision in ("", MAIN) else revision)
    with _refusals(repo):
        return _push(out, repo, manifest, card.encode(), private=private, revision=revision or MAIN)


def _check_name(repo: str) -> None:
    from huggingface_hub.utils import HFValidationError, validate_repo_id

    fix = "give it as org/name: letters, digits, `-`, `_` and `.`, at most 96"
    if repo.count("/") != 1:
        raise OutputError(Problem("is no repository on the Hub", repo, fix))
    try:
        validate_repo_id(repo)
    except HFValidationError as error:
        raise OutputError(Problem(f"is no repository on the Hub: {_first_line(error)}", repo, fix)) from None


@contextmanager
def _refusals(repo: str) -> Generator[None]:
    """What the client raises (its own, httpx's and OSErrors alike) as an error of ours."""
    try:
        yield
    except SurgeryError:
        raise
    except Exception as error:
        raise OutputError(_problem(repo, error)) from error


def _problem(repo: str, error: Exception) -> Problem:
    cause = error.__cause__ if type(error) is RuntimeError and isinstance(error.__cause__, Exception) else error
    status = getattr(getattr(cause, "response", None), "status_code", 0)
    fix = FIXES_BY_STATUS.get(status) or FIXES.get(type(cause).__name__) or "check the network and HF_ENDPOINT"
    return Problem(f"cannot be pushed to: {_first_line(cause)}", repo, fix)


def _first_line(error: Exception) -> str:
    """Of a message of the client: what the server said stands in its last line."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    return lines[0] if len(lines) == 1 else f"{lines[0]} {lines[-1]}"


def _push(out: Path, repo: str, manifest: Manifest, card: bytes, *, private: bool, revision: str) -> str:
    from huggingface_hub import HfApi
    from huggingface_hub.utils import disable_progress_bars

    if not sys.stderr.isatty():
        disable_progress_bars()
    api = HfApi()
    api.create_repo(repo, private=private or None, exist_ok=True)
    there = _branch(api, repo, revision)
    if private and not there.private:
        what = "is public already, --private makes new repositories only"
        raise OutputError(Problem(what, repo, "make it private on the Hub, or name another"))
    additions = _additions(out, manifest, card)
    _check_beside(there, [addition.path_in_repo for addition in additions])
    commit = api.create_commit(
        repo,
        additions,
        commit_message="Made with surgery",
        commit_description=f"spec sha256 {manifest.content['spec_sha256']}",
        revision=revision,
        parent_commit=there.sha,
    )
    _check_listed(api, repo, commit.oid, manifest)
    return str(commit.commit_url)


def _branch(api: HfApi, repo: str, revision: str) -> ModelInfo:
    """What the repository is at the branch, which is made if it is not there."""
    from huggingface_hub.errors import RevisionNotFoundError

    try:
        return api.model_info(repo, revision=revision)
    except RevisionNotFoundError:
        api.create_branch(repo, branch=revision, exist_ok=True)
        return api.model_info(repo, revision=revision)


def _additions(out: Path, manifest: Manifest, card: bytes) -> list[CommitOperationAdd]:
    from huggingface_hub import CommitOperationAdd

    files = [CommitOperationAdd(file.name, str(out / file.name)) for file in manifest.files if file.name != CARD_NAME]
    made = {MANIFEST_NAME: manifest.encode(), CARD_NAME: card}
    return [*files, *(CommitOperationAdd(name, raw) for name, raw in made.items())]


def _check_beside(there: ModelInfo, names: list[str]) -> None:
    """Raises OutputError for weights that would stay beside ours: a loader may take them for these."""
    listed = [entry.rfilename for entry in there.siblings or []]
    others = [name for name in listed if "/" not in name and name.endswith(WEIGHTS) and name not in names]
    if others:
        what = f"holds weights that are not of this output, and a loader may take: {', '.join(sorted(others)[:4])}"
        fix = "delete them on the Hub, or push to another repository or --revision"
        raise OutputError(Problem(what, there.id, fix))


def _check_listed(api: HfApi, repo: str, commit: str, manifest: Manifest) -> None:
    """Raises OutputError for a file that did not arrive as it was verified."""
    entries = api.list_repo_tree(repo, revision=commit, recursive=True)
    listed = {entry.path: cast("RepoFile", entry) for entry in entries if hasattr(entry, "size")}
    for file in manifest.files:
        found = listed.get(file.name)
        if found is None:
            what = f"has no `{file.name}` in its commit {commit}"
            raise OutputError(Problem(what, repo, "see whether a .gitignore there leaves it out, and push again"))
        known = found.lfs.sha256 if found.lfs else file.sha256
        if file.name != CARD_NAME and (found.size != file.num_bytes or known != file.sha256):
            what = f"has another `{file.name}` in its commit {commit} than was verified"
            raise OutputError(Problem(what, repo, "leave the output alone while it is pushed, and push again"))
