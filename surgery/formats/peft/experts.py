"""LoRA on fused experts (`target_parameters`): one pair of factors for all experts of a weight [E, out, in].

On disk the experts are fused too, or each has its own Linears; transformers fuses those when it loads them, so that
an adapter made with it says `mlp.experts` where the checkpoint says `mlp.experts.3.up_proj`.

Shapes in names: E experts, R rank, I and O inputs and outputs of one expert.
Source: PEFT 0.21, `ParamWrapper`: a [E·R, I] lies expert by expert, b [O, R·E] rank by rank.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from surgery.formats.peft.additive import AddDelta
from surgery.formats.peft.base import Base, Misfit
from surgery.formats.peft.delta import Delta
from surgery.formats.peft.method import Change, Part
from surgery.formats.peft.patch import Step
from surgery.formats.peft.settings import Settings

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["FusedLowRank", "expert_changes"]

# A fused weight by the Linears that transformers 5 makes it of, in their order along the outputs.
FUSED: Mapping[str, tuple[tuple[str, ...], ...]] = {
    "gate_up_proj": (("gate_proj", "up_proj"), ("w1", "w3")),
    "down_proj": (("down_proj",), ("w2",)),
}
# Where the experts of one layer are: as transformers 5 has it, and as older checkpoints do.
RENAMED = ((r"(.*\.)?mlp\.experts", "mlp.experts", "block_sparse_moe.experts"),)


@dataclass(frozen=True, slots=True)
class FusedLowRank(Delta):
    """(b_e @ a_e) * scaling for the experts from `first` on, of their outputs from `offset` on."""

    num_experts: int
    num_outputs: int  # of the fused weight
    rank: int
    scaling: float
    first: int = 0
    num_held: int = 1  # experts in the weight
    offset: int = 0

    @property
    def count(self) -> int:
        """Experts in the weight."""
        return self.num_held

    def shapes(self) -> tuple[tuple[int, ...], ...]:
        """a [E·R, I], b [O, R·E]."""
        return (self.num_experts * self.rank, self.cols), (self.num_outputs, self.rank * self.num_experts)

    def scaled(self, weight: float) -> Delta:
        """As PEFT's `set_scale`."""
        return replace(self, scaling=weight * self.scaling)

    def prepared(self, tensors: Sequence[Tensor]) -> Sequence[Tensor]:
        """a [E, R, I], b [E, O, R]."""
        a, b = tensors
        b_EOR = b.view(self.num_outputs, self.rank, self.num_experts).permute(2, 0, 1)
        held = slice(self.first, self.first + self.num_held)
        rows = slice(self.offset, self.offset + self.rows)
        return a.view(self.num_experts, self.rank, self.cols)[held], b_EOR[held, rows]

    def block(self, tensors: Sequence[Tensor], index: int, rows: slice, cols: slice) -> Tensor:
        """The product for one expert."""
        from surgery.formats.peft.products import product

        a_ERI, b_EOR = tensors
        return product("delta", b_EOR[index, rows], a_ERI[index, :, cols]).mul_(self.scaling)


@dataclass(frozen=True, slots=True)
class Fused:
    """A fused weight [E, O, I] as an adapter knows it, and where it is on disk."""

    name: str  # `gate_up_proj`
    num_experts: int
    num_outputs: int
    num_inputs: int
    is_whole: bool  # one tensor on disk; else a Linear for each expert
    is_turned: bool  # stored [E, I, O]
    tensors: tuple[tuple[str, ...], ...]  # by expert; the outputs of one lie one after the other

    def fits(self, part: Part) -> bool:
        """Whether the factors of `part` are of this weight's shape."""
        (rows, inputs), (outputs, cols) = part.matrices("lora_A", "lora_B")
        return (
            rows == cols and rows % self.num_experts == 0 and (outputs, inputs) == (self.num_outputs, self.num_inputs)
        )


def expert_changes(path: str, parts: Sequence[Part], base: Base, settings: Settings) -> Iterable[Change] | None:
    """What the `parts` of the module `path` do to its fused weights; None if it has none."""
    weights = [weight for weight in _fused(path, base) if settings.targets_parameter(f"{path}.{weight.name}")]
    if not weights:
        return None
    return _all_changes(path, parts, weights, base, settings)


