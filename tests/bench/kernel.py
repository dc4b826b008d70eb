"""NF4 with double quantization of one weight on one thread: ours and bitsandbytes, in turn.

Two of ours: the codes alone, which is what bitsandbytes computes, and what a conversion runs,
which reads every weight twice and also measures the rounding error for the manifest.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from statistics import median
from typing import TYPE_CHECKING, cast

from tests.bench.table import print_table, spread

if TYPE_CHECKING:
    from torch import Tensor

SHAPE = (4096, 11008)  # an up_proj of Llama 7B, 45 M weights
BLOCK_SIZE = 64
DTYPES = ("bfloat16", "float16", "float32")

Parts = "list[Tensor]"
Quantized = tuple[Parts, Parts, Parts, Parts]  # packed, codes and nested absmax of absmax, offset; in pieces


def main(rounds: int) -> None:
    os.environ["OMP_NUM_THREADS"] = "1"  # before torch: bitsandbytes' C++ asks OpenMP
    import torch

    torch.set_num_threads(1)
    contenders: dict[str, Callable[[Tensor], Quantized]] = {
        "bitsandbytes": _bitsandbytes,
        "surgery, codes alone": _codes_alone,
        "surgery, as converted": _as_converted,
    }
    for name in DTYPES:
        w = torch.randn(SHAPE, generator=torch.Generator().manual_seed(0)).mul_(0.02).to(getattr(torch, name))
        _check_equal([contender(w) for contender in contenders.values()])
        rates = _rates(contenders, w, rounds)
        _print(name, rates)


def _check_equal(results: list[Quantized]) -> None:
    import torch

    first, *others = results
    for other in others:
        for ours, theirs in zip(other, first, strict=True):
            bytes_of = [torch.cat([part.reshape(-1).view(torch.uint8) for part in parts]) for parts in (ours, theirs)]
            if not torch.equal(*bytes_of):
                raise SystemExit("the bytes differ from bitsandbytes': nothing to time")


def _rates(contenders: dict[str, Callable[[Tensor], Quantized]], w: Tensor, rounds: int) -> dict[str, list[float]]:
    """M weights/s of each contender in each round."""
    rates: dict[str, list[float]] = {name: [] for name in contenders}
    for _ in range(rounds):
        for name, contender in contenders.items():
            start = time.perf_counter()
            contender(w)
            rates[name].append(w.numel() / 1e6 / (time.perf_counter() - start))
    return rates


def _print(dtype: str, rates: dict[str, list[float]]) -> None:
    peers, *_ = rates.values()
    rows = []
    for name, ours in rates.items():
        ratios = [one / peer for one, peer in zip(ours, peers, strict=True)]
        per_round = " ".join(f"{ratio:.2f}" for ratio in ratios)
        rows.append([name, spread(ours, 1), f"{median(ratios):.2f}", per_round])
    print_table([f"{dtype}, bytes equal", "M weights/s, median", "ratio, median", "ratio, each round"], rows)


def _bitsandbytes(w: Tensor) -> Quantized:
    import bitsandbytes.functional as bnb

    packed, state = bnb.quantize_4bit(w, blocksize=BLOCK_SIZE, compress_statistics=True, quant_type="nf4")
    return [packed], [state.absmax], [state.state2.absmax], [state.offset]


def _codes_alone(w: Tensor) -> Quantized:
    from surgery.numerics import fourbit
    from surgery.numerics.mean import StreamedMean

    mean = StreamedMean(w.numel() // BLOCK_SIZE)
    absmax = []
    for tile in _tiles(w):
        absmax.append(fourbit.block_absmax(tile, BLOCK_SIZE))
        mean.add(absmax[-1])
    offset = mean.result()
    packed = [fourbit.encode(tile, known, BLOCK_SIZE, "nf4") for tile, known in zip(_tiles(w), absmax, strict=True)]
    codes, scales = zip(*(fourbit.nested_encode(known, offset) for known in absmax), strict=True)
    return packed, list(codes), list(scales), [offset]


def _as_converted(w: Tensor) -> Quantized:
    from surgery.formats.bitsandbytes.quantize import Quantize4bit
    from surgery.numerics.dtypes import dtype_of
    from surgery.numerics.rounding import rounding_error
    from surgery.types import TensorType

    kernel, type_ = Quantize4bit("nf4", BLOCK_SIZE, True), TensorType(dtype_of(w.dtype), tuple(w.shape))
    partials = [kernel.partial(None, span, tile) for span, tile in zip(_spans(w), _tiles(w), strict=True)]
    offset = cast("Tensor", kernel.combine(None, partials, type_))
    pieces = []
    for span, tile in zip(_spans(w), _tiles(w), strict=True):
        ports = kernel.tile(offset, None, span, tile)
        rounding_error(tile, kernel.restore(offset, tile.numel(), ports, type_))
        pieces.append(ports[:3])
    packed, codes, scales = zip(*pieces, strict=True)
    return list(packed), list(codes), list(scales), [offset]


def _tiles(w: Tensor) -> Iterator[Tensor]:
    for start, stop in _spans(w):
        yield w.view(-1)[start:stop]


def _spans(w: Tensor) -> Iterator[tuple[int, int]]:
    from surgery.cost import LARGEST_TILE, tile_elements
    from surgery.formats.bitsandbytes.quantize import Quantize4bit

    step = tile_elements(Quantize4bit("nf4", BLOCK_SIZE, True), (), LARGEST_TILE)
    for start in range(0, w.numel(), step):
        yield start, min(start + step, w.numel())
