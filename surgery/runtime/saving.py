"""The directory of an adapter, written as every output is: into a hidden sibling, then one rename."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path

from safetensors.torch import save
from torch import Tensor

from surgery.checkpoint import ADAPTER_CONFIG
from surgery.errors import OutputError, Problem, SurgeryError
from surgery.runtime.building import Layout
from surgery.workplace import Workplace

__all__ = ["write_adapter"]

WEIGHTS: Mapping[Layout, str] = {"surgery": "adapter_model.safetensors", "adapterhub": "adapter.safetensors"}
REPLACED = frozenset({ADAPTER_CONFIG, *WEIGHTS.values()})


def write_adapter(directory: Path, layout: Layout, config: Mapping[str, object], tensors: Mapping[str, Tensor]) -> Path:
    """Write it; what was there, if it is an adapter, goes. Gives the directory.

    Raises OutputError if it holds anything else, is where you are, or cannot be written.
    """
    files = {
        ADAPTER_CONFIG: f"{json.dumps(config, indent=2)}\n".encode(),
        WEIGHTS[layout]: save(dict(tensors), {"format": "pt"}),
    }
    try:
        _check_free(directory)
        _publish(directory, files)
    except (OSError, ValueError) as error:
        if isinstance(error, SurgeryError):
            raise
        raise OutputError(Problem(f"cannot be written: {error}", str(directory), "name another directory")) from error
    return directory


def _check_free(directory: Path) -> None:
    if not os.path.lexists(directory):
        return
    if not directory.is_dir():
        raise OutputError(Problem("is no directory", str(directory), "name another one"))
    others = sorted(entry.name for entry in directory.iterdir() if entry.name not in REPLACED or not entry.is_file())
    if others:
        what = f"holds more than an adapter, which would go: `{others[0]}`"
        raise OutputError(Problem(what, str(directory), "name another directory"))
    if Path.cwd().is_relative_to(directory.resolve()):
        raise OutputError(Problem("is where you are: it cannot be replaced", str(directory), "name another directory"))


def _publish(directory: Path, files: Mapping[str, bytes]) -> None:
    workplace = Workplace(directory, overwrite=True)
    workplace.open()
    try:
        workplace.keep(())
        for name, content in files.items():
            _write_synced(workplace.output / name, content)
        workplace.publish()
    except BaseException:
        workplace.remove()
        raise
    finally:
        workplace.close()


def _write_synced(path: Path, content: bytes) -> None:
    with path.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
