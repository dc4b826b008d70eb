"""Every merge kernel against mergekit's own code, bit for bit, and against itself on other spans."""

import json
import math
import os
import subprocess
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from peers import mergekit_python
from safetensors.torch import load_file, save_file
from torch import Tensor

from surgery.graph import BadValue, TiledKernel
from surgery.numerics.dtypes import dtype_of, torch_dtype, torch_name
from surgery.numerics.merge import kernel as merge_kernel
from surgery.numerics.merge.arcee_fusion import ArceeFusion
from surgery.numerics.merge.dropped import Dare, Della
from surgery.numerics.merge.karcher import Karcher
from surgery.numerics.merge.kernel import MergeKernel
from surgery.numerics.merge.linear import Linear
from surgery.numerics.merge.masks import Draws
from surgery.numerics.merge.model_stock import ModelStock
from surgery.numerics.merge.multislerp import MultiSlerp
from surgery.numerics.merge.nearswap import NearSwap
from surgery.numerics.merge.nuslerp import NuSlerp
from surgery.numerics.merge.pruned import Breadcrumbs, Ties
from surgery.numerics.merge.ram import Ram, RamPlus
from surgery.numerics.merge.same import Same
from surgery.numerics.merge.sce import Sce
from surgery.numerics.merge.slerp import Slerp
from surgery.numerics.merge.task_arithmetic import TaskArithmetic
from surgery.types import DType, TensorType

Make = Callable[[DType | None, DType, tuple[int, ...]], MergeKernel]
SEED, NAME, STREAMS = 7, "model.weight", ("first", "second", "third")
SHAPES = ((300, 1001), (3, 5, 129), (33,))  # the first is longer than a block of 2^18
DTYPES = (DType.BF16, DType.F16, DType.F32)


@dataclass(frozen=True)
class Case:
    """A mergekit method with its parameters, and the kernel that does the same."""

    method: str
    num_inputs: int
    make: Make
    has_base: bool = True
    parameters: Mapping[str, Any] = field(default_factory=dict)
    per_model: Mapping[str, Sequence[float]] = field(default_factory=dict)
    masked: tuple[int, ...] = ()
    as_is: bool = False


def _linear(weights: tuple[float, ...], normalize: bool) -> Case:
    return Case(
        "linear", len(weights), lambda c, d, s: Linear(c, d, weights, normalize), False, {"normalize": normalize},
        {"weight": weights},
    )  # fmt: skip


def _sum(
    method: str, weights: tuple[float, ...], make: Callable[..., MergeKernel], normalize: bool, lambda_: float = 1.0,
    rescale: bool = False, masked: tuple[int, ...] = (), as_is: bool = False, **per_model: tuple[float, ...],
) -> Case:  # fmt: skip
    """One of the methods of task arithmetic; `make` gets compute, dtype, the fields of all of them, and the shape."""
    consensus = method in ("ties", "breadcrumbs_ties", "dare_ties", "della")
    parameters = {"normalize": normalize, "rescale": rescale, "lambda": lambda_}
    return Case(
        method, 1 + len(weights), lambda c, d, s: make(c, d, weights, consensus, normalize, lambda_, s), True,
        parameters, {"weight": weights, **per_model}, masked, as_is,
    )  # fmt: skip


def _plain(method: str, weights: tuple[float, ...], normalize: bool, lambda_: float) -> Case:
    return _sum(method, weights, lambda *a: TaskArithmetic(*a[:-1]), normalize, lambda_)


def _ties(weights: tuple[float, ...], density: tuple[float, ...], normalize: bool, rescale: bool, as_is: bool) -> Case:
    def make(*a: Any) -> MergeKernel:
        return Ties(*a[:-1], density, rescale)

    return _sum("ties", weights, make, normalize, rescale=rescale, as_is=as_is, density=density)


def _breadcrumbs(method: str, density: tuple[float, ...], gamma: tuple[float, ...], rescale: bool) -> Case:
    def make(*a: Any) -> MergeKernel:
        return Breadcrumbs(*a[:-1], density, rescale, gamma)

    return _sum(method, (0.6, -0.3), make, True, rescale=rescale, density=density, gamma=gamma)


def _dare(method: str, density: tuple[float, ...], normalize: bool, rescale: bool) -> Case:
    def make(*a: Any) -> MergeKernel:
        return Dare(*a[:-1], density, rescale, SEED, NAME, STREAMS)

    masked = tuple(i for i, d in enumerate(density) if d < 1)
    return _sum(method, (0.6, 0.3), make, normalize, rescale=rescale, masked=masked, density=density)


