"""`Family`: a row of the inventory's table, and what rows have in common."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

__all__ = ["LABELS", "Family", "heads_after"]

LABELS = {"labels": "num_labels | len(id2label) | 2"}


@dataclass(frozen=True, slots=True)
class Family:
    """The models of one architecture.

    `heads` are templates by what the class is called behind the family's name (`ForCausalLM`, `Model`),
    the usual one first. `sizes` are the names that the templates use besides the keys of the config.
    """

    model_types: tuple[str, ...]
    base: str
    heads: Mapping[str, str]
    sizes: Mapping[str, str] = field(default_factory=dict[str, str])


def heads_after(prefix: str, **heads: str) -> dict[str, str]:
    """Heads after a base model at `prefix`, and the base model alone."""
    return {name: f"{prefix}.**\n{head}" for name, head in heads.items()} | {"Model": "**"}
