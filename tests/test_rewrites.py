"""Every rule that rewrites the graph leaves every bit as it was."""

import itertools
import json
from pathlib import Path
from typing import Any

import models
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

import surgery
from surgery.formats.bitsandbytes import Dequantize4bit, Quantize4bit, QuantRecord, quantize_of_dequantize
from surgery.graph import Graph, Node, Source, rewrite
from surgery.numerics.cast import Cast, cast_of_cast, transpose_of_cast
from surgery.numerics.dtypes import dtype_of, torch_dtype
from surgery.numerics.transpose import Transpose, transpose_of_transpose
from surgery.op import find_op, op_names
from surgery.types import DType, TensorType

FLOATS = (DType.F64, DType.F32, DType.BF16, DType.F16, DType.F8_E5M2, DType.F8_E4M3)


def evaluate(node: Node, source: Tensor) -> Tensor:
    """The reference: whole tensors, kernel after kernel."""
    if isinstance(node.kernel, Source):
        return source
    return node.kernel.run(*(evaluate(child, source) for child in node.inputs))[node.port]


def source_node(graph: Graph, tensor: Tensor) -> Node:
    return graph.apply(Source("source", "x", TensorType(dtype_of(tensor.dtype), tuple(tensor.shape))))[0]


def assert_same_bits(a: Tensor, b: Tensor) -> None:
    assert (a.dtype, a.shape) == (b.dtype, b.shape)
    assert torch.equal(a.contiguous().view(torch.uint8), b.contiguous().view(torch.uint8))


