"""Texts that people read, held word by word: UPDATE_GOLDEN=1 writes them anew."""

import os
from pathlib import Path

HOME = Path(__file__).parent


def assert_golden(name: str, text: str) -> None:
    """`text` is what `name`.txt holds."""
    path = HOME / f"{name}.txt"
    if os.environ.get("UPDATE_GOLDEN"):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text.rstrip("\n") + "\n", encoding="utf-8")
    assert path.exists(), f"{path} is missing: run with UPDATE_GOLDEN=1, and read what it writes"
    assert text.rstrip("\n") + "\n" == path.read_text(encoding="utf-8")


def golden_names(folder: str) -> set[str]:
    """The golden texts that there are in `folder`."""
    return {path.stem for path in (HOME / folder).glob("*.txt")}
