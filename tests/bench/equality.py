"""Two checkpoints, bit for bit."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from surgery.checkpoint import TensorEntry, open_checkpoint
from surgery.types import DType

if TYPE_CHECKING:
    from numpy.typing import NDArray

COMPARED_BYTES = 1 << 20
BITS = {DType.BF16: "<u2", DType.F16: "<u2", DType.F32: "<u4"}


@dataclass(slots=True)
class Difference:
    """How two checkpoints differ."""

    num_tensors: int
    num_elements: int
    different: dict[str, int]  # elements that differ, by tensor; tensors of unlike types count whole
    only_in_one: list[str]
    max_abs: float  # of the differences in bf16 and f32 tensors

    def __str__(self) -> str:
        elements = sum(self.different.values())
        lines = f"{self.num_tensors - len(self.different)} of {self.num_tensors} tensors equal"
        if self.only_in_one:
            lines += f"; {len(self.only_in_one)} in one of the two only: {', '.join(self.only_in_one[:3])}, ..."
        if elements:
            share = 100 * elements / self.num_elements
            lines += (
                f"; {elements} of {self.num_elements} elements differ ({share:.2g} %), by at most {self.max_abs:.2g}"
            )
        return lines


def compare(one: Path, other: Path) -> Difference:
    """The two checkpoints, tensor by tensor."""
    ours, theirs = open_checkpoint(str(one)).tensors, open_checkpoint(str(other)).tensors
    both = [name for name in ours if name in theirs]
    difference = Difference(len(both), 0, {}, sorted(ours.keys() ^ theirs.keys()), 0.0)
    for name in both:
        difference.num_elements += ours[name].type.num_elements
        num_different, max_abs = _compare(ours[name], theirs[name])
        if num_different:
            difference.different[name] = num_different
            difference.max_abs = max(difference.max_abs, max_abs)
    return difference


def _compare(one: TensorEntry, other: TensorEntry) -> tuple[int, float]:
    import numpy as np

    if one.type != other.type:
        return one.type.num_elements, float("inf")
    bits, num_different, max_abs = BITS.get(one.type.dtype, "<u1"), 0, 0.0
    for a, b in zip(pieces_of(one), pieces_of(other), strict=True):
        if a != b:
            x, y = np.frombuffer(a, bits), np.frombuffer(b, bits)
            where = np.flatnonzero(x != y)
            num_different += len(where)
            max_abs = max(max_abs, float(np.abs(_floats(x[where]) - _floats(y[where])).max()))
    return num_different, max_abs


def _floats(bits: NDArray) -> NDArray:
    """bf16 and f32 by their bits; others as they are."""
    import numpy as np

    if bits.itemsize == 2:
        return (bits.astype(np.uint32) << 16).view(np.float32)
    return bits.view(np.float32) if bits.itemsize == 4 else bits.astype(np.float32)


def pieces_of(entry: TensorEntry) -> Iterator[bytes]:
    """The tensor's bytes in order."""
    with Path(str(entry.file.place)).open("rb", buffering=0) as file:
        file.seek(entry.start)
        for start in range(entry.start, entry.stop, COMPARED_BYTES):
            yield file.read(min(COMPARED_BYTES, entry.stop - start))