def _della(method: str, density: tuple[float, ...], epsilon: tuple[float, ...], rescale: bool) -> Case:
    def make(*a: Any) -> MergeKernel:
        return Della(*a[:-1], density, rescale, SEED, NAME, STREAMS, epsilon, a[-1])

    masked = tuple(i for i, d in enumerate(density) if 0 < d < 1)
    return _sum(method, (0.6, 0.3), make, True, rescale=rescale, masked=masked, density=density, epsilon=epsilon)


def _nuslerp(weights: tuple[float, float], has_base: bool, flatten: bool, row_wise: bool) -> Case:
    return Case(
        "nuslerp", 2 + has_base, lambda c, d, s: NuSlerp(c, d, weights, has_base, flatten, row_wise, s), has_base,
        {"nuslerp_flatten": flatten, "nuslerp_row_wise": row_wise}, {"weight": weights},
    )  # fmt: skip


def _multislerp(weights: tuple[float, ...], has_base: bool, normalize: bool) -> Case:
    return Case(
        "multislerp", len(weights) + has_base, lambda c, d, s: MultiSlerp(c, d, weights, has_base, normalize, 1e-8),
        has_base, {"normalize_weights": normalize, "eps": 1e-8}, {"weight": weights},
    )  # fmt: skip


def _sce(num_models: int, topk: float) -> Case:
    return Case("sce", 1 + num_models, lambda c, d, s: Sce(c, d, num_models, topk), parameters={"select_topk": topk})


CASES = {
    "linear": _linear((0.5, 0.3, 0.3), True),
    "linear, not normalised": _linear((1.0, -0.2), False),
    "task arithmetic": _plain("task_arithmetic", (0.5, 0.3), False, 0.7),
    "task arithmetic of five": _plain("task_arithmetic", (0.2, 0.3, 0.1, -0.2, 0.2), True, 1.0),
    "election of all": _plain("ties", (1.0, -0.4, 0.3), True, 1.0),
    "ties": _ties((0.5, 0.3), (0.5, 0.5), True, False, False),
    "ties, rescaled": _ties((0.5, 0.3, -0.2), (0.3, 1.0, 0.9), False, True, False),
    "ties of next to nothing": _ties((0.5, 0.3), (1e-9, 0.0), True, False, False),
    "ties, sorted as mergekit does": _ties((0.5, 0.3), (0.5, 0.2), True, False, True),
    "breadcrumbs": _breadcrumbs("breadcrumbs", (0.7, 0.3), (0.01, 0.2), False),
    "breadcrumbs_ties": _breadcrumbs("breadcrumbs_ties", (0.95, 0.5), (0.1, 0.0), True),
    "dare_linear": _dare("dare_linear", (0.5, 0.3), False, True),
    "dare_ties": _dare("dare_ties", (1.0, 0.8), True, False),
    "della": _della("della", (0.5, 0.3), (0.15, 0.1), True),
    "della_linear": _della("della_linear", (0.0, 0.4), (0.1, 0.1), False),
    "slerp": Case("slerp", 2, lambda c, d, s: Slerp(c, d, 0.3), parameters={"t": 0.3}),
    "nuslerp": _nuslerp((0.3, 0.9), False, True, False),
    "nuslerp of task vectors": _nuslerp((1.0, -1.0), True, True, False),
    "nuslerp of rows": _nuslerp((0.5, 0.5), True, False, False),
    "nuslerp of columns": _nuslerp((0.2, 0.4), False, False, True),
    "multislerp": _multislerp((0.3, 0.9, -0.2), False, True),
    "multislerp of task vectors": _multislerp((0.6, 0.6), True, False),
    "karcher": Case("karcher", 3, lambda c, d, s: Karcher(c, d, 3, 10, 1e-5), False, {"max_iter": 10, "tol": 1e-5}),
    "model_stock": Case("model_stock", 4, lambda c, d, s: ModelStock(c, d, 3, False, s)),
    "model_stock by filter": Case(
        "model_stock", 3, lambda c, d, s: ModelStock(c, d, 2, True, s), parameters={"filter_wise": True}
    ),
    "sce": _sce(2, 0.5),
    "sce of all": _sce(3, 1.0),
    "nearswap": Case("nearswap", 2, lambda c, d, s: NearSwap(c, d, 0.001), parameters={"t": 0.001}),
    "ram": Case("ram", 4, lambda c, d, s: Ram(c, d, 3, 1e-3), parameters={"epsilon": 1e-3}),
    "ramplus": Case("ramplus_tl", 3, lambda c, d, s: RamPlus(c, d, 2, 1e-3, 0.1, 0.2), parameters={"epsilon": 1e-3}),
    "arcee_fusion": Case("arcee_fusion", 2, lambda c, d, s: ArceeFusion(c, d, s)),
}
RUNS = [(n, s, d, c) for n in CASES for s in SHAPES for d in DTYPES for c in (None, DType.F32)]


