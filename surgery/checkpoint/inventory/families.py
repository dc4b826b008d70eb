"""The families of the inventory's table, and what each says of a config."""

from __future__ import annotations

from collections.abc import Mapping
from typing import cast

from surgery.checkpoint.architecture import architecture_of
from surgery.checkpoint.inventory.decoders import DECODERS
from surgery.checkpoint.inventory.encoders import ENCODERS
from surgery.checkpoint.inventory.family import Family
from surgery.checkpoint.inventory.llamas import LLAMAS
from surgery.checkpoint.inventory.template import Keys, expand
from surgery.errors import CheckpointError, Problem

__all__ = ["TABLE", "family_of", "head_of", "model_types", "parameters"]

TABLE: tuple[Family, ...] = (*LLAMAS, *DECODERS, *ENCODERS)


def model_types() -> tuple[str, ...]:
    """Every `model_type` that the inventory knows."""
    return tuple(sorted(name for family in TABLE for name in family.model_types))


def family_of(config: Mapping[str, object]) -> Family | None:
    """The row of the table for this config's `model_type`."""
    return next((family for family in TABLE if config.get("model_type") in family.model_types), None)


def head_of(family: Family, config: Mapping[str, object]) -> str:
    """Which of the family's heads the class in `architectures` has. Raises CheckpointError if it is none of them."""
    architectures = config.get("architectures")
    names = cast("list[object]", architectures) if isinstance(architectures, list) else []
    if not names:
        return next(iter(family.heads))
    found = [head for head in family.heads if str(names[0]).endswith(head)]
    if not found:
        what = f"config.json names the class {names[0]}, which is not in the inventory"
        known = ", ".join(f"*{head}" for head in family.heads)
        raise CheckpointError(Problem(what, fix=f"known of {config['model_type']}: {known}"))
    return max(found, key=len)


def parameters(
    family: Family, head: str, config: Mapping[str, object], *, whole: bool = False
) -> list[tuple[str, tuple[int, ...]]]:
    """Name and shape of every parameter, in order. Raises Missing.

    `whole`: with all that a checkpoint may hold besides, such as a pooler, or a head that is tied.
    """
    tied = architecture_of(config).is_tied(config)
    given: dict[str, object] = {"head": head, "tied": tied and not whole}
    if whole:
        given["has_pooler"] = True
    return list(expand(family.heads[head], family.base, Keys(config, family.sizes, given)))
