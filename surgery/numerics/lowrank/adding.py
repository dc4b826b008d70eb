"""Kernels that add LoRA factors of one module up. All work in float32, as PEFT does, and give float32.

Shapes: O rows of B (out), I columns of A (in), R rank. A convolution's A is [R, in, ...] and its B [O, R, 1, ...];
what needs matrices sees them as [R, I] and [O, R].
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from surgery.graph import Kernel, TileError
from surgery.numerics.lowrank.recipe import Recipe
from surgery.types import DType, TensorType

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["Concatenated", "Mixed", "ReducedSum", "SummedSVD"]

FLOAT_BYTES = 4
LONGEST_SQUARE = 32768
FACTOR_DTYPES = (DType.F32, DType.F16, DType.BF16)


@dataclass(frozen=True, slots=True)
class Concatenated(Kernel):
    """Tensors one after the other along `dim`, each times its factors in turn."""

    dim: int
    factors: tuple[tuple[float, ...], ...]  # of each input; multiplied one by one, for PEFT's bits

    def infer(self, *inputs: TensorType) -> tuple[TensorType, ...]:
        """Raises ValueError if the tensors differ in more than the length of `dim`."""
        _check_floats(inputs)
        shapes = [(*type_.shape[: self.dim], *type_.shape[self.dim + 1 :]) for type_ in inputs]
        if len(set(shapes)) != 1 or len({len(type_.shape) for type_ in inputs}) != 1:
            raise ValueError(f"their shapes do not fit: {_listed(inputs)}")
        shape = list(inputs[0].shape)
        shape[self.dim] = sum(type_.shape[self.dim] for type_ in inputs)
        return (TensorType(DType.F32, tuple(shape)),)

    def run(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        """One tensor."""
        import torch

        parts: list[Tensor] = []
        for tensor, factors in zip(_floats(inputs), self.factors, strict=True):
            for factor in factors:
                tensor = tensor * factor
            parts.append(tensor)
        return (torch.cat(parts, dim=self.dim).to(inputs[0].device),)

    def workspace(self, *inputs: TensorType) -> int:
        """The scaled parts."""
        return sum(2 * FLOAT_BYTES * type_.num_elements for type_ in inputs)


@dataclass(frozen=True, slots=True)
class Mixed(Kernel):
    """Tensors of one shape, added up as the recipe says."""

    recipe: Recipe

    def infer(self, *inputs: TensorType) -> tuple[TensorType, ...]:
        """Raises ValueError if the shapes differ."""
        _check_floats(inputs)
        if len({type_.shape for type_ in inputs}) != 1:
            raise ValueError(f"their shapes differ: {_listed(inputs)}")
        return (TensorType(DType.F32, inputs[0].shape),)

    def run(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        """One tensor."""
        from surgery.numerics.lowrank.merging import merged

        return (merged(self.recipe, _floats(inputs)).to(inputs[0].device),)

    def workspace(self, *inputs: TensorType) -> int:
        """Every tensor in float32, pruned, and what pruning and electing take."""
        return (len(inputs) + 6) * FLOAT_BYTES * inputs[0].num_elements


@dataclass(frozen=True, slots=True)
class SummedSVD(Kernel):
    """A_1, B_1, A_2, B_2, ... → A [rank, I], B [O, rank] of the sum of whole products, cut to `rank`.

    As PEFT does it: B = U·S and A = Vh of a full SVD, with LAPACK's signs. Only where a square matrix of
    singular vectors would take more than 4 GiB (an embedding) is it left out, which can change the last bit.
    """

    recipe: Recipe
    scalings: tuple[float, ...]
    rank: int

    def infer(self, *inputs: TensorType) -> tuple[TensorType, ...]:
        """Raises ValueError if the products differ in shape, or have no such rank."""
        return _pair_types(inputs, self.rank)

    def run(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        """A and B."""
        import torch

        from surgery.numerics.lowrank.factors import whole_svd

        delta_OI = self._delta(inputs)
        u_OO, s_K, v_II = whole_svd(delta_OI, full_matrices=max(delta_OI.shape) <= LONGEST_SQUARE)
        b_OR = u_OO[:, : self.rank] @ torch.diag(s_K[: self.rank])
        return _reshaped(v_II[: self.rank].contiguous(), b_OR, inputs)

    def _delta(self, inputs: Sequence[Tensor]) -> Tensor:
        from surgery.numerics.lowrank.merging import merged

        pairs = zip(_matrices(inputs), self.scalings, strict=True)
        return merged(self.recipe, ((b_OR @ a_RI) * scaling for (a_RI, b_OR), scaling in pairs))

    def workspace(self, *inputs: TensorType) -> int:
        """The products, the sum, LAPACK's copy of it, both square matrices of singular vectors, its work area."""
        num_rows, num_columns = inputs[1].shape[0], math.prod(inputs[0].shape[1:])
        num_products = len(inputs) // 2 + 6 if self.recipe.elects_sign or self.recipe.pruning != "none" else 3
        shorter, longer = sorted((num_rows, num_columns))
        squares = (longer if longer <= LONGEST_SQUARE else shorter) * longer + 9 * shorter**2
        return FLOAT_BYTES * (num_products * num_rows * num_columns + squares)

    def measure(self, inputs: Sequence[Tensor], outputs: Sequence[Tensor]) -> TileError | None:
        """What the cut leaves out of the sum."""
        from surgery.numerics.lowrank.measuring import error_of

        delta_OI = self._delta(inputs)
        return error_of(lambda start, stop: delta_OI[start:stop], *_matrices(outputs)[0])