def every_pattern(dtype: DType) -> Tensor:
    """Every bit pattern of a small dtype, NaN among them; a million random ones of a large dtype."""
    if dtype.bits <= 16:
        numbers = torch.arange(1 << dtype.bits, dtype=torch.int32)
        return numbers.to({8: torch.uint8, 16: torch.uint16}[dtype.bits]).view(torch_dtype(dtype))
    generator = torch.Generator().manual_seed(0)
    words = torch.randint(-(1 << 31), 1 << 31, (1 << 18, dtype.bits // 32), generator=generator, dtype=torch.int64)
    return words.to(torch.int32).view(torch_dtype(dtype)).reshape(-1)


def test_no_rule_goes_untested() -> None:
    rules = {rule for name in op_names() for rule in find_op(name).rules}
    assert rules == {transpose_of_transpose, cast_of_cast, transpose_of_cast, quantize_of_dequantize}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float8_e5m2", "int64", "uint8", "bool"])
@pytest.mark.parametrize("shape", [(3, 5), (1, 7), (64, 64), (0, 3)])
def test_transpose_of_transpose_is_nothing(dtype: str, shape: tuple[int, int]) -> None:
    graph, x = Graph(), torch.randn(shape).to(getattr(torch, dtype))
    source = source_node(graph, x)
    (once,) = graph.apply(Transpose(), source)
    (twice,) = graph.apply(Transpose(), once)
    assert rewrite(graph, [twice, once], [transpose_of_transpose]) == [source, once]
    assert_same_bits(evaluate(twice, x), x)


@pytest.mark.parametrize("dtype", [DType.BF16, DType.F16, DType.F64], ids=str)
def test_a_cast_is_turned_after_or_before_alike(dtype: DType) -> None:
    graph, x = Graph(), torch.randn(3, 5)
    source = source_node(graph, x)
    (turned,) = graph.apply(Transpose(), *graph.apply(Cast(dtype), source))
    (after,) = rewrite(graph, [turned], [transpose_of_cast])
    assert isinstance(after.kernel, Cast) and after.inputs == graph.apply(Transpose(), source)
    assert_same_bits(evaluate(turned, x), evaluate(after, x))


def test_any_number_of_transposes_is_none_or_one() -> None:
    graph, x = Graph(), torch.randn(3, 5)
    nodes = [source_node(graph, x)]
    for _ in range(7):
        nodes += graph.apply(Transpose(), nodes[-1])
    simplified = rewrite(graph, nodes, [transpose_of_transpose])
    assert simplified == [nodes[index % 2] for index in range(8)]
    for before, after in zip(nodes, simplified, strict=True):
        assert_same_bits(evaluate(before, x), evaluate(after, x))


@pytest.mark.parametrize(
    "dtypes", list(itertools.product(FLOATS, repeat=3)), ids=lambda dtypes: "-".join(map(str, dtypes))
)
def test_cast_of_cast_changes_no_bit(dtypes: tuple[DType, DType, DType]) -> None:
    graph, x = Graph(), every_pattern(dtypes[0])
    node = source_node(graph, x)
    for dtype in dtypes[1:]:
        (node,) = graph.apply(Cast(dtype), node)
    (after,) = rewrite(graph, [node], [cast_of_cast])
    assert after.type == node.type
    before_x, after_x = evaluate(node, x), evaluate(after, x)
    is_nan = before_x.float().isnan()
    assert torch.equal(is_nan, after_x.float().isnan())
    assert_same_bits(before_x[~is_nan], after_x[~is_nan])


def test_casts_that_round_in_between_are_kept() -> None:
    graph, x = Graph(), torch.randn(1000)
    node = source_node(graph, x)
    for dtype in (DType.BF16, DType.F32):
        (node,) = graph.apply(Cast(dtype), node)
    (after,) = rewrite(graph, [node], [cast_of_cast])
    assert not torch.equal(evaluate(after, x), x)
    assert_same_bits(evaluate(after, x), evaluate(node, x))


def test_a_cast_to_a_tensors_own_dtype_is_a_copy() -> None:
    graph = Graph()
    source = source_node(graph, torch.ones(3))
    (cast,) = graph.apply(Cast(DType.F32), source)
    assert rewrite(graph, [cast], [cast_of_cast]) == [source]


def test_quantizing_otherwise_what_was_dequantized_is_no_copy() -> None:
    graph = Graph()
    record = QuantRecord("nf4", 64, TensorType(DType.F32, (64, 64)), True)
    parts = [
        graph.apply(Source("source", suffix, type_))[0] for suffix, type_ in record.port_types().items()
    ]  # fmt: skip
    (weight,) = graph.apply(Dequantize4bit(record, DType.F32), *parts)
    same = graph.apply(Quantize4bit("nf4", 64, True), weight)
    assert rewrite(graph, same, [quantize_of_dequantize]) == parts
    for other in (Quantize4bit("fp4", 64, True), Quantize4bit("nf4", 128, True), Quantize4bit("nf4", 64, False)):
        ports = graph.apply(other, weight)
        assert rewrite(graph, ports, [quantize_of_dequantize]) == list(ports)
    (half,) = graph.apply(Dequantize4bit(record, DType.F16), *parts)
    ports = graph.apply(Quantize4bit("nf4", 64, True), half)
    assert rewrite(graph, ports, [quantize_of_dequantize]) == list(ports)


# The same on disk


def read(directory: Path) -> dict[str, Tensor]:
    with safe_open(directory / "model.safetensors", "pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118, no mapping


def apply(source: Path, out: Path, *edits: dict[str, Any], **fields: Any) -> Path:
    surgery.apply(surgery.plan({"version": 1, "source": str(source), "edits": list(edits), **fields}), out)
    return out


@pytest.fixture(params=["llama", "gpt2"])
def source(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    path = tmp_path / "source"
    path.mkdir()
    generator = torch.Generator().manual_seed(0)
    name = "h.0.attn.c_attn" if request.param == "gpt2" else "layers.0.up_proj"
    tensors = {f"{name}.weight": torch.randn(192, 320, generator=generator), f"{name}.bias": torch.ones(320)}
    save_file(tensors, path / "model.safetensors")
    (path / "config.json").write_text(json.dumps({"model_type": request.param}))
    return path


DEQUANTIZE = {"op": "quantize.dequantize", "modules": "all-linear"}
BFLOAT16 = {"op": "tensor.cast", "tensors": ".*weight", "dtype": "bfloat16"}
QUANTIZE = [
    {"op": f"quantize.{kind}", "modules": "all-linear", "double_quant": double, "block_size": size}
    for kind in ("nf4", "fp4")
    for double in (True, False)
    for size in (32, 64)
]


@pytest.mark.parametrize("quantize", QUANTIZE, ids=lambda edit: "-".join(map(str, edit.values())))
def test_quantizing_again_what_was_dequantized_copies_bytes(
    quantize: dict[str, Any], source: Path, tmp_path: Path
) -> None:
    first = apply(source, tmp_path / "first", quantize)
    plan = surgery.plan({"version": 1, "source": str(first), "edits": [DEQUANTIZE, quantize]})
    assert plan.summary()["copy"] == len(plan.checkpoint.tensors)
    surgery.apply(plan, tmp_path / "again")
    before, after = read(first), read(tmp_path / "again")
    assert before.keys() == after.keys()
    for name, tensor in before.items():
        assert_same_bits(tensor, after[name])


@pytest.mark.parametrize("quantize", QUANTIZE[:2], ids=lambda edit: "-".join(map(str, edit.values())))
def test_dequantizing_in_the_same_spec_gives_what_two_specs_give(
    quantize: dict[str, Any], source: Path, tmp_path: Path
) -> None:
    first = apply(source, tmp_path / "first", quantize)
    second = apply(first, tmp_path / "second", DEQUANTIZE)
    at_once = apply(source, tmp_path / "at_once", quantize, DEQUANTIZE)
    for name, tensor in read(second).items():
        assert_same_bits(tensor, read(at_once)[name])


def test_casting_in_one_spec_gives_what_two_specs_give(source: Path, tmp_path: Path) -> None:
    widen = {**BFLOAT16, "dtype": "float32"}
    first = apply(source, tmp_path / "first", BFLOAT16)
    second = apply(first, tmp_path / "second", widen, {**BFLOAT16, "dtype": "float16"})
    at_once = apply(source, tmp_path / "at_once", BFLOAT16, widen, {**BFLOAT16, "dtype": "float16"})
    for name, tensor in read(second).items():
        assert_same_bits(tensor, read(at_once)[name])


def test_merging_in_the_spec_that_dequantizes_and_quantizes_gives_what_three_specs_give(tmp_path: Path) -> None:
    source = models.llama(tmp_path / "source")
    quantized = apply(source, tmp_path / "quantized", QUANTIZE[0])
    others = {"a": str(models.tuned(tmp_path / "a", source))}
    merge = {"op": "merge.ties", "models": {"a": {"weight": 0.7, "density": 0.5}}}
    floats = apply(quantized, tmp_path / "floats", DEQUANTIZE)
    merged = apply(floats, tmp_path / "merged", merge, models=others)
    last = apply(merged, tmp_path / "last", QUANTIZE[0])
    at_once = apply(quantized, tmp_path / "at_once", DEQUANTIZE, merge, QUANTIZE[0], models=others)
    for name, tensor in read(last).items():
        assert_same_bits(tensor, read(at_once)[name])


def test_what_no_adapter_touches_is_not_requantized(tmp_path: Path) -> None:
    source = models.llama(tmp_path / "source")
    quantized = apply(source, tmp_path / "quantized", QUANTIZE[0])
    others = {"lora": str(models.lora(tmp_path / "lora", source, targets=["q_proj"]))}
    folded = apply(quantized, tmp_path / "folded", {"op": "adapter.fold", "models": "lora"}, models=others)
    before, after = read(quantized), read(folded)
    assert before.keys() == after.keys()
    for name, tensor in before.items():
        if "q_proj" not in name:
            assert_same_bits(tensor, after[name])
    changed = [name for name in before if name.endswith("q_proj.weight") and not torch.equal(before[name], after[name])]
    assert len(changed) == 2
