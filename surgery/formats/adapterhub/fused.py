"""LoRA and (IA)³ on a matrix that holds query, key and value at once, as GPT-2's `c_attn`.

Why: PEFT sees one Linear with one rank. AdapterHub gives each of the enabled thirds a pair of its
own, stacked: A [n·r, in] and B [n·out/3, r], n the number of thirds. Neither loses anything in the
other: one A for all is the same A three times, and a pair for each third is one pair of rank n·r
whose B is zero wherever a third would meet another's A.

Legend: I in, O out, R rank, N enabled thirds.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from surgery.graph import Kernel
from surgery.types import TensorType

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["Blocks", "Filled", "Repeated"]


@dataclass(frozen=True, slots=True)
class Repeated(Kernel):
    """[R, I] → [times·R, I]: the rows again and again."""

    times: int

    def infer(self, *inputs: TensorType) -> tuple[TensorType, ...]:
        """Raises ValueError if it is not a matrix."""
        rows, columns = _matrix(inputs[0])
        return (TensorType(inputs[0].dtype, (self.times * rows, columns)),)

    def run(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        """The whole matrix."""
        return (inputs[0].repeat(self.times, 1),)


@dataclass(frozen=True, slots=True)
class Blocks(Kernel):
    """B [N·O/3, R] of the enabled thirds → [O, N·R]: each third in its rows and its own columns, zero elsewhere."""

    enabled: tuple[bool, ...]

    def infer(self, *inputs: TensorType) -> tuple[TensorType, ...]:
        """Raises ValueError if the rows are not those of as many thirds."""
        rows, rank = _matrix(inputs[0])
        block = _block(rows, self.enabled)
        return (TensorType(inputs[0].dtype, (block * len(self.enabled), rank * sum(self.enabled))),)

    def run(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        """The whole matrix."""
        (b,) = inputs
        rank, block = b.shape[1], _block(b.shape[0], self.enabled)
        b_OR = b.new_zeros(block * len(self.enabled), rank * sum(self.enabled))
        for number, third in enumerate(_enabled(self.enabled)):
            rows = b[number * block : (number + 1) * block]
            b_OR[third * block : (third + 1) * block, number * rank : (number + 1) * rank] = rows
        return (b_OR,)


@dataclass(frozen=True, slots=True)
class Filled(Kernel):
    """Scales [N·O/3, 1] of the enabled thirds → [O, 1]: one where a third is not scaled."""

    enabled: tuple[bool, ...]

    def infer(self, *inputs: TensorType) -> tuple[TensorType, ...]:
        """Raises ValueError if the rows are not those of as many thirds."""
        rows, columns = _matrix(inputs[0])
        return (TensorType(inputs[0].dtype, (_block(rows, self.enabled) * len(self.enabled), columns)),)

    def run(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        """The whole vector."""
        (scale,) = inputs
        block = _block(scale.shape[0], self.enabled)
        filled = scale.new_ones(block * len(self.enabled), scale.shape[1])
        for number, third in enumerate(_enabled(self.enabled)):
            filled[third * block : (third + 1) * block] = scale[number * block : (number + 1) * block]
        return (filled,)


def _matrix(type_: TensorType) -> tuple[int, int]:
    if len(type_.shape) != 2:
        raise ValueError(f"{type_} is not a matrix")
    rows, columns = type_.shape
    return rows, columns


def _block(rows: int, enabled: tuple[bool, ...]) -> int:
    if not any(enabled) or rows % sum(enabled):
        raise ValueError(f"{rows} rows are not those of {sum(enabled)} of query, key and value")
    return rows // sum(enabled)


def _enabled(enabled: tuple[bool, ...]) -> list[int]:
    return [third for third, on in enumerate(enabled) if on]
