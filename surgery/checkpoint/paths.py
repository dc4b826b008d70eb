"""Files that belong to a checkpoint, and those that do not."""

from __future__ import annotations

import json
import os
import stat
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, cast

from surgery.errors import CheckpointError, Problem

__all__ = ["SideFiles", "contained", "is_text", "open_regular", "read_json", "side_files", "stands"]

# Weights in other containers: copies of the tensors that an edit would leave stale.
FOREIGN_WEIGHTS = (
    ".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle", ".h5", ".msgpack", ".ot", ".onnx", ".gguf", ".ggml",
    ".tflite", ".mlmodel", ".npz", ".safetensors",
)  # fmt: skip
FOREIGN_DIRECTORIES = ("onnx", "openvino", "coreml")
WRITTEN_ANEW = ("model.safetensors.index.json", "surgery-manifest.json")
MAX_JSON_BYTES = 256 << 20  # an index of a million tensors has about half of that


@dataclass(frozen=True, slots=True)
class SideFiles:
    """Paths relative to the checkpoint, sorted: what is copied along, and what is left behind."""

    copied: tuple[str, ...]
    left: tuple[str, ...]


def is_text(value: object) -> bool:
    """Whether `value` is a string that can be written: JSON and file systems know some that cannot."""
    return isinstance(value, str) and not any("\ud800" <= char <= "\udfff" for char in value)


def stands(path: Path) -> bool:
    """Whether something, be it a broken link, is at `path`. Raises CheckpointError for an impossible path."""
    try:
        os.lstat(path)
    except FileNotFoundError:
        return False
    except (OSError, ValueError) as error:
        raise CheckpointError(Problem(f"cannot be looked up: {_reason(error)}", str(path))) from None
    return True


def contained(path: Path, directory: Path) -> Path:
    """`path` with links resolved. Raises CheckpointError if that leads out of the checkpoint, or nowhere.

    A snapshot in the Hugging Face cache links to the blobs of its own repository; those are inside.
    """
    try:
        real, home = path.resolve(strict=True), directory.resolve()
    except (OSError, RuntimeError, ValueError) as error:
        what = f"is a link that leads nowhere: {_reason(error)}"
        raise CheckpointError(Problem(what, str(path), "replace the link by the file itself")) from None
    root = home.parent.parent if home.parent.name == "snapshots" else home
    if not real.is_relative_to(root):
        what = f"is a link that leads out of the checkpoint, to {real}"
        raise CheckpointError(Problem(what, str(path), "replace the link by the file itself"))
    return real


def open_regular(path: Path) -> BinaryIO:
    """Open a regular file for reading. Raises CheckpointError for anything else: a pipe would never end."""
    try:
        file = path.open("rb") if stat.S_ISREG(path.stat().st_mode) else None
    except (OSError, ValueError) as error:
        raise CheckpointError(Problem(f"cannot be read: {_reason(error)}", str(path))) from None
    if file is None:
        raise CheckpointError(Problem("is no regular file", str(path), "put the file itself there"))
    return file


def _reason(error: Exception) -> str:
    return error.strerror or str(error) if isinstance(error, OSError) else str(error)


def read_json(path: Path, directory: Path) -> dict[str, object]:
    """The JSON object in a file of the checkpoint. Raises CheckpointError for anything else."""
    fix = "download it again"
    with open_regular(contained(path, directory)) as file:
        if os.fstat(file.fileno()).st_size > MAX_JSON_BYTES:
            raise CheckpointError(Problem(f"has more than {MAX_JSON_BYTES} bytes", str(path), fix))
        try:
            content: object = json.load(file)
        except (ValueError, RecursionError) as error:
            raise CheckpointError(Problem(f"is not JSON: {error}", str(path), fix)) from None
    if not isinstance(content, dict):
        raise CheckpointError(Problem("is not a JSON object", str(path), fix))
    return cast(dict[str, object], content)


def side_files(directory: Path, written: tuple[str, ...]) -> SideFiles:
    """Every file beside those that are `written` anew.

    Raises CheckpointError for a link that leads out, or a nameless file.
    """
    copied: list[str] = []
    left: list[str] = []
    for path in _walk(directory):
        name = path.relative_to(directory).as_posix()
        if name in written or name in WRITTEN_ANEW:
            continue
        foreign = name.split("/")[0] in FOREIGN_DIRECTORIES or path.suffix in FOREIGN_WEIGHTS
        (left if foreign or name.endswith(".index.json") else copied).append(name)
    for name in copied:
        if not is_text(name):
            raise CheckpointError(Problem(f"has a file whose name is no text: {name!r}", str(directory), "rename it"))
        open_regular(contained(directory / name, directory)).close()
    return SideFiles(tuple(sorted(copied)), tuple(sorted(left)))


def _walk(directory: Path) -> list[Path]:
    found: list[Path] = []
    for parent, directories, files in os.walk(directory):
        directories[:] = [name for name in directories if not name.startswith(".")]
        for name in directories:
            contained(Path(parent, name), directory)
        found.extend(Path(parent, name) for name in files if not name.startswith("."))
    return found
