"""Spherical interpolation of two tensors."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, cast

from surgery.graph import Span
from surgery.numerics.dtypes import torch_dtype
from surgery.numerics.merge.kernel import UNIT, MergeKernel
from surgery.types import TensorType

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["Slerp"]

_SMALLEST_NORM = 1e-8  # smaller ones count as 1
_COLINEAR = 0.9995  # |cosine| from which the interpolation is linear


@dataclass(frozen=True, slots=True)
class Slerp(MergeKernel):
    """From the first input (t = 0) to the second (t = 1) on the arc between them; linear where nearly parallel.

    Always computed in float32, norms and dot product in chunks of 2^20 elements, as mergekit does:
    the bits are its own for a tensor of any size. The sums are taken on the CPU.
    Source: mergekit `slerp`.
    """

    t: float

    @property
    def num_inputs(self) -> int:
        """Two."""
        return 2

    @property
    def reductions(self) -> int:
        """Norms, then the dot product of what was divided by them."""
        return 2

    def unit(self, *inputs: TensorType) -> int | None:
        """mergekit's chunk."""
        return UNIT

    @property
    def scratch(self) -> int:
        """The chunks in float32, what they are divided by, and their products."""
        return 24

    def partial(self, state: object, span: Span, *tiles: Tensor) -> object:
        """The norms of one chunk, or its dot product, f32 [1, 1]."""
        import torch

        from surgery.numerics.merge.vectors import euclidean

        work = self.work(*tiles)
        chunks = [tile.cpu().to(work).view(1, -1).to(torch.float32) for tile in tiles]
        if state is None:
            return tuple(euclidean(x, dim=1, keepdim=True) for x in chunks)
        x, y = (chunk / norm for chunk, norm in zip(chunks, cast("tuple[Tensor, Tensor]", state), strict=True))
        return (x * y).sum(dim=1, keepdim=True)

    def combine(self, state: object, partials: Iterable[object], *inputs: TensorType) -> object:
        """The two norms, then the two coefficients, f32 [1, 1]."""
        import torch

        from surgery.numerics.merge.vectors import euclidean

        parts = list(partials)
        if not parts:
            return None
        if state is not None:
            return _coefficients(torch.stack(cast("list[Tensor]", parts)).sum(dim=0), self.t)
        chunks = zip(*cast("list[tuple[Tensor, Tensor]]", parts), strict=True)
        norms = (euclidean(torch.stack(norms), dim=0) for norms in chunks)
        return tuple(torch.where(norm > _SMALLEST_NORM, norm, 1) for norm in norms)

    def tile(self, state: object, partial: object, span: Span, *tiles: Tensor) -> tuple[Tensor | None, ...]:
        """One tile."""
        import torch

        from surgery.numerics.merge.pieces import load, pieces, store
        from surgery.numerics.scratch import scratch

        first = tiles[0]
        work = self.work(*tiles)
        out = torch.empty(first.numel(), dtype=torch_dtype(self.dtype), device=first.device)
        coefficients = [c.to(first.device).view(1) for c in cast("tuple[Tensor, Tensor]", state or ())]
        for piece in pieces(first.numel()):
            scaled = [
                torch.mul(load(load(tile[piece], work, "cast"), torch.float32, f"x {i}"), coefficient,
                          out=scratch(f"x {i}", torch.float32, piece.stop - piece.start, first.device))
                for i, (tile, coefficient) in enumerate(zip(tiles, coefficients, strict=True))
            ]  # fmt: skip
            store(out, piece, load(scaled[0].add_(scaled[1]), work, "result"))
        return (out,)


def _coefficients(dot: Tensor, t: float) -> tuple[Tensor, Tensor]:
    """What the two inputs are multiplied by, f32 [1, 1]."""
    import torch

    dot = dot.clamp(-1, 1)
    share = torch.tensor([[t]], dtype=torch.float32)
    if bool(dot.abs() > _COLINEAR):
        return 1 - share, share
    theta = torch.acos(dot)
    return torch.sin((1 - share) * theta) / torch.sin(theta), torch.sin(share * theta) / torch.sin(theta)
