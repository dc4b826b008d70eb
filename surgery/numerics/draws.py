"""Initial values of adapters, drawn as PEFT draws them: one sequence of random numbers for all modules.

Why a script: PEFT draws module after module from torch's one generator, so what a module gets depends on all modules
before it. A `Script` is what is drawn, in order; each module's values are a node that knows the script and its own
place in it, and the generator's states on the way are remembered, so that no order of evaluation costs much.

Source: PEFT 0.21.2, `tuners/lora/layer.py`, `update_layer` and `reset_lora_parameters`.
"""

from __future__ import annotations

import hashlib
import math
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Literal

from surgery.graph import Kernel
from surgery.types import DType, TensorType

if TYPE_CHECKING:
    from torch import Generator, Tensor

__all__ = ["LoraDraws", "LoraShape", "Script"]

Init = Literal["kaiming", "gaussian"]
FLOAT_BYTES = 4
MOST_STATES = 4096  # of a generator, 5 kB each


@dataclass(frozen=True, slots=True)
class LoraShape:
    """A module that gets factors [rank, num_inputs] and [num_outputs, rank]; an embedding's inputs are tokens."""

    num_inputs: int
    num_outputs: int
    rank: int
    is_embedding: bool = False
    is_turned: bool = False  # A is drawn into a matrix [in, rank]: an embedding's B, seen from the head that shares it
    rounded_to: DType = DType.F32  # PEFT makes the factors in the dtype of the weight, and only then widens them

    @property
    def num_drawn(self) -> int:
        """Elements of both factors."""
        return self.rank * (self.num_inputs + self.num_outputs)


class Script:
    """All modules of an adapter in the live model's order, and how they begin; printed as its digest."""

    def __init__(self, modules: Sequence[LoraShape], init: Init) -> None:
        self.modules = tuple(modules)
        self.init: Init = init
        self._digest = hashlib.sha256(repr((self.modules, init)).encode()).hexdigest()

    def __repr__(self) -> str:
        return f"Script({self._digest[:32]})"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Script) and other._digest == self._digest

    def __hash__(self) -> int:
        return hash(self._digest)


@dataclass(frozen=True, slots=True)
class LoraDraws(Kernel):
    """The factors of module number `index` of a script: A f32 [rank, in] and B f32 [out, rank].

    Linear: A uniform in ±1/√in (`kaiming`), or normal with deviation 1/rank (`gaussian`); B zero.
    Embedding: A zero, B standard normal.
    """

    seed: int
    script: Script
    index: int

    def infer(self, *inputs: TensorType) -> tuple[TensorType, ...]:
        """A and B."""
        shape = self.script.modules[self.index]
        return (
            TensorType(DType.F32, (shape.rank, shape.num_inputs)),
            TensorType(DType.F32, (shape.num_outputs, shape.rank)),
        )

    def run(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        """Both factors, on the CPU, so that no device shows in the bits."""
        from surgery.numerics.dtypes import torch_dtype

        dtype = torch_dtype(self.script.modules[self.index].rounded_to)
        return tuple(factor.to(dtype).float() for factor in _tape(self.seed, self.script).play(self.index))

    def workspace(self, *inputs: TensorType) -> int:
        """What is drawn for the largest module, which may be passed on the way, and rounded."""
        return 2 * FLOAT_BYTES * max(shape.num_drawn for shape in self.script.modules)


@lru_cache(maxsize=8)
def _tape(seed: int, script: Script) -> _Tape:
    return _Tape(seed, script)


class _Tape:
    """The generator's states at the modules of a script, as far as they are known."""

    def __init__(self, seed: int, script: Script) -> None:
        import torch

        self._script = script
        self._generator = torch.Generator().manual_seed(seed)
        self._states = {0: self._generator.get_state()}
        self._stride = -(-len(script.modules) // MOST_STATES)
        self._lock = threading.Lock()

    def play(self, index: int) -> tuple[Tensor, Tensor]:
        """The factors of module `index`."""
        with self._lock:
            start = max(known for known in self._states if known <= index)
            self._generator.set_state(self._states[start])
            for place in range(start, index):
                _draw(self._script.modules[place], self._script.init, self._generator)
                self._remember(place + 1)
            drawn = _draw(self._script.modules[index], self._script.init, self._generator)
            self._remember(index + 1)
            return drawn

    def _remember(self, place: int) -> None:
        if place % self._stride == 0 and place not in self._states:
            self._states[place] = self._generator.get_state()


def _draw(shape: LoraShape, init: Init, generator: Generator) -> tuple[Tensor, Tensor]:
    """As PEFT makes the two layers, and then begins them anew."""
    import torch
    from torch import nn

    from surgery.numerics.dtypes import torch_dtype

    a_RI = torch.empty(shape.rank, shape.num_inputs)
    b_OR = torch.empty(shape.num_outputs, shape.rank)
    if shape.is_embedding:
        for factor in (a_RI, b_OR, b_OR):
            factor.normal_(generator=generator)
        return a_RI.zero_(), b_OR
    for factor in (a_RI, b_OR):  # as every Linear begins
        nn.init.kaiming_uniform_(factor, a=math.sqrt(5), generator=generator)
    if shape.is_turned:
        a_RI = torch.empty(shape.num_inputs, shape.rank, dtype=torch_dtype(shape.rounded_to)).t()
    if init == "gaussian":
        nn.init.normal_(a_RI, std=1 / shape.rank, generator=generator)
    else:
        nn.init.kaiming_uniform_(a_RI, a=math.sqrt(5), generator=generator)
    return a_RI.contiguous(), b_OR.zero_()
