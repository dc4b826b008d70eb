"""torch.mean of a long float32 vector, fed in pieces, with the bits of one CPU thread.

Why: bitsandbytes' nested offset is `absmax.mean()`, and the bits of a float sum are its order.
The order here is the one of ATen's `cascade_sum` (aten/src/ATen/native/cpu/SumKernel.cpp) for a
contiguous vector on one x86 thread: rows of 4 accumulators of 8 lanes, four levels of partial
sums, then the rows left over, the vectors left over, the scalars left over, the 8 lanes.
Every step is an elementwise add, so the bits do not depend on this machine's SIMD width.
"""

import torch
from torch import Tensor

_LANES = 8  # float32 lanes of an AVX2 vector
_ROW = 4 * _LANES  # ilp_factor = 4 vectors are accumulated side by side
_PIECE = 1 << 16  # values worth one round of vectorised adds


class StreamedMean:
    """torch.mean(x) of a contiguous f32 [num_elements] on one thread, in bounded memory.

    Raises ValueError when more or fewer than `num_elements` values are added.
    """

    def __init__(self, num_elements: int) -> None:
        self._num_elements = num_elements
        self._num_added = 0
        self._pieces: list[Tensor] = []
        self._num_waiting = 0
        num_levels = 4
        self._step = 1 << max(4, _ceil_log2(num_elements // _ROW) // num_levels)
        # Rows not yet summed at levels 0, 1 and 2; level 3 is one running sum.
        self._rows_NR = [torch.empty(0, _ROW) for _ in range(num_levels - 1)]
        self._top_R = torch.zeros(_ROW)

    def add(self, x: Tensor) -> None:
        """Takes the next values, f32 of any shape, on any device."""
        self._num_added += x.numel()
        if self._num_added > self._num_elements:
            raise ValueError(f"more than the {self._num_elements} values promised")
        self._pieces.append(x.detach().to("cpu", copy=True).view(-1))
        self._num_waiting += x.numel()
        if self._num_waiting >= _PIECE:
            self._sum_waiting()

    def result(self) -> Tensor:
        """The mean, an f32 scalar on the CPU."""
        if self._num_added != self._num_elements:
            raise ValueError(f"{self._num_added} values of {self._num_elements} promised")
        rest = self._sum_waiting()
        if self._num_elements < _LANES:
            return _sum_short(rest) / self._num_elements
        lanes_R = _sum_rows(self._rows_NR[0])
        for rows_NR in self._rows_NR[1:]:
            lanes_R = lanes_R + _sum_rows(rows_NR)
        lanes_R = lanes_R + self._top_R
        return _sum_tail(lanes_R.view(4, _LANES), rest) / self._num_elements

    def _sum_waiting(self) -> Tensor:
        """Sums the whole rows that wait; returns the values that fill none, f32 [< 32]."""
        values = torch.cat(self._pieces) if self._pieces else torch.empty(0)
        num_whole = values.numel() // _ROW * _ROW
        rest = values[num_whole:].clone()
        self._pieces, self._num_waiting = [rest], rest.numel()
        rows_NR = values[:num_whole].view(-1, _ROW)
        for level in range(len(self._rows_NR)):
            rows_NR = self._sum_steps(level, rows_NR)
        for row_R in rows_NR:
            self._top_R += row_R
        return rest

    def _sum_steps(self, level: int, rows_NR: Tensor) -> Tensor:
        """Queues rows at a level; returns the sums, in order, of each whole `step` of them."""
        rows_NR = torch.cat([self._rows_NR[level], rows_NR])
        num_steps = rows_NR.shape[0] // self._step
        num_whole = num_steps * self._step
        self._rows_NR[level] = rows_NR[num_whole:].clone()
        steps_GSR = rows_NR[:num_whole].view(num_steps, self._step, _ROW)
        sums_GR = torch.zeros(num_steps, _ROW)
        for i in range(self._step if num_steps else 0):
            sums_GR += steps_GSR[:, i]
        return sums_GR


def _sum_rows(rows_NR: Tensor) -> Tensor:
    """The sum of rows in order, f32 [R]; zeros without rows."""
    sum_R = torch.zeros(_ROW)
    for row_R in rows_NR:
        sum_R += row_R
    return sum_R


def _sum_tail(lanes_4L: Tensor, rest: Tensor) -> Tensor:
    """The 4 accumulators, the whole vectors left over and the scalars left over, as one sum."""
    num_in_vectors = rest.numel() // _LANES * _LANES
    first = lanes_4L[0]
    for vector in rest[:num_in_vectors].view(-1, _LANES):
        first = first + vector
    for k in range(1, 4):
        first = first + lanes_4L[k]
    total = torch.zeros(())
    for value in (*rest[num_in_vectors:], *first):
        total = total + value
    return total


def _sum_short(x: Tensor) -> Tensor:
    """Fewer values than lanes: 4 scalars side by side (`scalar_inner_sum`)."""
    order = [0, 4, 5, 6, 1, 2, 3] if x.numel() >= 4 else [0, 1, 2]
    total = torch.zeros(())
    for i in order:
        if i < x.numel():
            total = total + x[i]
    return total


def _ceil_log2(x: int) -> int:
    """utils::CeilLog2 of ATen: 0 up to 2, else the bits of x - 1."""
    return 0 if x <= 2 else (x - 1).bit_length()
