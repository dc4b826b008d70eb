"""NuSLERP: spherical interpolation of whole tensors, rows or columns, of weights or of task vectors."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, cast

from surgery.graph import Span
from surgery.numerics.dtypes import torch_dtype
from surgery.numerics.merge.kernel import UNIT, MergeKernel, is_whole, unit_of_sums, working_dtype
from surgery.types import TensorType

if TYPE_CHECKING:
    import torch
    from torch import Tensor

__all__ = ["NuSlerp"]

_SMALLEST_NORM = 1e-7  # smaller ones count as this
_COLINEAR = 1e-16  # 1 - cosine^2 up to which the interpolation is linear


@dataclass(frozen=True, slots=True)
class _Arcs:
    """Of each vector, in the working dtype: sin((1 - t) angle), sin(t angle), sin(angle), and whether it has none."""

    first: Tensor
    second: Tensor
    sine: Tensor
    is_colinear: Tensor | None  # None: no vector is


@dataclass(frozen=True, slots=True)
class NuSlerp(MergeKernel):
    """(sin((1 - t) a) x + sin(t a) y) / sin(a), a the angle of x and y, t = w_y / (w_x + w_y).

    Inputs: the base where `has_base` (the arc is then that of the task vectors), x, y. The angle is
    that of the whole tensors where `flatten`, else of each vector along the last dimension of
    `shape`, or along the first where `row_wise`.
    Source: mergekit `nuslerp`, whose bits these are; of whole tensors and of vectors along the first
    dimension, where there are more than WHOLE elements, to the rounding of the cosine.
    """

    weights: tuple[float, float]
    has_base: bool
    flatten: bool
    row_wise: bool
    shape: tuple[int, ...]

    @property
    def num_inputs(self) -> int:
        """Two, and a base."""
        return 2 + self.has_base

    @property
    def reductions(self) -> int:
        """One, for the angles."""
        return 1

    @property
    def _along_first(self) -> bool:
        return not self.flatten and self.row_wise and len(self.shape) > 1

    @property
    def _width(self) -> int:
        """Elements in a row: what the vectors run along, or their number."""
        if self.flatten or not self.shape:
            return max(1, math.prod(self.shape))
        return max(1, math.prod(self.shape[1:]) if self._along_first else self.shape[-1])

    @property
    def _by_rows(self) -> bool:
        return not self._along_first and not self.flatten and self._width < math.prod(self.shape)

    def unit(self, *inputs: TensorType) -> int | None:
        """Whole rows, unless the whole tensor is one vector."""
        if self._by_rows or (self._along_first and not is_whole(*inputs)):
            return max(1, UNIT // self._width) * self._width
        return unit_of_sums(*inputs)

    def state_bytes(self, *inputs: TensorType) -> int:
        """The angle of each vector."""
        if self.flatten or not self.shape:
            return 0
        length = self.shape[0] if self.row_wise else self.shape[-1]
        return 32 * (inputs[0].num_elements // max(1, length))

    @property
    def scratch(self) -> int:
        """Two vectors, their units and a product."""
        return 24

    def partial(self, state: object, span: Span, *tiles: Tensor) -> object:
        """The cosines if the vectors are whole in this span, and what gives them if they are not."""
        import torch

        from surgery.numerics.merge.vectors import gram

        work = self.work(*tiles)
        tiles = tuple(tile.cpu() for tile in tiles)
        x, y = self._pair(work, *tiles)
        if self._by_rows:
            return _cosines(x.view(-1, self._width), y.view(-1, self._width))
        if self._along_first:
            return self._column_partial(x, y)
        products = gram([x, y]) if x.numel() <= UNIT else torch.zeros(2, 2)
        return _cosines(x.view(1, -1), y.view(1, -1)) if span[0] == 0 else None, products

    def _pair(self, work: torch.dtype, *tiles: Tensor) -> tuple[Tensor, Tensor]:
        x, y = (tile.to(work) for tile in tiles[-2:])
        return (x - tiles[0].to(work), y - tiles[0].to(work)) if self.has_base else (x, y)

    def _column_partial(self, x: Tensor, y: Tensor) -> object:
        """(cosines as mergekit lays them out, f64 sums [3, columns]); the first only if all rows are here."""
        import torch

        whole = x.numel() == math.prod(self.shape)
        turned = [v.view(self.shape).transpose(0, -1) for v in (x, y)] if whole else []
        wide_x, wide_y = (v.view(-1, self._width).double() for v in (x, y))
        sums = torch.stack([(a * b).sum(dim=0) for a, b in ((wide_x, wide_x), (wide_y, wide_y), (wide_x, wide_y))])
        return (_cosines(*turned) if whole else None), sums

    def combine(self, state: object, partials: Iterable[object], *inputs: TensorType) -> object:
        """What multiplies and divides each vector."""
        import torch

        from surgery.numerics.merge.vectors import added

        work = torch_dtype(working_dtype(self.compute, *inputs))
        if not inputs[0].num_elements:
            return None
        if self._by_rows:
            return self._arcs(torch.cat(cast("list[Tensor]", list(partials))))
        parts = cast("list[tuple[Tensor | None, Tensor]]", list(partials))
        if len(parts) == 1 and parts[0][0] is not None:
            return self._arcs(parts[0][0])
        if self._along_first:
            xx, yy, xy = sum(sums for _, sums in parts[1:]) + parts[0][1]
        else:
            products = added(sums for _, sums in parts)
            xx, yy, xy = products[0, 0].view(1), products[1, 1].view(1), products[0, 1].view(1)
        norms = [squared.sqrt().clamp(min=_SMALLEST_NORM) for squared in (xx, yy)]
        return self._arcs((xy / norms[0] / norms[1]).clamp(-1, 1).to(work), is_flat=True)

    def _arcs(self, cosines: Tensor, is_flat: bool = False) -> _Arcs:
        import torch

        total = sum(self.weights)
        t = 0.5 if abs(total) < 1e-6 else self.weights[1] / total
        colinear = (1 - cosines.square()) <= _COLINEAR
        angles = torch.acos(torch.where(colinear, 0, cosines))
        values = [torch.sin((1 - t) * angles), torch.sin(t * angles), torch.sin(angles), colinear]
        if self._along_first and not is_flat:
            values = [value.transpose(0, -1) for value in values]
        first, second, sine, colinear = (value.reshape(-1) for value in values)
        return _Arcs(first, second, sine, colinear if bool(colinear.any()) else None)

    def tile(self, state: object, partial: object, span: Span, *tiles: Tensor) -> tuple[Tensor | None, ...]:
        """One tile."""
        import torch

        from surgery.numerics.merge.pieces import delta, load, pieces, store

        work = self.work(*tiles)
        out = torch.empty(tiles[0].numel(), dtype=torch_dtype(self.dtype), device=tiles[0].device)
        for piece in pieces(out.numel()):
            base = load(tiles[0][piece], work, "base") if self.has_base else None
            x, y = (
                load(tile[piece], work, f"x {i}") if base is None else delta(tile[piece], base, f"x {i}")
                for i, tile in enumerate(tiles[-2:])
            )
            merged = self._interpolated(cast(_Arcs, state), span[0] + piece.start, x, y)
            store(out, piece, merged if base is None else merged.add_(base))
        return (out,)

    def _interpolated(self, arcs: _Arcs, start: int, x: Tensor, y: Tensor) -> Tensor:
        import torch

        total = sum(self.weights)
        t = 0.5 if abs(total) < 1e-6 else self.weights[1] / total
        first, second, sine = (self._spread(v, start, x) for v in (arcs.first, arcs.second, arcs.sine))
        merged = (first * x).add_(second * y).div_(sine)
        if arcs.is_colinear is None:
            return merged
        return torch.where(self._spread(arcs.is_colinear, start, x), (1 - t) * x + t * y, merged)

    def _spread(self, values: Tensor, start: int, like: Tensor) -> Tensor:
        """The value of each element's vector."""
        from surgery.numerics.merge.vectors import per_column, per_row

        values = values.to(like.device)
        if values.numel() == 1:
            return values
        spread = per_column(values, start, like.numel()) if self._along_first else None
        return per_row(values, self._width, start, like.numel()) if spread is None else spread


def _cosines(x: Tensor, y: Tensor) -> Tensor:
    """Along the last dimension, which is kept with one element."""
    import torch

    from surgery.numerics.merge.vectors import norms

    units = [v / norms(v).clamp(min=_SMALLEST_NORM) for v in (x, y)]
    return torch.sum(units[0] * units[1], dim=-1, keepdim=True).clamp(-1, 1)
