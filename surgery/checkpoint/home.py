"""Where a checkpoint lies: in a directory, in one file and nowhere else, or in a repository on the Hub."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from surgery.checkpoint.paths import contained, decode_json, open_regular, read_small, stands

__all__ = ["Directory", "Home", "LoneFile", "read_json"]

COPY_BYTES = 1 << 20


class Home(Protocol):
    """What is read of a checkpoint besides its weights. Its text is what errors call it."""

    @property
    def path(self) -> Path | None:
        """Where it is in the file system; None for what is on the Hub."""
        ...

    def names(self) -> list[str]:
        """The files at its top, sorted."""
        ...

    def has(self, name: str) -> bool:
        """Whether there is a file of that name. Raises CheckpointError for an impossible name."""
        ...

    def at(self, name: str) -> str:
        """What errors call the file."""
        ...

    def size(self, name: str) -> int:
        """Bytes of the file."""
        ...

    def read(self, name: str) -> bytes:
        """All of a small file. Raises CheckpointError."""
        ...

    def pieces(self, name: str) -> Iterator[bytes]:
        """All of a file of any size. Raises CheckpointError."""
        ...


@dataclass(frozen=True, slots=True)
class Directory:
    """A local directory."""

    path: Path

    def __str__(self) -> str:
        return str(self.path)

    def names(self) -> list[str]:
        """The files at its top, sorted."""
        return sorted(path.name for path in self.path.iterdir())

    def has(self, name: str) -> bool:
        """Whether something, be it a broken link, has that name."""
        return stands(self.path / name)

    def at(self, name: str) -> str:
        """The path."""
        return str(self.path / name)

    def size(self, name: str) -> int:
        """Bytes of the file. Raises CheckpointError if it is not there."""
        with open_regular(self.path / name) as file:
            return os.fstat(file.fileno()).st_size

    def read(self, name: str) -> bytes:
        """All of a small file. Raises CheckpointError for what is none, and for a link that leads out."""
        return read_small(self.path / name, self.path)

    def pieces(self, name: str) -> Iterator[bytes]:
        """All of a file, a piece at a time."""
        with open_regular(contained(self.path / name, self.path)) as file:
            yield from iter(lambda: file.read(COPY_BYTES), b"")


@dataclass(frozen=True, slots=True)
class LoneFile:
    """A local file that stands for itself: nothing beside it belongs to it."""

    path: Path

    def __str__(self) -> str:
        return str(self.path)

    def names(self) -> list[str]:
        """Nothing."""
        return []

    def has(self, name: str) -> bool:
        """No."""
        del name
        return False

    def at(self, name: str) -> str:
        """The file."""
        del name
        return str(self.path)

    def size(self, name: str) -> int:
        """Raises FileNotFoundError."""
        raise FileNotFoundError(name)

    def read(self, name: str) -> bytes:
        """Raises FileNotFoundError."""
        raise FileNotFoundError(name)

    def pieces(self, name: str) -> Iterator[bytes]:
        """Raises FileNotFoundError."""
        raise FileNotFoundError(name)


def read_json(home: Home, name: str) -> dict[str, object]:
    """The JSON object in a file. Raises CheckpointError for anything else."""
    return decode_json(home.read(name), home.at(name))
