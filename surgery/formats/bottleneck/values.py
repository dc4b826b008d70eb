"""Initial values of bottlenecks: functions of the spec's seed and the tensor's name, in whatever order they are made.

Source: adapters 1.3.0, `methods/modeling.py`, `init_weights: bert` and `mam_adapter`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from surgery.formats.bottleneck.layout import Sizes
from surgery.graph import Graph, Kernel, Node
from surgery.numerics.constant import Constant
from surgery.types import DType, TensorType

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["Draw", "Init", "initial_values"]

Init = Literal["bert", "zero"]
DEVIATION = 0.02  # of BERT's weights


def initial_values(keys: Mapping[str, str], sizes: Sizes, init: Init, draw: Draw) -> dict[str, Node]:
    """The tensors of one bottleneck, named by `keys` from some of PARTS.

    bert: N(0, 0.02) both. zero: down as torch begins a Linear, up zero, so that nothing changes. Biases are zero.
    """
    nodes: dict[str, Node] = {}
    for part, key in keys.items():
        shape, name = sizes.shapes[part], f"{draw.adapter}/{key}"
        kernel: Kernel = Constant(0.0, shape)
        if part == "adapter_down.weight" and init == "zero":
            kernel = Uniform(shape, draw.seed, name)
        elif part.endswith(".weight") and init == "bert":
            kernel = Normal(shape, draw.seed, name)
        nodes[key] = draw.graph.apply(kernel)[0]
    return nodes


@dataclass(frozen=True, slots=True)
class Draw:
    """What initial values are drawn for, and where their nodes are made."""

    graph: Graph
    seed: int
    adapter: str


@dataclass(frozen=True, slots=True)
class Normal(Kernel):
    """f32 of this shape, normal with deviation 0.02, a function of seed and name."""

    shape: tuple[int, ...]
    seed: int
    name: str

    def infer(self, *inputs: TensorType) -> tuple[TensorType, ...]:
        """One tensor."""
        return (TensorType(DType.F32, self.shape),)

    def run(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        """Drawn on the CPU, so that no device shows in the bits."""
        import torch

        from surgery.numerics.lowrank.factors import generator

        draws = generator(f"{self.seed}\0{self.name}")
        return (torch.empty(self.shape).normal_(std=DEVIATION, generator=draws),)


@dataclass(frozen=True, slots=True)
class Uniform(Kernel):
    """f32 of this shape [out, in], uniform in ±1/√in as torch begins a Linear, a function of seed and name."""

    shape: tuple[int, ...]
    seed: int
    name: str

    def infer(self, *inputs: TensorType) -> tuple[TensorType, ...]:
        """One tensor."""
        return (TensorType(DType.F32, self.shape),)

    def run(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        """Drawn on the CPU, so that no device shows in the bits."""
        import torch

        from surgery.numerics.lowrank.factors import generator

        bound, draws = self.shape[-1] ** -0.5, generator(f"{self.seed}\0{self.name}")
        return (torch.empty(self.shape).uniform_(-bound, bound, generator=draws),)
