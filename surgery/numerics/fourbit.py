"""bitsandbytes' 4-bit quantization (NF4, FP4) and its nested 8-bit absmax, bit for bit.

Why tables: bitsandbytes divides, compares and packs every weight in float32, about 30 M weights/s
on one thread. Here one table lookup per weight gives the code. `encode_reference` is the plain
arithmetic; every table is built from it and every fast path is held to it, bit for bit.

- bf16: v = w * (1 / absmax) does not depend on the exponents, so the code is a function of the
  block's 7-bit mantissa, the difference of the two bit patterns, and the sign. No float arithmetic.
- f32, f16: the code is a function of a fine uniform bin of v. Bins that a midpoint crosses are
  marked, and the few weights that meet one (about 1 in 5000) are compared exactly.

Blocks that either argument does not cover (subnormal, huge, non-finite) go to the reference.

Source: bitsandbytes 0.50 on a CPU: backends/default/ops.py (4-bit), csrc/cpu_ops.cpp (nested).

A tile is a 1-D contiguous run of a flattened weight that starts on a block boundary. Shapes:
n elements, B blocks, S elements a block. Tensors stay on the device they come from.
"""

import math
from functools import cache

import torch
from torch import Tensor

from surgery.numerics.codebooks import CODEBOOKS, DYNAMIC_8BIT
from surgery.numerics.scratch import scratch

NESTED_BLOCK_SIZE = 256
_TINY = 1e-38  # bitsandbytes' floor of a block's absmax, so that a zero block does not divide by 0

# bf16 blocks whose absmax lies outside go to the reference. Below, products could be subnormal and
# lose bits; above, a nonzero weight (at least 2**-133) could become 0, which FP4 tells apart.
_BF16_ABSMAX_RANGE = (2.0**-100, 2.0**15)

_BINS_PER_UNIT = 1 << 16  # of v in [-1, 1]; a power of two, so that scaling by it is exact
_F32_ABSMAX_RANGE = (2.0**-100, 2.0**125)  # 1 / absmax * _BINS_PER_UNIT is a normal number
_CACHED = 1 << 20  # weights whose temporaries stay in a core's share of the cache
_CROSSED = 16  # added to the code of a bin that a midpoint crosses
_CROSSED_IN_8 = 0x1010101010101010


def block_absmax(w: Tensor, block_size: int) -> Tensor:
    """Largest |w| of each block: f32 [ceil(n / block_size)] of bf16|f16|f32 [n].

    A zero block gives 0, but a short last block is floored at 1e-38, as in bitsandbytes.
    A NaN or an infinity gives a non-finite absmax.
    """
    num_full = w.numel() // block_size * block_size
    full_B = _largest_magnitude(w[:num_full].view(-1, block_size))
    if num_full == w.numel():
        return full_B
    short = _largest_magnitude(w[num_full:].view(1, -1)).clamp_(min=_TINY)
    return torch.cat([full_B, short])