def _models(shape: tuple[int, ...], dtype: DType, num: int = 6) -> list[Tensor]:
    """A base and models near it, with zeros, negative zeros, and elements that did not change."""
    generator = torch.Generator().manual_seed(math.prod(shape))
    base = torch.randn(shape, generator=generator) * 0.05
    models = [base, *(base + torch.randn(shape, generator=generator) * 0.005 for _ in range(num - 1))]
    models = [model.to(torch_dtype(dtype)) for model in models]
    for model in models:
        flat = model.view(-1)
        flat[::17], flat[3::23], flat[5::19] = 0, -0.0, models[0].view(-1)[5::19]
    return models


def _key(shape: tuple[int, ...], dtype: DType, index: int) -> str:
    return f"{shape} {dtype} {index}"


@pytest.fixture(scope="module")
def merged(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Tensor]:
    """What mergekit makes of every run, by its repr; in one process."""
    python = mergekit_python()
    if python is None:
        pytest.skip("no mergekit: set SURGERY_MERGEKIT_PYTHON, or install mergekit==0.1.5 into .venv-mergekit")
    directory = tmp_path_factory.mktemp("mergekit")
    inputs = {_key(s, d, i): model for s in SHAPES for d in DTYPES for i, model in enumerate(_models(s, d))}
    draws = Draws(SEED, NAME, STREAMS, torch.device("cpu"))
    inputs |= {f"{s} {i}": draws.uniform(i, (0, math.prod(s))).clone() for s in SHAPES for i in range(2)}
    save_file(inputs, directory / "in.safetensors")
    (directory / "jobs.json").write_text(json.dumps([_job(*run) for run in RUNS]))
    script = Path(__file__).parent / "peers" / "mergekit_kernels.py"
    files = [str(directory / name) for name in ("jobs.json", "in.safetensors", "out.safetensors")]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    done = subprocess.run([str(python), "-I", str(script), *files], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return load_file(files[-1])


def _job(name: str, shape: tuple[int, ...], dtype: DType, compute: DType | None) -> dict[str, Any]:
    case = CASES[name]
    return {
        "method": case.method, "inputs": [_key(shape, dtype, i) for i in range(case.num_inputs)],
        "has_base": case.has_base, "parameters": dict(case.parameters), "per_model": dict(case.per_model),
        "dtype": torch_name(compute) if compute else None, "out_dtype": torch_name(dtype),
        "draws": [f"{shape} {i}" for i in case.masked], "as_is": case.as_is,
        "result": repr((name, shape, dtype, compute)),
    }  # fmt: skip


def _streamed(kernel: TiledKernel, inputs: Sequence[Tensor], num_span: int) -> Tensor:
    """The kernel run on spans of at least `num_span` elements, as the stream does."""
    types = [TensorType(dtype_of(x.dtype), tuple(x.shape)) for x in inputs]
    (out,) = kernel.infer(*types)
    flat, n = [x.reshape(-1) for x in inputs], inputs[0].numel()
    block = math.lcm(1 << 18, kernel.align)
    num_span = max(1, num_span // block) * block

    def spans(step: int) -> list[tuple[int, int]]:
        return [(start, min(start + step, n)) for start in range(0, n, step)]

    state: object = None
    for _ in range(kernel.reductions):
        cut = spans(kernel.unit(*types) or num_span)
        state = kernel.combine(state, (kernel.partial(state, (a, b), *(x[a:b] for x in flat)) for a, b in cut), *types)
    tiles = [kernel.tile(state, None, (a, b), *(x[a:b] for x in flat))[0] for a, b in reversed(spans(num_span))]
    merged = torch.cat([tile for tile in reversed(tiles) if tile is not None])
    assert merged.dtype == torch_dtype(out.dtype)
    return merged.view(inputs[0].shape)


def _differs(a: Tensor, b: Tensor) -> Tensor:
    """Where the bits differ, NaN being NaN."""
    integer = torch.int32 if a.dtype == torch.float32 else torch.int16
    return (a.view(integer) != b.view(integer)) & ~(a.isnan() & b.isnan())


@pytest.mark.parametrize("name", CASES)
def test_a_kernel_has_the_bits_of_mergekit_on_any_spans(name: str, merged: dict[str, Tensor]) -> None:
    case = CASES[name]
    for run in (run for run in RUNS if run[0] == name):
        _, shape, dtype, compute = run
        inputs = _models(shape, dtype)[: case.num_inputs]
        kernel = case.make(compute, dtype, shape)
        expected = merged[repr(run)]
        for got in (kernel.run(*inputs)[0], _streamed(kernel, inputs, 1 << 18)):
            wrong = _differs(got, expected)
            if case.as_is:
                wrong &= ~_at_a_threshold(case, inputs, compute)
            assert not wrong.any(), f"{run}: {int(wrong.sum())} elements, the first {wrong.view(-1).nonzero()[0]}"


def _at_a_threshold(case: Case, inputs: Sequence[Tensor], compute: DType | None) -> Tensor:
    """Where a delta has the magnitude of the smallest that is kept."""
    base, *models = (x.to(torch_dtype(compute)) if compute else x for x in inputs)
    at = torch.zeros(base.shape, dtype=torch.bool)
    for model, density in zip(models, case.per_model["density"], strict=True):
        size = (model - base).abs().float()
        at |= size == size.view(-1).sort(descending=True).values[max(1, int(density * size.numel())) - 1]
    return at


@pytest.mark.parametrize("name", [name for name in CASES if "as mergekit does" not in name])
def test_sums_in_spans_agree_with_sums_at_once(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    shape = (1100, 1001)  # longer than a unit
    inputs = _models(shape, DType.BF16)[: CASES[name].num_inputs]
    kernel = CASES[name].make(DType.F32, DType.F32, shape)
    (at_once,) = kernel.run(*inputs)
    monkeypatch.setattr(merge_kernel, "WHOLE", 1 << 20)
    in_spans = _streamed(kernel, inputs, 1 << 18)
    assert not _differs(in_spans, _streamed(kernel, inputs, 1 << 21)).any()
    torch.testing.assert_close(in_spans, at_once, rtol=1e-4, atol=1e-5)  # float32 sums at once are the less exact


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("value", [0.0, 1e-39, 0.25])
def test_equal_magnitudes_are_kept_from_the_lowest_index_on(dtype: torch.dtype, value: float) -> None:
    n = (1 << 19) + 5
    base, x = torch.zeros(n, dtype=dtype), torch.full((n,), value, dtype=dtype)
    x[::3] *= -1
    x[n - 2] = 1
    kernel = Ties(None, dtype_of(dtype), (1.0,), True, False, 1.0, (0.6,), False)
    expected = x.clone()
    expected[int(0.6 * n) - 1 : n - 2] = 0
    expected[n - 1] = 0
    assert torch.equal(_streamed(kernel, [base, x], 1 << 18), expected)


def test_masks_depend_on_seed_tensor_model_and_element_only() -> None:
    def draws(seed: int, name: str, stream: str, span: tuple[int, int]) -> Tensor:
        return Draws(seed, name, (stream,), torch.device("cpu")).uniform(0, span)

    whole = draws(0, "a", "m", (0, 600_000))
    assert torch.equal(whole[300_000:500_000], draws(0, "a", "m", (300_000, 500_000)))
    assert abs(float(whole.mean()) - 0.5) < 0.005
    others = [draws(1, "a", "m", (0, 9)), draws(0, "b", "m", (0, 9)), draws(0, "a", "n", (0, 9))]
    assert not any(torch.equal(whole[:9], other) for other in others)
    assert not torch.equal(whole[:9], whole[1 << 18 :][:9])


def test_what_float16_cannot_hold_is_named() -> None:
    x = torch.zeros(70_000)
    x[69_999] = 70_000.0
    with pytest.raises(BadValue) as caught:
        Linear(DType.F32, DType.F16, (1.0, 1.0), False).run(x, x)
    assert caught.value.index == 69_999


def test_tensors_that_are_not_floats_must_be_the_same() -> None:
    a = torch.arange(1000)
    assert torch.equal(Same(2).run(a, a.clone())[0], a)
    b = a.clone()
    b[77] += 1 << 40
    with pytest.raises(BadValue) as caught:
        Same(2).run(a, b)
    assert (caught.value.index, caught.value.what) == (77, "differs between the models")


def test_inputs_that_cannot_be_merged_are_refused() -> None:
    kernel = Linear(None, DType.BF16, (1.0, 1.0), True)
    bf16 = TensorType(DType.BF16, (2, 3))
    for other, what in ((TensorType(DType.BF16, (3, 2)), "shapes differ"), (TensorType(DType.I8, (2, 3)), "only f32")):
        with pytest.raises(ValueError, match=what):
            kernel.infer(bf16, other)
