"""Holding an output against its manifest: every file hashed anew, a difference traced to its tensor."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import cast

from surgery.card import CARD_NAME, has_card
from surgery.errors import Problem, VerifyError
from surgery.evidence import FileRecord
from surgery.manifest import MANIFEST_NAME, Manifest, read_manifest

__all__ = ["compare_manifests", "has_source_hashes", "verify_output"]

READ_BYTES = 1 << 20


def verify_output(out: Path) -> Manifest:
    """The manifest of `out`. Raises VerifyError naming every file, and tensor, that differs from it.

    The card that `push` made of the manifest may stand where README.md was, or was not.
    """
    manifest = read_manifest(out)
    made = {CARD_NAME} if has_card(out, manifest) else set[str]()
    records = [record for record in manifest.files if record.name not in made]
    problems = [problem for record in records for problem in _check_file(out, record, manifest)]
    known = {record.name for record in records} | {MANIFEST_NAME} | made
    for name in sorted(set(_files(out)) - known):
        fix = "remove it, or keep it elsewhere: a loader may pick it up"
        problems.append(Problem(f"`{name}` is not in the manifest", str(out), fix))
    if problems:
        raise VerifyError(*problems)
    return manifest


def _files(out: Path) -> Iterator[str]:
    for parent, directories, files in os.walk(out, onerror=_unreadable):
        directories[:] = [name for name in directories if not name.startswith(".")]
        yield from (Path(parent, name).relative_to(out).as_posix() for name in files if not name.startswith("."))


def _unreadable(error: OSError) -> None:
    fix = "make it readable, and verify again"
    raise VerifyError(Problem(f"cannot be read: {error.strerror}", str(error.filename), fix)) from None


def _check_file(out: Path, record: FileRecord, manifest: Manifest) -> list[Problem]:
    try:
        return _problems_of(out, record, manifest)
    except (OSError, RuntimeError) as error:  # RuntimeError: a link to itself
        reason = error.strerror or error if isinstance(error, OSError) else "it is a link to itself"
        return [Problem(f"`{record.name}` cannot be read: {reason}", str(out), "mend that, and verify again")]


def _problems_of(out: Path, record: FileRecord, manifest: Manifest) -> list[Problem]:
    path = out / record.name
    fix = "apply again, or copy the file again"
    if not path.resolve().is_relative_to(out.resolve()):
        return [Problem(f"`{record.name}` leads out of the output", str(out), fix)]
    if not path.is_file():
        return [Problem(f"`{record.name}` is missing", str(out), fix)]
    num_bytes = path.stat().st_size
    if num_bytes != record.num_bytes:
        return [
            Problem(f"`{record.name}` has {num_bytes} bytes, it was written with {record.num_bytes}", str(out), fix)
        ]
    if _hash(path, 0, num_bytes) == record.sha256:
        return []
    damaged = _damaged_tensors(path, record.name, manifest)
    where = f" in tensor {', '.join(f'`{name}`' for name in damaged)}" if damaged else ""
    if not damaged and record.name.endswith(".safetensors"):
        where = " in its header"
    return [Problem(f"`{record.name}` differs from what was written{where}", str(out), fix)]


def _hash(path: Path, start: int, stop: int) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        file.seek(start)
        while start < stop:
            piece = file.read(min(READ_BYTES, stop - start))
            if not piece:
                break
            digest.update(piece)
            start += len(piece)
    return digest.hexdigest()


def _damaged_tensors(path: Path, file: str, manifest: Manifest) -> list[str]:
    data_start = path.stat().st_size - _data_bytes(file, manifest)
    damaged: list[str] = []
    for name, entry in manifest.tensors.items():
        if entry["file"] == file:
            start, stop = cast("list[int]", entry["data_offsets"])
            if _hash(path, data_start + start, data_start + stop) != entry["sha256"]:
                damaged.append(name)
    return damaged


def _data_bytes(file: str, manifest: Manifest) -> int:
    """The bytes after the header: counted from the manifest, since the header may be what is damaged."""
    stops = [
        cast("list[int]", entry["data_offsets"])[1] for entry in manifest.tensors.values() if entry["file"] == file
    ]
    return max(stops, default=0)


def has_source_hashes(manifest: Manifest) -> bool:
    """Whether it says of a file that the output was made from what its bytes were."""
    return any("sha256" in file for model in manifest.models.values() for file in _files_of(model).values())


def _unlike_sources(first: Manifest, second: Manifest) -> Iterator[Problem]:
    """The identity of a local checkpoint is that of its headers; here its bytes may be known."""
    for name, model in first.models.items():
        others = _files_of(second.models[name])
        unlike = [file for file, entry in _files_of(model).items() if _differs(entry, others.get(file, {}))]
        if unlike:
            what = f"`{name}` is not what the output was made from: `{unlike[0]}` differs"
            yield Problem(what, fix="give the checkpoint of that run, unchanged")


def _files_of(model: Mapping[str, object]) -> dict[str, Mapping[str, object]]:
    return {str(file["name"]): file for file in cast("list[Mapping[str, object]]", model["files"])}


def _differs(entry: Mapping[str, object], other: Mapping[str, object]) -> bool:
    return not other or any(other[key] != value for key, value in entry.items() if key in other)


def compare_manifests(first: Manifest, second: Manifest) -> None:
    """Raises VerifyError naming what a second run was made from, or made, differently."""
    problems = list(_unlike_sources(first, second))
    if problems:
        raise VerifyError(*problems)
    for name, entry in first.tensors.items():
        other = second.tensors.get(name, cast(Mapping[str, object], {}))
        if other.get("sha256") != entry["sha256"]:
            problems.append(Problem(f"tensor `{name}` came out differently"))
    before, after = ({record.name: record.sha256 for record in item.files} for item in (first, second))
    problems += [Problem(f"file `{name}` came out differently") for name in before if before[name] != after.get(name)]
    if problems:
        fix = "compare the versions in the manifest with those installed"
        raise VerifyError(*problems[:8], Problem(f"{len(problems)} differences in all", fix=fix))
