"""`Patch`: what an adapter does to one tensor of its base, as kernels to be applied to the tensor's node."""

from __future__ import annotations

from dataclasses import dataclass

from surgery.errors import OpError, Problem
from surgery.formats.peft.fold import FoldKernel
from surgery.formats.peft.scaling import Rotate, Rotation
from surgery.graph import Graph, Node
from surgery.numerics.cast import Cast
from surgery.types import TensorType

__all__ = ["AnyStep", "Patch", "Replacement", "Rotated", "Step"]


@dataclass(frozen=True, slots=True)
class Step:
    """A kernel that folds `inputs`, tensors of the adapter, into the base."""

    kernel: FoldKernel
    inputs: tuple[Node, ...]

    def type(self, base: TensorType) -> TensorType:
        """The type of the folded tensor. Raises ValueError if the base does not fit."""
        (folded,) = self.kernel.infer(base, *(node.type for node in self.inputs))
        return folded

    def apply(self, graph: Graph, base: Node, weight: float) -> Node:
        """The folded tensor. Raises ValueError where `weight` has no meaning."""
        kernel = self.kernel if weight == 1 else self.kernel.scaled(weight)
        return graph.apply(kernel, base, *self.inputs)[0]


@dataclass(frozen=True, slots=True)
class Rotated:
    """A rotation of the base by blocks that are computed whole from a tensor of the adapter."""

    kernel: Rotate
    rotation: Rotation
    triangles: Node

    def type(self, base: TensorType) -> TensorType:
        """The base's type. Raises ValueError if it does not fit."""
        (folded,) = self.kernel.infer(base, *self.rotation.infer(self.triangles.type))
        return folded

    def apply(self, graph: Graph, base: Node, weight: float) -> Node:
        """The rotated tensor. Raises ValueError for a `weight` other than 1."""
        kernel = self.kernel if weight == 1 else self.kernel.scaled(weight)
        return graph.apply(kernel, base, *graph.apply(self.rotation, self.triangles))[0]


@dataclass(frozen=True, slots=True)
class Replacement:
    """A tensor that the adapter stores whole; it takes the dtype of the base's."""

    node: Node
    restores: bool = False  # what the adapter was trained on, not what it trained

    def type(self, base: TensorType) -> TensorType:
        """The base's dtype, the adapter's shape."""
        return TensorType(base.dtype, self.node.type.shape)

    def apply(self, graph: Graph, base: Node, weight: float) -> Node:
        """The adapter's tensor. Raises ValueError for a `weight` other than 1."""
        if weight != 1 and not self.restores:
            raise ValueError("is stored whole in the adapter, so that a weight has no meaning")
        if self.node.type.dtype is base.type.dtype:
            return self.node
        return graph.apply(Cast(base.type.dtype), self.node)[0]


AnyStep = Step | Rotated | Replacement


@dataclass(frozen=True, slots=True)
class Patch:
    """What an adapter does to one tensor, step by step."""

    tensor: str
    steps: tuple[AnyStep, ...]
    origin: str = ""  # the tensor of the base that it starts from, where that is another

    def type(self, base: TensorType) -> TensorType:
        """The type of the folded tensor: the base's, unless the adapter holds the tensor in another shape."""
        for step in self.steps:
            base = step.type(base)
        return base

    def apply(self, graph: Graph, base: Node, weight: float = 1.0) -> Node:
        """`base` with the adapter folded in, its effect times `weight`.

        Raises OpError where the adapter's method has no such factor, or the tensor's type does not fit.
        """
        node = base
        for step in self.steps:
            try:
                node = step.apply(graph, node, weight)
            except ValueError as error:
                fix = "give a weight of 1" if weight != 1 else ""
                raise OpError(Problem(f"`{self.tensor}` {error}", fix=fix)) from None
        return node
