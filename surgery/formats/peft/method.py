"""What the methods of PEFT share: how an adapter's tensors are named, and what one of them does to one module."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

from surgery.formats.peft.base import Base, Inconsistent, Misfit, Target
from surgery.formats.peft.patch import AnyStep
from surgery.formats.peft.settings import Settings
from surgery.graph import Node
from surgery.types import TensorType

__all__ = ["Change", "Method", "Part", "Shared"]

Shared = Mapping[str, Node]
"""Tensors that belong to no module, by name."""


@dataclass(frozen=True, slots=True)
class Part:
    """What an adapter holds for one module: tensors by slot (`lora_A`), the module as the adapter names it."""

    path: str
    nodes: Mapping[str, Node]
    depth: int = 0  # how many `base_layer` the path went through: of fused experts, each weight has its own

    def types(self, *slots: str) -> Iterator[TensorType]:
        """The types in `slots`. Raises Misfit if one is missing."""
        for slot in slots:
            if slot not in self.nodes:
                raise Inconsistent(f"lacks `{slot}`, which belongs to {', '.join(f'`{held}`' for held in self.nodes)}")
            yield self.nodes[slot].type

    def matrices(self, *slots: str) -> Iterator[tuple[int, int]]:
        """The shapes in `slots`. Raises Misfit if one is missing or no matrix."""
        for slot, type_ in zip(slots, self.types(*slots), strict=True):
            if len(type_.shape) != 2:
                raise Misfit(f"has a `{slot}` of {type_}, which is no matrix")
            yield type_.shape[0], type_.shape[1]

    def inputs(self, *slots: str) -> tuple[Node, ...]:
        """The nodes in `slots`."""
        return tuple(self.nodes[slot] for slot in slots)


@dataclass(frozen=True, slots=True)
class Change:
    """One step of what a method does to a tensor of the base."""

    tensor: str
    step: AnyStep
    ties: bool = False  # meant for both sides of a tied pair


class Method(ABC):
    """A `peft_type`. A subclass names its tensors and says what they do."""

    suffixes: ClassVar[Mapping[str, str]]  # of a key, after the module's path → slot
    shared: ClassVar[tuple[str, ...]] = ()  # names that stand for no module

    def check(self, settings: Settings, shared: Shared) -> None:
        """Raises Misfit for what cannot be folded whatever the base is."""
        del settings, shared

    @abstractmethod
    def changes(self, part: Part, target: Target, settings: Settings, shared: Shared) -> Iterable[Change]:
        """What `part` does to `target`. Raises Misfit if it does not fit."""

    def gathered(self, path: str, parts: Sequence[Part], base: Base, settings: Settings) -> Iterable[Change] | None:
        """What several parts do together to a module that is more than one weight; None for any other module."""
        del path, parts, base, settings
        return None
