"""Files that belong to a checkpoint, and those that do not."""

from __future__ import annotations

import json
import os
import stat
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import BinaryIO, cast

from surgery.errors import CheckpointError, Problem

__all__ = [
    "ADAPTER_BESIDE",
    "SideFiles",
    "assorted",
    "check_small",
    "contained",
    "decode_json",
    "is_text",
    "modified",
    "open_regular",
    "read_json",
    "read_small",
    "side_files",
    "stands",
    "unrepeated",
]

# Weights in other containers: copies of the tensors that an edit would leave stale.
FOREIGN_WEIGHTS = (
    ".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle", ".h5", ".msgpack", ".ot", ".onnx", ".gguf", ".ggml",
    ".tflite", ".mlmodel", ".npz", ".safetensors",
)  # fmt: skip
FOREIGN_DIRECTORIES = ("onnx", "openvino", "coreml")
ADAPTER_BESIDE = "adapter_config.json"  # beside a base, transformers puts the adapter that it names into the model
WRITTEN_ANEW = ("model.safetensors.index.json", "surgery-manifest.json")
MAX_JSON_BYTES = 128 << 20  # an index of a million tensors has about that
MAX_OBJECTS = 1_000_000
DOWNLOAD_AGAIN = "download it again"


@dataclass(frozen=True, slots=True)
class SideFiles:
    """Paths relative to the checkpoint, sorted: what is copied along, and what is left behind."""

    copied: tuple[str, ...]
    left: tuple[str, ...]


def is_text(value: object) -> bool:
    """Whether `value` is a string that can be written: JSON and file systems know some that cannot."""
    if not isinstance(value, str):
        return False
    try:
        value.encode()
    except UnicodeEncodeError:
        return False
    return True


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
    if not any(real.is_relative_to(root) for root in _roots(home)):
        what = f"is a link that leads out of the checkpoint, to {real}"
        raise CheckpointError(Problem(what, str(path), "replace the link by the file itself"))
    return real


def _roots(home: Path) -> tuple[Path, ...]:
    repository = home.parent.parent
    is_cached = home.parent.name == "snapshots" and repository.name.startswith("models--")
    return (home, repository / "blobs") if is_cached else (home,)


def modified(path: Path) -> int:
    """When the file was last written to, or given another time, in ns. Raises CheckpointError if it is gone."""
    try:
        return path.stat().st_ctime_ns
    except (OSError, ValueError) as error:
        raise CheckpointError(Problem(f"cannot be read: {_reason(error)}", str(path))) from None


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
    return decode_json(read_small(path, directory), str(path))


def read_small(path: Path, directory: Path) -> bytes:
    """All of a file of the checkpoint that is no weights. Raises CheckpointError, also for one of unlikely size."""
    with open_regular(contained(path, directory)) as file:
        check_small(os.fstat(file.fileno()).st_size, str(path))
        return file.read()


def unrepeated(pairs: list[tuple[str, object]]) -> dict[str, object]:
    """An object of JSON. Raises ValueError for a key that stands twice, of which readers take either."""
    result = dict(pairs)
    if len(result) != len(pairs):
        seen: set[str] = set()
        twice = next(key for key, _ in pairs if key in seen or seen.add(key))
        raise ValueError(f"it names `{twice}` twice")
    return result


def check_small(num_bytes: int, at: str) -> None:
    """Raises CheckpointError for more than what is read at once."""
    if num_bytes > MAX_JSON_BYTES:
        raise CheckpointError(Problem(f"has more than {MAX_JSON_BYTES} bytes", at, DOWNLOAD_AGAIN))


def decode_json(raw: bytes, at: str) -> dict[str, object]:
    """The JSON object that a file holds. Raises CheckpointError for anything else."""
    if raw.count(b"{") + raw.count(b"[") > MAX_OBJECTS:
        raise CheckpointError(Problem(f"holds more than {MAX_OBJECTS} objects and lists", at, DOWNLOAD_AGAIN))
    try:
        content: object = json.loads(raw, object_pairs_hook=unrepeated)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(Problem(f"is not JSON: {error}", at, DOWNLOAD_AGAIN)) from None
    if not isinstance(content, dict):
        raise CheckpointError(Problem("is not a JSON object", at, DOWNLOAD_AGAIN))
    return cast(dict[str, object], content)


def side_files(directory: Path, written: tuple[str, ...]) -> SideFiles:
    """Every file beside those that are `written` anew.

    Raises CheckpointError for a link that leads out, or a nameless file.
    """
    sides = assorted([path.relative_to(directory).as_posix() for path in _walk(directory)], written)
    for name in (*sides.copied, *sides.left):
        if not name.isprintable():
            raise CheckpointError(Problem(f"has a file whose name is no text: {name!r}", str(directory), "rename it"))
    for name in sides.copied:
        open_regular(contained(directory / name, directory)).close()
    return sides


def assorted(names: Iterable[str], written: tuple[str, ...]) -> SideFiles:
    """Which of the files beside those that are `written` anew are copied, and which are left behind."""
    copied: list[str] = []
    left: list[str] = []
    for name in names:
        if name in written or name in WRITTEN_ANEW:
            continue
        foreign = name.split("/")[0] in FOREIGN_DIRECTORIES or PurePosixPath(name).suffix in FOREIGN_WEIGHTS
        (left if foreign or name == ADAPTER_BESIDE or name.endswith(".index.json") else copied).append(name)
    return SideFiles(tuple(sorted(copied)), tuple(sorted(left)))


def _walk(directory: Path) -> list[Path]:
    found: list[Path] = []
    for parent, directories, files in os.walk(directory):
        directories[:] = [name for name in directories if not name.startswith(".")]
        for name in directories:
            contained(Path(parent, name), directory)
        found.extend(Path(parent, name) for name in files if not name.startswith("."))
    return found