def encode(w: Tensor, absmax: Tensor, block_size: int, quant_type: str) -> Tensor:
    """Packed codes: u8 [(n + 1) // 2] of w bf16|f16|f32 [n] and its `block_absmax`.

    The high nibble is the even element; an odd n is padded with the code of 0.
    Equals `encode_reference` bit for bit.
    """
    num_blocks = w.numel() // block_size
    num_full = num_blocks * block_size
    packed = torch.empty((w.numel() + 1) // 2, dtype=torch.uint8, device=w.device)
    if num_full:
        w_BS, packed_BS = w[:num_full].view(num_blocks, -1), packed[: num_full // 2].view(num_blocks, -1)
        step = _CACHED // block_size
        for start in range(0, num_blocks, step):
            rows = slice(start, min(start + step, num_blocks))
            _encode_full(w_BS[rows], absmax[rows], quant_type, packed_BS[rows])
    if num_full < w.numel():
        short = encode_reference(w[num_full:], absmax[num_blocks:], block_size, quant_type)
        packed[num_full // 2 :] = short
    return packed


def encode_reference(w: Tensor, absmax: Tensor, block_size: int, quant_type: str) -> Tensor:
    """`encode` in bitsandbytes' own arithmetic: what the fast paths are held to."""
    midpoints, order = _midpoints(quant_type, w.device)
    v = _normalise(w.float(), absmax, block_size)
    if v.numel() % 2:
        v = torch.nn.functional.pad(v, (0, 1))
    codes = order[torch.bucketize(v, midpoints)]
    return (codes[::2] << 4) | codes[1::2]


def decode(
    packed: Tensor,
    absmax: Tensor,
    num_elements: int,
    block_size: int,
    quant_type: str,
    dtype: torch.dtype,
) -> Tensor:
    """What loaders reconstruct: dtype [num_elements], codebook[code] * absmax in f32, then cast."""
    values = _decode_f32(packed, absmax, num_elements, block_size, quant_type)
    return values.to(dtype) if dtype != torch.float32 else values.clone()


def nested_encode(absmax: Tensor, offset: Tensor) -> tuple[Tensor, Tensor]:
    """Double quantization of absmax f32 [B]: codes u8 [B] and nested absmax f32 [ceil(B / 256)].

    `offset` is the f32 scalar mean of the whole tensor's absmax. Pieces of whole 256-blocks give
    the same bits as the whole.
    """
    x_BS = _blocks_of_256(absmax - offset)
    nested_absmax = x_BS.abs().amax(dim=1)
    v_BS = (x_BS * (1.0 / nested_absmax).view(-1, 1)).clamp_(-1, 1)
    v_BS.nan_to_num_(nan=-1.0)  # 0 * inf: a zero block, or 0 beside subnormals
    cell_BS = v_BS.add_(1).mul_(0.5).mul_(65535).add_(0.5).int()
    q = torch.index_select(_nested_cells(absmax.device), 0, cell_BS.view(-1))
    return q[: absmax.numel()], nested_absmax


def nested_decode(q: Tensor, nested_absmax: Tensor, offset: Tensor) -> Tensor:
    """The absmax that loaders reconstruct: f32 [B] of codes u8 [B]."""
    index_BS = _blocks_of_256(q.int())
    values = torch.index_select(_nested_codebook(q.device), 0, index_BS.view(-1))
    values.view(index_BS.shape).mul_(nested_absmax.view(-1, 1)).add_(offset)
    return values[: q.numel()]


def first_non_finite(w: Tensor) -> int | None:
    """Flat index of the first NaN or infinity, None without one."""
    w = w.reshape(-1)
    if not w.numel() or _largest_magnitude(w.view(1, -1)).isfinite():
        return None
    return int(torch.isfinite(w).logical_not_().nonzero()[0])


def _largest_magnitude(w_BS: Tensor) -> Tensor:
    """f32 [B]. Integer patterns order like magnitudes, NaN above all, and compare fast."""
    wide = w_BS.dtype == torch.float32
    ints, sign_off = (torch.int32, 0x7FFFFFFF) if wide else (torch.int16, 0x7FFF)
    bits = scratch("magnitude", ints, w_BS.numel(), w_BS.device).view(w_BS.shape)
    torch.bitwise_and(w_BS.view(ints), sign_off, out=bits)
    return bits.amax(dim=1).view(w_BS.dtype).float()


def _normalise(w: Tensor, absmax: Tensor, block_size: int) -> Tensor:
    """v in [-1, 1]: full blocks are multiplied by a reciprocal, a short last one is divided."""
    num_blocks = w.numel() // block_size
    num_full = num_blocks * block_size
    inverse_B1 = 1.0 / absmax[:num_blocks].clamp(min=_TINY).view(-1, 1)
    full = (w[:num_full].view(-1, block_size) * inverse_B1).view(-1)
    return torch.cat([full, w[num_full:] / absmax[num_blocks:]]).clamp_(-1, 1)


def _encode_full(w_BS: Tensor, absmax_B: Tensor, quant_type: str, packed_BS: Tensor) -> None:
    """Encodes full blocks into `packed_BS`, u8 [B, S / 2]."""
    is_bf16 = w_BS.dtype == torch.bfloat16
    codes = (_codes_bf16 if is_bf16 else _codes_f32)(w_BS, absmax_B, quant_type)
    _pack(codes, packed_BS.view(-1))
    rows = _not_covered(absmax_B, *(_BF16_ABSMAX_RANGE if is_bf16 else _F32_ABSMAX_RANGE))
    if rows is not None:
        w, block_size = w_BS[rows].view(-1), w_BS.shape[1]
        exact = encode_reference(w, absmax_B[rows], block_size, quant_type)
        packed_BS[rows] = exact.view(rows.numel(), -1)


def _not_covered(absmax_B: Tensor, low: float, high: float) -> Tensor | None:
    """Indices of the blocks that are neither zero nor within range, None (fast) when all are."""
    smallest, largest = torch.aminmax(absmax_B)
    if float(smallest) >= low and float(largest) <= high:
        return None
    is_covered = ((absmax_B >= low) & (absmax_B <= high)) | (absmax_B == 0)
    rows = is_covered.logical_not_().nonzero().view(-1)
    return rows if rows.numel() else None


def _codes_bf16(w_BS: Tensor, absmax_B: Tensor, quant_type: str) -> Tensor:
    """Codes, u8 [n] scratch. Index: mantissa of absmax, sign of w, difference of the patterns."""
    table, num_steps = _bf16_table(quant_type, w_BS.device)
    row_starts = _bf16_row_starts(num_steps, w_BS.device)
    n, device, bits_BS = w_BS.numel(), w_BS.device, w_BS.view(torch.int16)
    absmax_bits_B1 = (absmax_B.view(torch.int32) >> 16).view(-1, 1)
    row_B1 = torch.index_select(row_starts, 0, absmax_bits_B1.view(-1)).view(-1, 1)
    step_BS = scratch("step", torch.int16, n, device).view(w_BS.shape)
    other_BS = scratch("other", torch.int16, n, device).view(w_BS.shape)

    magnitude_BS = torch.bitwise_and(bits_BS, 0x7FFF, out=other_BS)
    torch.sub(absmax_bits_B1.short(), magnitude_BS, out=step_BS).clamp_(0, num_steps - 2)
    if quant_type == "fp4":  # the only codebook with a midpoint at 0: exact zeros get the last step
        step_BS.sub_(magnitude_BS.sub_(1).bitwise_right_shift_(15))
    minus_sign_BS = torch.bitwise_right_shift(bits_BS, 15, out=other_BS)
    step_BS.sub_(minus_sign_BS, alpha=num_steps)

    index = scratch("index", torch.int32, n, device)
    index.view(w_BS.shape).copy_(step_BS).add_(row_B1)
    return torch.index_select(table, 0, index, out=scratch("codes", torch.uint8, n, device))


@cache
def _bf16_table(quant_type: str, device: torch.device) -> tuple[Tensor, int]:
    """Codes u8 [129 rows * 2 signs * num_steps], and num_steps.

    A row is a mantissa of absmax, the last row a zero block. A step is absmax's pattern minus
    w's; from step `num_steps - 2` on, v is nearer to 0 than any nonzero midpoint, and the last
    step is w = 0.
    """
    midpoints, order = _midpoints(quant_type, torch.device("cpu"))
    smallest = float(midpoints.abs()[midpoints != 0].min())
    num_steps = 128 * math.ceil(-math.log2(smallest)) + 2
    absmax_bits_M1 = 0x3F80 + torch.arange(128, dtype=torch.int32).view(-1, 1)
    absmax_M1 = (absmax_bits_M1 << 16).view(torch.float32)
    w_bits_MD = absmax_bits_M1 - torch.arange(num_steps, dtype=torch.int32)
    w_MD = (w_bits_MD << 16).view(torch.float32)
    w_MD[:, -1] = 0.0
    v_MPD = torch.stack([w_MD, -w_MD], dim=1) * (1.0 / absmax_M1).view(-1, 1, 1)
    rows = torch.cat([v_MPD, torch.zeros_like(v_MPD[:1])])
    return order[torch.bucketize(rows, midpoints)].view(-1).to(device), num_steps


@cache
def _bf16_row_starts(num_steps: int, device: torch.device) -> Tensor:
    """Where the table's row of an absmax begins: i32 [32768], one per nonnegative pattern."""
    row = torch.arange(1 << 15, dtype=torch.int32) & 127
    row[0] = 128
    return (row * (2 * num_steps)).to(device)


def _codes_f32(w_BS: Tensor, absmax_B: Tensor, quant_type: str) -> Tensor:
    """Codes, u8 [n] scratch, of f32 or f16."""
    n, device = w_BS.numel(), w_BS.device
    inverse_B1 = (1.0 / absmax_B.clamp(min=_TINY)).view(-1, 1)
    scale_B1 = inverse_B1 * _BINS_PER_UNIT
    scale_B1[absmax_B == 0] = 0.0
    bins_BS = scratch("bins", torch.float32, n, device).view(w_BS.shape)
    index = scratch("index", torch.int32, n, device)
    torch.mul(w_BS, scale_B1, out=bins_BS)
    index.view(w_BS.shape).copy_(bins_BS.add_(_BINS_PER_UNIT + 1))
    index.clamp_(0, 2 * _BINS_PER_UNIT + 2)  # keeps blocks that are not covered inside the table
    table = _bin_table(quant_type, device)
    codes = torch.index_select(table, 0, index, out=scratch("codes", torch.uint8, n, device))
    _compare_crossed(codes, w_BS, inverse_B1.view(-1), quant_type)
    return codes


def _compare_crossed(codes: Tensor, w_BS: Tensor, inverse_B: Tensor, quant_type: str) -> None:
    """Settles the marked codes, eight neighbours at a time: a mark is rare, a search is not."""
    eights = (codes.view(torch.int64) & _CROSSED_IN_8).nonzero().view(-1)
    if not eights.numel():
        return
    midpoints, order = _midpoints(quant_type, w_BS.device)
    blocks = eights // (w_BS.shape[1] // 8)
    v = w_BS.view(-1, 8)[eights].float() * inverse_B[blocks].view(-1, 1)
    codes.view(-1, 8)[eights] = order[torch.bucketize(v, midpoints)]


@cache
def _bin_table(quant_type: str, device: torch.device) -> Tensor:
    """Code of each bin of v * _BINS_PER_UNIT + _BINS_PER_UNIT + 1, u8, marked if crossed."""
    midpoints, order = _midpoints(quant_type, torch.device("cpu"))
    low = torch.arange(2 * _BINS_PER_UNIT + 3, dtype=torch.float64) - _BINS_PER_UNIT - 1
    margin = 1 / 64  # the float32 sum above rounds by up to 1/128 of a bin
    first = torch.bucketize((low - margin) / _BINS_PER_UNIT, midpoints.double())
    last = torch.bucketize((low + 1 + margin) / _BINS_PER_UNIT, midpoints.double())
    return (order[first] + _CROSSED * (first != last)).to(torch.uint8).to(device)


def _pack(codes: Tensor, packed: Tensor) -> None:
    """Pairs of codes u8 [2m], overwritten, to bytes u8 [m]: the even one to the high nibble."""
    pairs = codes.view(torch.int16)  # even + odd * 256 on a little-endian machine
    pairs.mul_(4097).bitwise_right_shift_(8)  # even * 16 + odd in the low byte
    packed.copy_(pairs)


def _decode_f32(packed: Tensor, absmax: Tensor, num_elements: int, block_size: int, quant_type: str) -> Tensor:
    """codebook[code] * absmax, f32 [num_elements] scratch."""
    device, num_blocks = packed.device, num_elements // block_size
    index = scratch("bytes", torch.int32, packed.numel(), device).copy_(packed)
    pairs = scratch("pairs", torch.int64, packed.numel(), device)
    torch.index_select(_byte_table(quant_type, device), 0, index, out=pairs)
    values = pairs.view(torch.float32)[:num_elements]
    num_full = num_blocks * block_size
    values[:num_full].view(num_blocks, block_size).mul_(absmax[:num_blocks].view(-1, 1))
    values[num_full:].mul_(absmax[num_blocks:])
    return values


@cache
def _byte_table(quant_type: str, device: torch.device) -> Tensor:
    """The two f32 values of each byte, as one i64: [256]."""
    code = torch.tensor(CODEBOOKS[quant_type])
    byte = torch.arange(256)
    pairs = torch.stack([code[byte >> 4], code[byte & 15]], dim=1)
    return pairs.view(torch.int64).view(-1).to(device)


@cache
def _midpoints(quant_type: str, device: torch.device) -> tuple[Tensor, Tensor]:
    """15 midpoints f32 of the sorted codebook, and the code u8 [16] of each rank."""
    code = torch.tensor(CODEBOOKS[quant_type])
    order = torch.tensor(sorted(range(16), key=CODEBOOKS[quant_type].__getitem__))
    ranked = code[order]
    midpoints = (ranked[:-1] + ranked[1:]) / 2
    return midpoints.to(device), order.to(torch.uint8).to(device)


@cache
def _nested_codebook(device: torch.device) -> Tensor:
    return torch.tensor(DYNAMIC_8BIT, device=device)


@cache
def _nested_cells(device: torch.device) -> Tensor:
    """Code u8 of each of 65536 cells of [-1, 1] (`build_quantize_lut`)."""
    code = torch.tensor(DYNAMIC_8BIT)
    midpoints = (code[:-1] + code[1:]) * 0.5
    grid = -1.0 + 2.0 * torch.arange(65536, dtype=torch.float32) / 65535
    return torch.bucketize(grid, midpoints).to(torch.uint8).to(device)


def _blocks_of_256(x: Tensor) -> Tensor:
    """[ceil(n / 256), 256], the last block padded with zeros."""
    short = -x.numel() % NESTED_BLOCK_SIZE
    padded = torch.nn.functional.pad(x, (0, short)) if short else x
    return padded.view(-1, NESTED_BLOCK_SIZE)
