"""Initial values of prompts and prefixes: drawn as PEFT draws them, or rows of the input embedding.

Shapes: n virtual tokens, d their width, h an encoder's hidden width, o outputs, b rows of a block.

Why a generator of its own: torch has one for all threads; the same seed gives the same numbers from another one.
Source: PEFT 0.21.2, `tuners/prompt_tuning/model.py`, `prefix_tuning/model.py` and `p_tuning/model.py`.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, cast

from surgery.graph import Kernel, Span
from surgery.numerics.rows import RowReduction
from surgery.types import DType, TensorType

if TYPE_CHECKING:
    from torch import Generator, Tensor

__all__ = ["EmbeddingRows", "LstmRows", "MlpRows", "NormalRows", "PrefixRows", "Sample", "Tokens"]

FLOAT_BYTES = 4
BLOCK = 1 << 22  # elements of a Linear that are drawn at once
SOURCE_DTYPES = (DType.F32, DType.F16, DType.BF16, DType.F64)


@dataclass(frozen=True, slots=True)
class _Rows(Kernel):
    """f32 [num_rows, width], made of nothing but its fields."""

    num_rows: int
    width: int

    def infer(self, *inputs: TensorType) -> tuple[TensorType, ...]:
        """The rows."""
        return (TensorType(DType.F32, (self.num_rows, self.width)),)


@dataclass(frozen=True, slots=True)
class NormalRows(_Rows):
    """Standard normal, as torch's Embedding begins after torch.manual_seed(seed)."""

    seed: int

    def run(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        """All rows, drawn on the CPU, so that no device shows in the bits."""
        return (_embedding(self.num_rows, self.width, _generator(self.seed)),)


@dataclass(frozen=True, slots=True)
class _Encoded(_Rows):
    """What an encoder as it begins makes of standard normal rows, f32 [num_rows, width]."""

    seed: int
    hidden: int


@dataclass(frozen=True, slots=True)
class MlpRows(_Encoded):
    """P-tuning's MLP: three Linears, ReLU between them."""

    def run(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        """All rows, computed on the CPU."""
        generator = _generator(self.seed)
        x_nd = _embedding(self.num_rows, self.width, generator)
        x_nh = _linear(x_nd, self.hidden, generator).relu_()
        x_nh = _linear(x_nh, self.hidden, generator).relu_()
        return (_linear(x_nh, self.width, generator),)

    def workspace(self, *inputs: TensorType) -> int:
        """One block of a Linear, and what is between them."""
        return _linear_bytes(self.num_rows, self.width + 2 * self.hidden, max(self.width, self.hidden))


@dataclass(frozen=True, slots=True)
class LstmRows(_Encoded):
    """P-tuning's LSTM in both directions, and two Linears, ReLU between them; without dropout."""

    num_layers: int

    def run(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        """All rows, computed on the CPU."""
        generator = _generator(self.seed)
        x_nd = _embedding(self.num_rows, self.width, generator)
        x_n2h = _lstm(x_nd, self.hidden, self.num_layers, generator)
        x_n2h = _linear(x_n2h, 2 * self.hidden, generator).relu_()
        return (_linear(x_n2h, self.width, generator),)

    def workspace(self, *inputs: TensorType) -> int:
        """All weights of the LSTM, twice for what torch packs of them, and what is between the layers."""
        inputs_of_all = self.width + (self.num_layers - 1) * 2 * self.hidden
        weights = 2 * 4 * self.hidden * (inputs_of_all + self.num_layers * (self.hidden + 2))
        between = _linear_bytes(self.num_rows, self.width + 16 * self.hidden, max(self.width, 2 * self.hidden))
        return 2 * FLOAT_BYTES * weights + between


@dataclass(frozen=True, slots=True)
class PrefixRows(_Encoded):
    """A prefix through the MLP of Li & Liang: rows of width `token_width`, a Linear, tanh, a Linear."""

    token_width: int

    def run(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        """All rows, computed on the CPU."""
        generator = _generator(self.seed)
        x_nd = _embedding(self.num_rows, self.token_width, generator)
        x_nh = _linear(x_nd, self.hidden, generator).tanh_()
        return (_linear(x_nh, self.width, generator),)

    def workspace(self, *inputs: TensorType) -> int:
        """One block of a Linear, and what is between them; a bias of the width."""
        return _linear_bytes(self.num_rows, self.token_width + self.hidden, max(self.token_width, self.hidden)) + (
            FLOAT_BYTES * self.width
        )


@dataclass(frozen=True, slots=True)
class Tokens:
    """Rows of these tokens, over and over again until there are enough."""

    ids: tuple[int, ...]
    num_rows: int

    def rows(self) -> tuple[int, ...]:
        """The token of each row."""
        return tuple(self.ids[index % len(self.ids)] for index in range(self.num_rows))


@dataclass(frozen=True, slots=True)
class Sample:
    """Rows of tokens drawn with replacement, after as many numbers as an embedding [num_rows, width] takes."""

    seed: int
    num_rows: int
    width: int
    vocabulary: int

    def rows(self) -> tuple[int, ...]:
        """The token of each row."""
        return _sampled(self)


@dataclass(frozen=True, slots=True)
class EmbeddingRows(RowReduction):
    """embedding [tokens, d] → f32 [n, d]: the rows that `chosen` names, as the embedding gives them.

    `scale`: what the embedding multiplies its rows by, in their dtype; `rounds_scale`: after rounding it to that too.
    """

    chosen: Tokens | Sample
    shape: tuple[int, ...]  # of the embedding
    scale: float = 1.0
    rounds_scale: bool = False

    def infer(self, *inputs: TensorType) -> tuple[TensorType, ...]:
        """Raises ValueError for what is no float matrix of that shape."""
        (type_,) = inputs
        if type_.dtype not in SOURCE_DTYPES or type_.shape != self.shape or type_.num_elements == 0:
            raise ValueError(f"{type_} is no matrix of f32, f16 or bf16")
        return (TensorType(DType.F32, (self.chosen.num_rows, self.shape[1])),)

    def partial(self, state: object, span: Span, *tiles: Tensor) -> object:
        """The chosen rows among these, by token."""
        first, stop = span[0] // self.shape[1], span[1] // self.shape[1]
        tokens = sorted({token for token in self.chosen.rows() if first <= token < stop})
        rows_bd = tiles[0].view(-1, self.shape[1])
        return {token: self._embedded(rows_bd[token - first]) for token in tokens}

    def _embedded(self, row: Tensor) -> Tensor:
        import torch

        if self.scale != 1:
            row = row * (torch.tensor(self.scale).to(row.dtype) if self.rounds_scale else self.scale)
        return row.cpu().float()

    def combine(self, state: object, partials: Iterable[object], *inputs: TensorType) -> object:
        """All rows, f32."""
        import torch

        found: dict[int, Tensor] = {}
        for part in partials:
            found |= cast("dict[int, Tensor]", part)
        return torch.stack([found[token] for token in self.chosen.rows()])

    def state_bytes(self, *inputs: TensorType) -> int:
        """The rows as they are found, and in order."""
        return 2 * FLOAT_BYTES * self.chosen.num_rows * self.shape[1]

    def run(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        """The whole tensor."""
        import torch

        return (torch.stack([self._embedded(inputs[0][token]) for token in self.chosen.rows()]),)


@lru_cache(maxsize=8)
def _sampled(sample: Sample) -> tuple[int, ...]:
    import torch

    generator = _generator(sample.seed)
    _embedding(sample.num_rows, sample.width, generator)
    drawn = torch.randint(0, sample.vocabulary, (sample.num_rows,), dtype=torch.long, generator=generator)
    return tuple(cast("list[int]", drawn.tolist()))  # pyright: ignore[reportUnknownMemberType]


def _generator(seed: int) -> Generator:
    import torch

    return torch.Generator().manual_seed(seed)


def _embedding(num_rows: int, width: int, generator: Generator) -> Tensor:
    """An Embedding as it begins."""
    import torch

    return torch.empty(num_rows, width).normal_(generator=generator)


def _linear(x_ni: Tensor, num_outputs: int, generator: Generator) -> Tensor:
    """A Linear as it begins, applied to `x_ni`: drawn block by block, twice, since its bias is drawn last."""
    import torch
    from torch import nn

    num_rows, num_inputs = x_ni.shape
    step = max(1, BLOCK // max(num_rows, num_inputs))
    blocks = [(start, min(start + step, num_outputs)) for start in range(0, num_outputs, step)]

    def drawn(start: int, stop: int) -> Tensor:
        w_bi = torch.empty(stop - start, num_inputs)
        return nn.init.kaiming_uniform_(w_bi, a=math.sqrt(5), generator=generator)

    before = generator.get_state()
    for start, stop in blocks:
        drawn(start, stop)
    bound = 1 / math.sqrt(num_inputs)
    bias_o = torch.empty(num_outputs).uniform_(-bound, bound, generator=generator)
    after = generator.get_state()
    generator.set_state(before)
    y_no = torch.empty(num_rows, num_outputs)
    for start, stop in blocks:
        y_no[:, start:stop] = nn.functional.linear(x_ni, drawn(start, stop), bias_o[start:stop])
    generator.set_state(after)
    return y_no


def _linear_bytes(num_rows: int, between: int, num_inputs: int) -> int:
    """What Linears take beside their result: what is `between` them for each row, a block and its result, states."""
    return FLOAT_BYTES * (2 * num_rows * between + 2 * max(BLOCK, num_inputs)) + (1 << 16)


def _lstm(x_nd: Tensor, hidden: int, num_layers: int, generator: Generator) -> Tensor:
    """An LSTM in both directions as it begins, applied to `x_nd`: [n, 2h]."""
    import torch
    from torch import nn

    lstm = nn.LSTM(x_nd.shape[1], hidden, num_layers, batch_first=True, bidirectional=True, device="meta")
    lstm = lstm.to_empty(device="cpu")
    bound = 1 / math.sqrt(hidden)
    for weight in lstm.parameters():
        weight.data.uniform_(-bound, bound, generator=generator)
    with torch.inference_mode(False), torch.enable_grad():  # without gradients torch takes a kernel of other bits
        output, _ = cast("tuple[Tensor, object]", lstm(x_nd.unsqueeze(0)))
    return output[0].detach()
