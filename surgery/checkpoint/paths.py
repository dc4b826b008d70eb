"""Files that belong to a checkpoint, and those that do not."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from surgery.errors import CheckpointError, Problem

__all__ = ["SideFiles", "contained", "side_files"]


# Weights in other containers: copies of the tensors that an edit would leave stale.
FOREIGN_WEIGHTS = (
    ".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle", ".h5", ".msgpack", ".ot", ".onnx", ".gguf", ".ggml",
    ".tflite", ".mlmodel", ".npz", ".safetensors",
)  # fmt: skip
FOREIGN_DIRECTORIES = ("onnx", "openvino", "coreml")
WRITTEN_ANEW = ("config.json", "model.safetensors.index.json", "surgery-manifest.json")


@dataclass(frozen=True, slots=True)
class SideFiles:
    """Paths relative to the checkpoint, sorted: what is copied along, and what is left behind."""

    copied: tuple[str, ...]
    left: tuple[str, ...]


def contained(path: Path, directory: Path) -> Path:
    """`path` with links resolved. Raises CheckpointError if that leads out of the checkpoint.

    A snapshot in the Hugging Face cache links to the blobs of its own repository; those are inside.
    """
    real, home = path.resolve(), directory.resolve()
    root = home.parent.parent if home.parent.name == "snapshots" else home
    if not real.is_relative_to(root):
        what = f"is a link that leads out of the checkpoint, to {real}"
        raise CheckpointError(Problem(what, str(path), "replace the link by the file itself"))
    return real


def side_files(directory: Path, weight_files: tuple[str, ...]) -> SideFiles:
    """Every file beside the weights. Raises CheckpointError for a link that leads out."""
    copied: list[str] = []
    left: list[str] = []
    for path in _walk(directory):
        name = path.relative_to(directory).as_posix()
        if name in weight_files or name in WRITTEN_ANEW:
            continue
        foreign = name.split("/")[0] in FOREIGN_DIRECTORIES or path.suffix in FOREIGN_WEIGHTS
        foreign = foreign or name.endswith(".index.json")
        (left if foreign else copied).append(name)
        if not foreign:
            contained(path, directory)
    return SideFiles(tuple(sorted(copied)), tuple(sorted(left)))


def _walk(directory: Path) -> list[Path]:
    found: list[Path] = []
    for parent, directories, files in os.walk(directory):
        for name in directories:
            contained(Path(parent, name), directory)
        directories[:] = [name for name in directories if not name.startswith(".")]
        found.extend(Path(parent, name) for name in files if not name.startswith("."))
    return [path for path in found if path.is_file()]
