"""The 4-bit kernels give the bytes of bitsandbytes, the mean those of torch, on one thread."""

from collections.abc import Iterator

import bitsandbytes.functional as bnb
import pytest
import torch
from bitsandbytes.backends.default import ops as bnb_default
from torch import Tensor

from surgery.graph import ERROR_UNIT, TileError
from surgery.numerics import fourbit
from surgery.numerics.codebooks import CODEBOOKS, DYNAMIC_8BIT
from surgery.numerics.mean import StreamedMean
from surgery.numerics.rounding import rounding_error, tile_error

QUANT_TYPES = ["nf4", "fp4"]
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
BLOCK_SIZES = [32, 64, 128, 256, 512, 1024, 2048, 4096]

every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)
every_quant_type = pytest.mark.parametrize("quant_type", QUANT_TYPES)


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(num_threads)


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def assert_same_bits(ours: Tensor, theirs: Tensor) -> None:
    assert (ours.dtype, ours.numel()) == (theirs.dtype, theirs.numel())
    assert torch.equal(ours.view(torch.uint8), theirs.reshape(-1).view(torch.uint8))


def assert_equals_bitsandbytes(w: Tensor, block_size: int, quant_type: str) -> None:
    """Codes, absmax, nested codes, nested absmax, and both ways back."""
    packed, state = bnb.quantize_4bit(w, blocksize=block_size, quant_type=quant_type)
    absmax = fourbit.block_absmax(w, block_size)
    assert_same_bits(absmax, state.absmax)
    assert_same_bits(fourbit.encode(w, absmax, block_size, quant_type), packed)
    assert_same_bits(fourbit.encode_reference(w, absmax, block_size, quant_type), packed)
    assert_nested_equals_bitsandbytes(absmax, absmax.mean())
    back = fourbit.decode(packed.view(-1), absmax, w.numel(), block_size, quant_type, w.dtype)
    assert_same_bits(back, bnb_decode(packed, absmax, w, block_size, quant_type))


def assert_nested_equals_bitsandbytes(absmax: Tensor, offset: Tensor) -> None:
    q, state = bnb.quantize_blockwise(absmax - offset, blocksize=256)
    ours, nested_absmax = fourbit.nested_encode(absmax, offset)
    assert_same_bits(ours, q)
    assert_same_bits(nested_absmax, state.absmax)
    stored = bnb.dequantize_blockwise(q, state) + offset
    assert_same_bits(fourbit.nested_decode(ours, nested_absmax, offset), stored)


def bnb_decode(packed: Tensor, absmax: Tensor, w: Tensor, block_size: int, quant_type: str) -> Tensor:
    """bitsandbytes' device-neutral arithmetic; its AVX512 kernel is wrong for some widths."""
    code = bnb.get_4bit_type(quant_type, device="cpu")
    compute = bnb_default._dequantize_4bit_compute.__wrapped__
    return compute(packed.view(-1), absmax, code, block_size, (w.numel(),), w.dtype)


