"""What was seen of each file and tensor while it was written."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["FileRecord", "TensorRecord"]


@dataclass(frozen=True, slots=True)
class TensorRecord:
    """Evidence of a written tensor: sha256, and max and RMS error where it is rounded."""

    name: str
    sha256: str
    max_error: float | None
    rms_error: float | None


@dataclass(frozen=True, slots=True)
class FileRecord:
    """Evidence of a written file."""

    name: str
    num_bytes: int
    sha256: str
    tensors: tuple[TensorRecord, ...] = ()
