"""`Comparison`: what two checkpoints differ in, as plain data."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from functools import reduce
from typing import Literal

from surgery.types import TensorType, text

__all__ = ["Action", "Comparison", "ConfigDifference", "Figures", "Stored", "TensorDifference"]

Action = Literal["change", "add", "drop", "same"]


@dataclass(frozen=True, slots=True)
class Stored:
    """What a tensor is in one checkpoint; of a 4-bit weight, what a loader makes of it, and its format."""

    type: TensorType
    format: str = ""  # nf4 or fp4
    bits: float = 0.0  # for each element, in that format

    def __str__(self) -> str:
        name = self.format or str(self.type.dtype)
        return f"{name}[{', '.join(map(str, self.type.shape))}]{self.density}"

    @property
    def density(self) -> str:
        """In words; empty where the dtype tells."""
        return f" ({self.bits:.3f} bits)" if self.format else ""

    def to_json(self) -> dict[str, object]:
        """Plain data; `dtype` as headers name it."""
        entry: dict[str, object] = {"dtype": self.type.dtype.disk_name, "shape": list(self.type.shape)}
        return {**entry, "format": self.format, "bits": self.bits} if self.format else entry


@dataclass(frozen=True, slots=True)
class Figures:
    """How far the elements of B are from those of A.

    The sums are over elements that are finite in both; `num_unmatched` counts those that are NaN or infinite in one and
    not the same in the other. `has_values` is False where the bits alone can be compared.
    """

    num_elements: int = 0
    num_different: int = 0  # in their bits; between two dtypes, in their values
    max_abs: float = 0.0
    squares: float = 0.0  # sum of (b - a)²
    squares_a: float = 0.0
    squares_b: float = 0.0
    products: float = 0.0  # sum of a · b
    num_unmatched: int = 0
    first_unmatched: int = -1  # its flat index
    has_values: bool = True

    def __add__(self, other: Figures) -> Figures:
        """Of both together; the first unmatched element is that of `self` if it has one."""
        return Figures(
            self.num_elements + other.num_elements,
            self.num_different + other.num_different,
            max(self.max_abs, other.max_abs),
            self.squares + other.squares,
            self.squares_a + other.squares_a,
            self.squares_b + other.squares_b,
            self.products + other.products,
            self.num_unmatched + other.num_unmatched,
            self.first_unmatched if self.first_unmatched >= 0 else other.first_unmatched,
            self.has_values and other.has_values,
        )

    @property
    def rms(self) -> float:
        """Root of the mean squared difference."""
        return math.sqrt(self.squares / self.num_elements) if self.num_elements else 0.0

    @property
    def relative(self) -> float | None:
        """RMS of the difference over the RMS of A; None where A is zero and B is not."""
        if not self.squares_a:
            return None if self.squares else 0.0
        return math.sqrt(self.squares / self.squares_a)

    @property
    def cosine(self) -> float | None:
        """Cosine similarity; None where one of them is zero."""
        length = math.sqrt(self.squares_a) * math.sqrt(self.squares_b)
        return self.products / length if length else None

    def to_json(self) -> dict[str, object]:
        """Plain data; null for what is not finite."""
        counts: dict[str, object] = {"elements": self.num_elements, "different": self.num_different}
        if not self.has_values:
            return counts
        figures = {"max": self.max_abs, "rms": self.rms, "relative": self.relative, "cosine": self.cosine}
        known = {key: value if value is not None and math.isfinite(value) else None for key, value in figures.items()}
        return {**counts, **known, "not_finite": self.num_unmatched}


@dataclass(frozen=True, slots=True)
class TensorDifference:
    """A name in A (`before`), B (`after`) or both; `figures` where both hold the same shape."""

    name: str
    before: Stored | None
    after: Stored | None
    figures: Figures | None = None
    is_same: bool = False  # byte for byte

    @property
    def action(self) -> Action:
        """What became of A's tensor in B."""
        if self.before is None:
            return "add"
        if self.after is None:
            return "drop"
        return "same" if self.is_same else "change"

    def first_unmatched(self) -> list[int] | None:
        """The index of the first element that is NaN or infinite in one and not the same in the other."""
        if self.figures is None or self.before is None or self.figures.first_unmatched < 0:
            return None
        index: list[int] = []
        left = self.figures.first_unmatched
        for size in reversed(self.before.type.shape):
            left, place = divmod(left, size)
            index.insert(0, place)
        return index

    def to_json(self) -> dict[str, object]:
        """Plain data."""
        sides = {"a": self.before, "b": self.after}
        entry: dict[str, object] = {"name": self.name, "action": self.action}
        entry |= {side: stored.to_json() for side, stored in sides.items() if stored}
        if self.figures:
            entry["figures"] = self.figures.to_json()
        index = self.first_unmatched()
        return entry if index is None else {**entry, "first_not_finite": index}


@dataclass(frozen=True, slots=True)
class ConfigDifference:
    """A key of the config, dotted; which of the two have it, and its values there."""

    key: str
    action: Action
    before: object = None
    after: object = None

    def to_json(self) -> dict[str, object]:
        """Plain data."""
        values = {"a": self.before, "b": self.after}
        left_out = {"add": "a", "drop": "b"}.get(self.action)
        return {"key": self.key, "action": self.action, **{k: v for k, v in values.items() if k != left_out}}


@dataclass(frozen=True, slots=True)
class Comparison:
    """What B is to A; printing it gives what `surgery diff` prints. `tensors` are in A's order, then B's."""

    first: str  # the identity of A
    second: str
    tensors: tuple[TensorDifference, ...]
    config_name: str  # config.json, or adapter_config.json
    config: tuple[ConfigDifference, ...]
    notes: tuple[str, ...]

    def __str__(self) -> str:
        return text(self)

    @property
    def differs(self) -> bool:
        """Whether any tensor, or key of the config, is not the same."""
        return bool(self.config) or any(tensor.action != "same" for tensor in self.tensors)

    def summary(self) -> dict[str, int]:
        """How many tensors are changed, added, dropped and the same."""
        counts: dict[str, int] = dict.fromkeys(("change", "add", "drop", "same"), 0)
        for tensor in self.tensors:
            counts[tensor.action] += 1
        return counts

    def to_json(self) -> dict[str, object]:
        """Plain data, as `surgery diff --json` prints it; of tensors that are the same, the count."""
        return {
            "version": 1,
            "a": self.first,
            "b": self.second,
            "tensors": [tensor.to_json() for tensor in self.tensors if tensor.action != "same"],
            "config": [difference.to_json() for difference in self.config],
            "summary": self.summary(),
            "notes": list(self.notes),
        }


def total(figures: Iterable[Figures]) -> Figures:
    """Of all together."""
    return reduce(Figures.__add__, figures, Figures())