def _all_changes(
    path: str, parts: Sequence[Part], weights: list[Fused], base: Base, settings: Settings
) -> Iterator[Change]:
    innermost_first = sorted(parts, key=lambda part: -part.depth)
    if len(parts) != len(weights):
        held = ", ".join(f"`{weight.name}`" for weight in weights)
        raise Misfit(f"holds {len(parts)} pairs of factors for {held}")
    for ordered in (weights, weights[::-1]):
        if all(weight.fits(part) for weight, part in zip(ordered, innermost_first, strict=True)):
            for weight, part in zip(ordered, innermost_first, strict=True):
                yield from _changes(path, part, weight, base, settings)
            return
    shapes = "; ".join(
        f"{weight.name} [{weight.num_experts}, {weight.num_outputs}, {weight.num_inputs}]" for weight in weights
    )
    raise Misfit(f"was made for other experts than the base's: {shapes}")


def _changes(path: str, part: Part, weight: Fused, base: Base, settings: Settings) -> Iterator[Change]:
    rank = next(part.matrices("lora_A"))[0] // weight.num_experts
    scaling = settings.scaling(f"{path}.{weight.name}", rank)
    whole = FusedLowRank(weight.num_outputs, weight.num_inputs, weight.num_experts, weight.num_outputs, rank, scaling)
    inputs = part.inputs("lora_A", "lora_B")
    if weight.is_whole:
        (name,) = weight.tensors[0]
        delta = replace(whole, num_held=weight.num_experts)
        yield Change(name, Step(AddDelta(base.types[name].shape, delta, weight.is_turned, rounds_delta=True), inputs))
        return
    for expert, names in enumerate(weight.tensors):
        offset = 0
        for name in names:
            shape = base.types[name].shape
            delta = replace(whole, rows=shape[0], first=expert, offset=offset)
            yield Change(name, Step(AddDelta(shape, delta, rounds_delta=True), inputs))
            offset += shape[0]


def _fused(path: str, base: Base) -> list[Fused]:
    """The fused weights of the module that an adapter calls `path`, in the order in which transformers has them."""
    target = base.target(path)
    if target is not None:
        names = [name for name, type_ in target.module.tensors.items() if len(type_.shape) == 3]
        if names:
            return [_whole(name, base) for name in sorted(names, key=_order)]
    return list(_of_linears(path, base))


def _order(name: str) -> int:
    order = list(FUSED)
    short = name.rpartition(".")[2]
    return order.index(short) if short in order else len(order)


def _whole(name: str, base: Base) -> Fused:
    experts, *sizes = base.types[name].shape
    turned = _is_turned(name, base)
    outputs, inputs = reversed(sizes) if turned else sizes
    return Fused(name.rpartition(".")[2], experts, outputs, inputs, True, turned, ((name,),))


def _is_turned(name: str, base: Base) -> bool:
    """Whether fused experts are stored [E, in, out], as those of gpt-oss and Llama 4: gate and up are twice as wide."""
    parent = name.rpartition(".")[0]
    gate_up, down = (base.types.get(f"{parent}.{short}") for short in FUSED)
    if gate_up is None or down is None:
        return False
    return gate_up.shape[2] == 2 * down.shape[1] and gate_up.shape[1] != 2 * down.shape[2]


def _of_linears(path: str, base: Base) -> Iterator[Fused]:
    for parent in (path, *(path.replace(new, old) for regex, new, old in RENAMED if re.fullmatch(regex, path))):
        num_experts = 0
        while any(base.tensor(f"{parent}.{num_experts}.{short}.weight") for short in _linears()):
            num_experts += 1
        for name, spellings in FUSED.items() if num_experts else ():
            for linears in spellings:
                found = [_linear_names(parent, expert, linears, base) for expert in range(num_experts)]
                if all(names is not None for names in found):
                    yield _of_names(name, tuple(names for names in found if names is not None), base)


def _linears() -> Iterator[str]:
    return (short for spellings in FUSED.values() for linears in spellings for short in linears)


def _linear_names(parent: str, expert: int, linears: tuple[str, ...], base: Base) -> tuple[str, ...] | None:
    names = [base.tensor(f"{parent}.{expert}.{short}.weight") for short in linears]
    return tuple(name for name in names if name is not None) if all(names) else None


def _of_names(name: str, tensors: tuple[tuple[str, ...], ...], base: Base) -> Fused:
    shapes = [base.types[tensor].shape for tensor in tensors[0]]
    return Fused(name, len(tensors), sum(shape[0] for shape in shapes), shapes[0][1], False, False, tensors)
