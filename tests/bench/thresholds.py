"""Where two TIES merges may differ: at deltas as large as the smallest one that is kept.

Which of several equal magnitudes belong to the largest is mergekit's unstable sort's choice.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from surgery.checkpoint import Checkpoint, open_checkpoint

if TYPE_CHECKING:
    import torch
    from torch import Tensor


def num_at_threshold(
    base: Path, densities: Mapping[Path, float], dtype: str, merges: tuple[Path, Path], names: Iterable[str]
) -> int:
    """How many elements that differ between `merges` have a delta of a model that lies at its threshold."""
    import torch

    source, *outs = (open_checkpoint(str(path)) for path in (base, *merges))
    models = [(open_checkpoint(str(path)), density) for path, density in densities.items()]
    work, number = getattr(torch, dtype), 0
    for name in names:
        one, other = (_read(out, name).view(torch.int16) for out in outs)
        below = _read(source, name).to(work)
        at_threshold = torch.zeros(below.numel(), dtype=torch.bool)
        for model, density in models:
            at_threshold |= _at_threshold(_read(model, name).to(work).sub_(below).abs_(), density)
        number += int((at_threshold & (one != other)).sum())
    return number


def _at_threshold(magnitudes: Tensor, density: float) -> Tensor:
    num_kept = max(1, int(density * magnitudes.numel()))
    threshold = magnitudes.kthvalue(magnitudes.numel() - num_kept + 1).values
    return magnitudes == threshold


def _read(checkpoint: Checkpoint, name: str) -> torch.Tensor:
    """A bf16 tensor, flat."""
    import torch

    entry = checkpoint.tensors[name]
    with Path(str(entry.file.place)).open("rb") as file:
        file.seek(entry.start)
        return torch.frombuffer(bytearray(file.read(entry.stop - entry.start)), dtype=torch.bfloat16)