def hostile_weights(num_elements: int, dtype: torch.dtype, seed: int) -> Tensor:
    """Runs of 97 weights at wildly different scales, with zeros, negative zeros and outliers."""
    g = generator(seed)
    scales = torch.tensor([0.02, 1.0, 1e-7, 1e-37, 1e-38, 3e-39, 1e-40, 1e-45, 1e5, 3e38])
    run = torch.randint(0, len(scales), (num_elements // 97 + 1,), generator=g)
    w = torch.randn(num_elements, generator=g) * scales[run].repeat_interleave(97)[:num_elements]
    w[torch.rand(num_elements, generator=g) < 0.05] = 0.0
    w[torch.rand(num_elements, generator=g) < 0.05] = -0.0
    limit = torch.finfo(dtype).max
    return w.clamp(-limit, limit).to(dtype)


def blocks_of_patterns(patterns: Tensor, absmax: float) -> Tensor:
    """Blocks of 64 led by `absmax`, holding every one of `patterns` that does not exceed it."""
    lead = torch.tensor(absmax).to(patterns.dtype)
    inside = patterns[patterns.isfinite() & (patterns.abs() <= lead)]
    rows = torch.nn.functional.pad(inside, (0, -inside.numel() % 63)).view(-1, 63)
    return torch.cat([lead.expand(rows.shape[0], 1), rows], dim=1).reshape(-1)


def test_codebooks_equal_bitsandbytes() -> None:
    for quant_type in QUANT_TYPES:
        theirs = bnb.get_4bit_type(quant_type, device="cpu")
        assert_same_bits(torch.tensor(CODEBOOKS[quant_type]), theirs)
        assert tuple(theirs.double().tolist()) == CODEBOOKS[quant_type]
    assert_same_bits(torch.tensor(DYNAMIC_8BIT), bnb.create_dynamic_map())
    assert tuple(bnb.create_dynamic_map().double().tolist()) == DYNAMIC_8BIT


@every_dtype
@every_quant_type
@pytest.mark.parametrize("block_size", BLOCK_SIZES)
def test_packed_bytes_equal_bitsandbytes_for_every_dtype(dtype: torch.dtype, quant_type: str, block_size: int) -> None:
    w = (torch.randn(200_000, generator=generator(block_size)) * 0.02).to(dtype)
    assert_equals_bitsandbytes(w, block_size, quant_type)


@every_dtype
@every_quant_type
@pytest.mark.parametrize("num_elements", [1, 2, 31, 32, 33, 63, 64, 65, 127, 4096, 4097, 12_289])
def test_odd_counts_and_short_last_blocks_equal_bitsandbytes(
    dtype: torch.dtype, quant_type: str, num_elements: int
) -> None:
    w = torch.randn(num_elements, generator=generator(num_elements)).to(dtype)
    for block_size in (32, 64, 4096):
        assert_equals_bitsandbytes(w, block_size, quant_type)
        assert_equals_bitsandbytes(torch.zeros_like(w), block_size, quant_type)


@every_dtype
@every_quant_type
@pytest.mark.parametrize("block_size", [32, 64, 256, 4096])
def test_hostile_weights_equal_bitsandbytes(dtype: torch.dtype, quant_type: str, block_size: int) -> None:
    for seed in range(4):
        w = hostile_weights(40_000 + seed, dtype, seed)
        assert_equals_bitsandbytes(w, block_size, quant_type)


@every_quant_type
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("absmax", [1.0, 1.1171875, 1.9921875, 3e4, 3.2e4, 6e4, 1e-5, 6e-8])
def test_every_16_bit_pattern_equals_bitsandbytes(absmax: float, dtype: torch.dtype, quant_type: str) -> None:
    patterns = torch.arange(-(1 << 15), 1 << 15, dtype=torch.int32).short().view(dtype)
    assert_equals_bitsandbytes(blocks_of_patterns(patterns, absmax), 64, quant_type)


@every_quant_type
@pytest.mark.parametrize("absmax", [1e-45, 1e-40, 1e-38, 2e-38, 7e-31, 8e-31, 1e-20, 1e38, 3e38])
def test_every_bf16_pattern_equals_bitsandbytes_at_extreme_exponents(absmax: float, quant_type: str) -> None:
    patterns = torch.arange(-(1 << 15), 1 << 15, dtype=torch.int32).short().view(torch.bfloat16)
    assert_equals_bitsandbytes(blocks_of_patterns(patterns, absmax), 64, quant_type)


@every_quant_type
def test_every_bf16_mantissa_of_the_absmax_equals_bitsandbytes(quant_type: str) -> None:
    leads = (0x3C80 + torch.arange(128, dtype=torch.int32)).short().view(torch.bfloat16)
    steps = torch.arange(1, 1512, dtype=torch.int32)
    rows = (leads.view(torch.int16).int().view(-1, 1) - steps).short().view(torch.bfloat16)
    pairs = zip(leads, rows, strict=True)
    blocks = [blocks_of_patterns(torch.cat([r, -r]), float(a)) for a, r in pairs]
    assert_equals_bitsandbytes(torch.cat(blocks), 64, quant_type)


@every_quant_type
@pytest.mark.parametrize("absmax", [1.0, 2.0, 2.0**-60, 2.0**-120, 2.0**120])
def test_exact_ties_at_midpoints_go_low_as_in_bitsandbytes(absmax: float, quant_type: str) -> None:
    code = torch.tensor(CODEBOOKS[quant_type]).sort().values
    midpoints = (code[:-1] + code[1:]) / 2
    up, down = torch.tensor(torch.inf), torch.tensor(-torch.inf)
    near = [midpoints, midpoints.nextafter(up), midpoints.nextafter(down)]
    w = torch.cat([torch.tensor([1.0, -1.0, 0.0, -0.0]), *near])
    w = torch.nn.functional.pad(w, (0, 64 - w.numel())) * absmax
    assert_equals_bitsandbytes(w, 64, quant_type)


@every_dtype
@every_quant_type
def test_tiles_give_the_bits_of_the_whole(dtype: torch.dtype, quant_type: str) -> None:
    block_size, tile = 64, 64 * 256 * 2
    w = hostile_weights(3 * tile + 77, dtype, 5)
    absmax = fourbit.block_absmax(w, block_size)
    tile_absmax = [fourbit.block_absmax(t, block_size) for t in w.split(tile)]
    assert_same_bits(torch.cat(tile_absmax), absmax)
    pieces = zip(w.split(tile), tile_absmax, strict=True)
    packed = torch.cat([fourbit.encode(t, a, block_size, quant_type) for t, a in pieces])
    assert_same_bits(packed, fourbit.encode(w, absmax, block_size, quant_type))
    nested = [fourbit.nested_encode(a, absmax.mean()) for a in tile_absmax]
    q, nested_absmax = fourbit.nested_encode(absmax, absmax.mean())
    assert_same_bits(torch.cat([piece[0] for piece in nested]), q)
    assert_same_bits(torch.cat([piece[1] for piece in nested]), nested_absmax)


def test_nested_codes_equal_bitsandbytes_at_every_cell_edge() -> None:
    edges = ((torch.arange(65536, dtype=torch.float64) - 0.5) / 65535 * 2 - 1).float().clamp(-1, 1)
    up, down = torch.tensor(2.0), torch.tensor(-2.0)
    near = torch.cat([edges, edges.nextafter(up), edges.nextafter(down)]).clamp(-1, 1)
    rows = torch.nn.functional.pad(near, (0, -near.numel() % 255)).view(-1, 255)
    x = torch.cat([torch.ones(rows.shape[0], 1), rows], dim=1).view(-1)
    for scale in (1.0, 0.7, 3e-39, 1e-45, 3e38):
        assert_nested_equals_bitsandbytes(x * scale, torch.tensor(0.0))


@pytest.mark.parametrize("absmax", [[0.0], [5.0], [-5.0], [1e-40, 0.0, -1e-40], [0.0] * 256 + [1e-45, 0.0]])
def test_nested_corner_blocks_equal_bitsandbytes(absmax: list[float]) -> None:
    assert_nested_equals_bitsandbytes(torch.tensor(absmax), torch.tensor(0.0))


@every_dtype
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_a_non_finite_weight_is_found_and_makes_its_absmax_non_finite(value: float, dtype: torch.dtype) -> None:
    w = torch.randn(1000, generator=generator(0)).to(dtype)
    assert fourbit.first_non_finite(w) is None
    assert fourbit.first_non_finite(w[:0]) is None
    for index in (0, 500, 999):
        bad = w.clone()
        bad[index] = bad[999] = value
        assert fourbit.first_non_finite(bad) == index
        assert not fourbit.block_absmax(bad, 64)[index // 64].isfinite()


@every_dtype
@every_quant_type
@pytest.mark.parametrize("num_elements", [1, 257, 4096, 70_001])
@pytest.mark.parametrize("scale", [1e-30, 1.0, 1e30, 1e38])
def test_the_error_measured_is_that_of_what_loaders_reconstruct(
    scale: float, num_elements: int, dtype: torch.dtype, quant_type: str
) -> None:
    w = torch.randn(num_elements, generator=generator(1)).clamp(-3, 3) * scale
    w = w.clamp(-6e4, 6e4).to(dtype) if dtype == torch.float16 else w.to(dtype)
    absmax = fourbit.block_absmax(w, 64)
    stored = absmax * (1 + 0.01 * torch.randn(absmax.numel(), generator=generator(2)))
    packed = fourbit.encode(w, absmax, 64, quant_type)
    measured = rounding_error(w, fourbit.decode(packed, stored, w.numel(), 64, quant_type, dtype))
    assert_same_bits(packed, fourbit.encode_reference(w, absmax, 64, quant_type))
    back = bnb_decode(packed, stored, w, 64, quant_type)
    error = (w.float() - back.float()).abs()
    assert measured.max_abs == float(error.max())
    assert sum(measured.sums_of_squares) == pytest.approx(float(error.double().square().sum()), rel=1e-5)


def test_the_error_of_exact_weights_is_zero() -> None:
    w = torch.tensor(CODEBOOKS["nf4"]).repeat(8)
    absmax = fourbit.block_absmax(w, 64)
    restored = fourbit.decode(fourbit.encode(w, absmax, 64, "nf4"), absmax, w.numel(), 64, "nf4", w.dtype)
    assert rounding_error(w, restored) == TileError(0.0, (0.0,), w.numel())


@pytest.mark.parametrize("scale", [1e-30, 1e-12, 1.0, 1e30])
def test_the_error_does_not_depend_on_the_tile(scale: float) -> None:
    x = torch.randn(2 * ERROR_UNIT + 1001, generator=generator(3)) * scale
    x[ERROR_UNIT : ERROR_UNIT + 100] *= 1e-9
    whole = tile_error(x.clone())
    parts = [tile_error(part.clone()) for part in x.split(ERROR_UNIT)]
    assert whole.max_abs == max(part.max_abs for part in parts)
    assert whole.sums_of_squares == tuple(value for part in parts for value in part.sums_of_squares)


def streamed_mean(x: Tensor, piece: int) -> Tensor:
    mean = StreamedMean(x.numel())
    for part in x.split(piece):
        mean.add(part)
    return mean.result()


def test_streamed_mean_equals_torch_for_every_count_up_to_5000() -> None:
    for n in range(1, 5001):
        x = torch.rand(n, generator=generator(n)) + 1e-3
        assert_same_bits(streamed_mean(x, 1 + n * 7 % 1000 + n // 4).view(1), x.mean().view(1))


@pytest.mark.parametrize("n", [65_535, 2**19, 703_125, 2**20 + 1, 3_000_001, 2**21 * 3 + 13])
def test_streamed_mean_equals_torch_whatever_the_pieces(n: int) -> None:
    x = torch.randn(n, generator=generator(n)) * 10 ** (torch.rand(n, generator=generator(3)) * 12)
    for piece in (4096, 65_536, 99_991, n):
        assert_same_bits(streamed_mean(x, piece).view(1), x.mean().view(1))


@pytest.mark.parametrize("value", [0.0, -0.0, 1e-45, 3e38, torch.inf, torch.nan])
@pytest.mark.parametrize("n", [1, 7, 8, 33, 2049, 100_000])
def test_streamed_mean_equals_torch_for_constant_extremes(n: int, value: float) -> None:
    x = torch.full((n,), value)
    torch.testing.assert_close(streamed_mean(x, 1000), x.mean(), rtol=0, atol=0, equal_nan=True)
    if value == value:
        assert_same_bits(streamed_mean(x, 1000).view(1), x.mean().view(1))


def test_streamed_mean_refuses_more_or_fewer_values_than_promised() -> None:
    mean = StreamedMean(3)
    mean.add(torch.ones(2))
    with pytest.raises(ValueError, match="2 values of 3 promised"):
        mean.result()
    with pytest.raises(ValueError, match="more than the 3 values promised"):
        mean.add(torch.ones(2))


@pytest.mark.gpu
@every_dtype
@every_quant_type
def test_a_gpu_gives_the_bytes_of_the_cpu(dtype: torch.dtype, quant_type: str) -> None:
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device: GPU bytes are not compared with the CPU's")
    w = hostile_weights(100_001, dtype, 9)
    absmax = fourbit.block_absmax(w, 64)
    device_absmax = fourbit.block_absmax(w.cuda(), 64)
    assert_same_bits(device_absmax.cpu(), absmax)
    here = fourbit.encode(w, absmax, 64, quant_type)
    there = fourbit.encode(w.cuda(), device_absmax, 64, quant_type)
    assert_same_bits(there.cpu(), here)
    reference = fourbit.encode_reference(w.cuda(), device_absmax, 64, quant_type)
    assert_same_bits(reference.cpu(), here)
    here_back = fourbit.decode(here, absmax, w.numel(), 64, quant_type, dtype)
    there_back = fourbit.decode(there, device_absmax, w.numel(), 64, quant_type, dtype)
    assert_same_bits(there_back.cpu(), here_back)
    assert rounding_error(w.cuda(), there_back) == rounding_error(w, here_back)
