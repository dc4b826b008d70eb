"""Peers that need an environment of their own, and where it is."""

import os
from pathlib import Path

ROOT = Path(__file__).parents[2]


def mergekit_python() -> Path | None:
    """The interpreter of an environment with mergekit; None if there is none."""
    return _python("SURGERY_MERGEKIT_PYTHON", ".venv-mergekit")


def _python(variable: str, directory: str) -> Path | None:
    path = Path(os.environ.get(variable) or ROOT / directory / "bin" / "python")
    return path if path.exists() else None