@dataclass(frozen=True, slots=True)
class ReducedSum(Kernel):
    """A_1, B_1, A_2, B_2, ... → A [rank, I], B [O, rank] of Σ factor·BA, from the factors alone, both sides alike.

    With `energy`, rows beyond those that hold this share of the squared singular values are zeros.
    """

    factors: tuple[float, ...]  # weight times scaling
    rank: int
    energy: float | None = None

    def infer(self, *inputs: TensorType) -> tuple[TensorType, ...]:
        """Raises ValueError if the products differ in shape, or have no such rank."""
        return _pair_types(inputs, self.rank)

    def run(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        """A and B, computed in float64, since the factors are small."""
        from surgery.numerics.lowrank.factors import balanced, energy_rank, product_svd

        a_RI, b_OR = self._stacked(inputs)
        triplets = product_svd(b_OR, a_RI)
        singular = triplets[1]
        num_kept = min(self.rank, singular.numel())
        if self.energy is not None:
            num_kept = min(num_kept, energy_rank(singular, float(singular.square().sum()), self.energy))
        a_RI, b_OR = balanced(triplets, self.rank, num_kept)
        return _reshaped(a_RI.float(), b_OR.float(), inputs)

    def _stacked(self, inputs: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        import torch

        pairs = _matrices(inputs)
        a_RI = torch.cat([a_RI.double() * factor for (a_RI, _), factor in zip(pairs, self.factors, strict=True)])
        return a_RI, torch.cat([b_OR for _, b_OR in pairs], dim=1).double()

    def workspace(self, *inputs: TensorType) -> int:
        """The stacked factors, their QRs and the products with the core, in float64."""
        return 8 * 8 * sum(type_.num_elements for type_ in inputs)

    def measure(self, inputs: Sequence[Tensor], outputs: Sequence[Tensor]) -> TileError | None:
        """What the cut leaves out of the exact sum."""
        from surgery.numerics.lowrank.measuring import error_of

        a_RI, b_OR = self._stacked(inputs)
        return error_of(lambda start, stop: b_OR[start:stop] @ a_RI, *_matrices(outputs)[0])


def _check_floats(inputs: Sequence[TensorType]) -> None:
    for type_ in inputs:
        if type_.dtype not in FACTOR_DTYPES:
            raise ValueError(f"{type_} is none of f32, f16, bf16")


def _pair_types(inputs: Sequence[TensorType], rank: int) -> tuple[TensorType, ...]:
    _check_floats(inputs)
    all_a, all_b = inputs[::2], inputs[1::2]
    for a, b in zip(all_a, all_b, strict=True):
        if len(a.shape) < 2 or len(b.shape) < 2 or a.shape[0] != math.prod(b.shape[1:]):
            raise ValueError(f"A {a} and B {b} have no product")
    if len({a.shape[1:] for a in all_a}) != 1 or len({(b.shape[0], *b.shape[2:]) for b in all_b}) != 1:
        raise ValueError(f"their shapes do not fit: {_listed(inputs)}")
    a, b = all_a[0], all_b[0]
    if not 1 <= rank <= min(b.shape[0], math.prod(a.shape[1:])):
        raise ValueError(f"no product of {a} and {b} has rank {rank}")
    return TensorType(DType.F32, (rank, *a.shape[1:])), TensorType(DType.F32, (b.shape[0], rank, *b.shape[2:]))


def _listed(inputs: Sequence[TensorType]) -> str:
    return ", ".join(map(str, inputs))


def _floats(inputs: Sequence[Tensor], per_adapter: int = 1) -> list[Tensor]:
    """In float32 on the CPU, so that no device shows in the bits. Raises ValueError for a NaN or Inf."""
    for index, tensor in enumerate(inputs):
        if not bool(tensor.isfinite().all()):
            place = [int(axis) for axis in (~tensor.isfinite()).nonzero()[0]]
            which = f"{index // per_adapter + 1} of {len(inputs) // per_adapter}"
            side = f"factor {'AB'[index % 2]} of " if per_adapter == 2 else ""
            raise ValueError(f"cannot be combined: {side}adapter {which} holds a NaN or Inf at {place}")
    return [tensor.cpu().float() for tensor in inputs]


def _matrices(inputs: Sequence[Tensor]) -> list[tuple[Tensor, Tensor]]:
    """(A [R, I], B [O, R]) of each adapter, f32."""
    floats = [tensor.flatten(1) for tensor in _floats(inputs, 2)]
    return list(zip(floats[::2], floats[1::2], strict=True))


def _reshaped(a_RI: Tensor, b_OR: Tensor, inputs: Sequence[Tensor]) -> tuple[Tensor, ...]:
    a, b = inputs[0], inputs[1]
    shaped = a_RI.reshape(-1, *a.shape[1:]), b_OR.reshape(b.shape[0], -1, *b.shape[2:])
    return tuple(factor.to(a.device) for factor in shaped)
