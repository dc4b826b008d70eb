"""What every op promises: what it infers is what it produces, tile by tile as in whole, and nothing vanishes."""

import dataclasses
import inspect
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

import surgery
from surgery.graph import Node, Source, TiledKernel, toposort
from surgery.numerics.dtypes import dtype_of
from surgery.op import Op, Rewrite, find_op, op_names
from surgery.types import DType, TensorType

LARGE = (600, 700)  # more than one of the smallest tiles of every kernel
ALL = {"modules": "all-linear"}
NF4 = {"op": "quantize.nf4", **ALL}
FP4 = {"op": "quantize.fp4", **ALL}
WEIGHTS = {"tensors": r".*\.weight"}

CASES: dict[str, list[list[dict[str, Any]]]] = {
    "quantize.nf4": [
        [NF4],
        [{**NF4, "double_quant": False}],
        [{**NF4, "block_size": 32}],
        [{**NF4, "block_size": 4096}],
        [{"op": "tensor.cast", **WEIGHTS, "dtype": "bfloat16"}, NF4],
    ],
    "quantize.fp4": [[FP4], [{**FP4, "double_quant": False}], [{**FP4, "block_size": 256}]],
    "quantize.dequantize": [
        [NF4, {"op": "quantize.dequantize", **ALL}],
        [{**FP4, "double_quant": False}, {"op": "quantize.dequantize", **ALL, "dtype": "float16"}],
    ],
    "tensor.cast": [
        [{"op": "tensor.cast", **WEIGHTS, "dtype": dtype}]
        for dtype in ("float64", "float16", "bfloat16", "float8_e4m3fn", "float8_e5m2")
    ],
    "tensor.rename": [[{"op": "tensor.rename", "tensors": r"(.*)\.weight", "to": r"new.\1.weight"}]],
    "tensor.drop": [[{"op": "tensor.drop", "tensors": r".*\.bias"}]],
}
every_op = pytest.mark.parametrize("name", op_names())
every_case = pytest.mark.parametrize(
    ("name", "edits"),
    [(name, edits) for name, cases in CASES.items() for edits in cases],
    ids=[f"{name}-{index}" for name, cases in CASES.items() for index in range(len(cases))],
)


def hostile(*shape: int) -> Tensor:
    """Zeros, blocks of zeros, denormals, ties, outliers, and large values among ordinary ones."""
    generator = torch.Generator().manual_seed(0)
    w = torch.randn(shape, generator=generator)
    flat = w.view(-1)
    flat[1000:2000] = 0.0
    flat[2000:2064] = -0.0
    flat[3000:3100] = torch.linspace(-1, 1, 100)
    flat[4000:4128] = 1e-38
    flat[5000] = 400.0
    flat[6000:6064] = -3.0
    flat[-1] = -200.0
    return w


@pytest.fixture(scope="module", params=["llama", "gpt2"])
def source(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A large Linear or Conv1D, one with an odd number of elements, a bias and a norm."""
    path = tmp_path_factory.mktemp("contract") / "source"
    path.mkdir()
    names = ("h.0.c_attn", "h.0.c_fc") if request.param == "gpt2" else ("layers.0.up_proj", "layers.0.q_proj")
    tensors = {
        f"{names[0]}.weight": hostile(*LARGE),
        f"{names[0]}.bias": torch.randn(700),
        f"{names[1]}.weight": hostile(83, 99),
        "norm.weight": torch.randn(99),
    }
    save_file(tensors, path / "model.safetensors")
    (path / "config.json").write_text(json.dumps({"model_type": request.param}))
    return path


def plan_of(source: Path, edits: list[dict[str, Any]]) -> Any:
    return surgery.plan({"version": 1, "source": str(source), "edits": edits})


def read(directory: Path) -> dict[str, Tensor]:
    with safe_open(directory / "model.safetensors", "pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118, no mapping


def evaluate(node: Node, tensors: Mapping[str, Tensor]) -> Tensor:
    """The reference: whole tensors, kernel after kernel."""
    if isinstance(node.kernel, Source):
        return tensors[node.kernel.name]
    return node.kernel.run(*(evaluate(child, tensors) for child in node.inputs))[node.port]


def type_of(tensor: Tensor) -> TensorType:
    return TensorType(dtype_of(tensor.dtype), tuple(tensor.shape))


def assert_same_bits(a: Tensor, b: Tensor, name: str) -> None:
    assert type_of(a) == type_of(b), name
    assert torch.equal(a.contiguous().reshape(-1).view(torch.uint8), b.contiguous().reshape(-1).view(torch.uint8)), name


def test_every_op_is_held_to_the_contract() -> None:
    assert set(CASES) == set(op_names())


@every_case
def test_what_is_inferred_is_what_the_reference_produces(name: str, edits: list[dict[str, Any]], source: Path) -> None:
    tensors = read(source)
    plan = plan_of(source, edits)
    for tensor in plan.tensors:
        assert type_of(evaluate(tensor.node, tensors)) == tensor.node.type, tensor.name
    for node in toposort(tensor.node for tensor in plan.tensors):
        assert node.kernel.infer(*(child.type for child in node.inputs))[node.port] == node.type


@every_case
def test_what_is_streamed_is_what_the_reference_produces(
    name: str, edits: list[dict[str, Any]], source: Path, tmp_path: Path
) -> None:
    tensors = read(source)
    plan = plan_of(source, edits)
    surgery.apply(plan, tmp_path / "out", workers=2, memory=plan.cost.min_memory)
    written = read(tmp_path / "out")
    assert written.keys() == {tensor.name for tensor in plan.tensors}
    for tensor in plan.tensors:
        assert_same_bits(written[tensor.name], evaluate(tensor.node, tensors), tensor.name)


@every_case
def test_the_size_of_a_tile_changes_no_bit(
    name: str, edits: list[dict[str, Any]], source: Path, tmp_path: Path
) -> None:
    """Little memory means small tiles; the errors in the manifest are sums over tiles, and part of the bytes."""
    plan = plan_of(source, edits)
    surgery.apply(plan, tmp_path / "small", workers=1, memory=plan.cost.min_memory)
    surgery.apply(plan, tmp_path / "large", workers=2, memory="4GiB")
    small, large = ({path.name: path.read_bytes() for path in (tmp_path / n).iterdir()} for n in ("small", "large"))
    assert small == large


@every_case
def test_tiled_kernels_state_their_ports(name: str, edits: list[dict[str, Any]], source: Path) -> None:
    for node in toposort(tensor.node for tensor in plan_of(source, edits).tensors):
        kernel = node.kernel
        if isinstance(kernel, TiledKernel):
            types = [child.type for child in node.inputs]
            ports = kernel.infer(*types)
            assert len(kernel.port_steps()) == len(ports) and len(kernel.input_steps()) == len(types)
            assert kernel.domain(*types) > 0 and kernel.align >= 1
            for type_, step in zip(ports, kernel.port_steps(), strict=True):
                assert step is None or type_.num_elements == -(-kernel.domain(*types) // step)
                assert step is None or kernel.align % math.gcd(step, kernel.align) == 0


@every_case
def test_the_manifest_states_the_error_that_was_made(
    name: str, edits: list[dict[str, Any]], source: Path, tmp_path: Path
) -> None:
    manifest = surgery.apply(plan_of(source, edits), tmp_path / "out")
    reads = read(source)
    loaded = read(tmp_path / "out")
    if any(entry["op"].endswith("4") for entry in edits) and name != "quantize.dequantize":
        back = plan_of(tmp_path / "out", [{"op": "quantize.dequantize", **ALL}])
        surgery.apply(back, tmp_path / "back")
        loaded = read(tmp_path / "back")
    for tensor, entry in manifest.tensors.items():
        if entry["sources"] != [tensor]:
            continue
        error = (loaded[tensor].double() - reads[tensor].double()).abs()
        assert ("error" in entry) >= bool(error.max()), f"{tensor} is rounded, and the manifest does not say so"
        if "error" in entry:
            stated: Any = entry["error"]
            assert stated["max"] == pytest.approx(float(error.max()), rel=1e-5), tensor
            assert stated["rms"] == pytest.approx(float(error.square().mean().sqrt()), rel=1e-5), tensor


@pytest.mark.parametrize(("edit", "bound"), [(NF4, 0.152), (FP4, 1 / 6)], ids=["nf4", "fp4"])
def test_a_block_errs_no_more_than_the_manual_says(
    edit: dict[str, Any], bound: float, source: Path, tmp_path: Path
) -> None:
    surgery.apply(plan_of(source, [{**edit, "double_quant": False}]), tmp_path / "out")
    surgery.apply(plan_of(tmp_path / "out", [{"op": "quantize.dequantize", **ALL}]), tmp_path / "back")
    is_conv1d = "gpt2" in (source / "config.json").read_text()
    before, after = read(source), read(tmp_path / "back")
    for name in (tensor for tensor in before if before[tensor].dim() == 2):
        x, y = (pair[name].t() if is_conv1d else pair[name] for pair in (before, after))
        x, y = (value.reshape(-1)[: x.numel() // 64 * 64].reshape(-1, 64).double() for value in (x, y))
        assert bool(((x - y).abs().amax(1) <= x.abs().amax(1) * bound * (1 + 1e-6)).all()), name


@every_op
def test_an_op_is_one_frozen_dataclass_in_the_file_of_its_name(name: str) -> None:
    op = find_op(name)
    assert op.name == name
    assert issubclass(op, Op) and dataclasses.is_dataclass(op)
    assert op.__dataclass_params__.frozen and "__slots__" in vars(op)  # type: ignore[attr-defined]
    assert Path(inspect.getfile(op)).as_posix().endswith(f"surgery/ops/{name.replace('.', '/')}.py")


@every_op
def test_the_manual_says_what_an_op_reads_writes_and_refuses(name: str) -> None:
    manual = surgery.ops(name)
    heading, *_ = inspect.cleandoc(find_op(name).__doc__ or "").splitlines()
    assert heading.endswith(".")
    for word in ("Reads ", "Writes ", "Raises "):
        assert f"\n{word}" in manual, word
    if find_op(name).rules and name != "tensor.drop":
        assert "\nError " in manual or "\nExact " in manual


@every_op
def test_an_op_that_lets_a_tensor_vanish_is_found_out(name: str, source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    op = find_op(name)
    rewrite = op.rewrite

    def forgetful(self: Op, site: Any) -> Rewrite:
        return Rewrite(rewrite(self, site).takes, {})

    monkeypatch.setattr(op, "rewrite", forgetful)
    with pytest.raises(surgery.ConservationError, match="would vanish"):
        plan_of(source, CASES[name][0])


@every_op
def test_an_op_that_lets_one_of_several_tensors_vanish_is_found_out(
    name: str, source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A node in the place of a tensor must be computed from it."""
    op = find_op(name)
    rewrite = op.rewrite
    first: list[Node] = []

    def confused(self: Op, site: Any) -> Rewrite:
        done = rewrite(self, site)
        first.extend([site.nodes[done.takes[0]]] if not first else [])
        return Rewrite(done.takes, dict.fromkeys(done.gives or done.takes, first[0]))

    monkeypatch.setattr(op, "rewrite", confused)
    edits = CASES[name][0]
    if name == "tensor.drop":
        edits = [{"op": "tensor.drop", "tensors": ".*"}]
    with pytest.raises(surgery.ConservationError, match="would vanish"):
        plan_of(source, edits)


def test_dtypes_that_torch_lacks_are_copied_as_bytes(tmp_path: Path) -> None:
    """F4 and the like pass through: a copy looks at no value."""
    header = {"a": {"dtype": "F4", "shape": [3, 2], "data_offsets": [0, 3]}}
    header |= {"b": {"dtype": "F32", "shape": [1], "data_offsets": [3, 7]}}
    raw = json.dumps(header).encode()
    (tmp_path / "x.safetensors").write_bytes(len(raw).to_bytes(8, "little") + raw + b"\x12\x34\x56" + b"\0" * 4)
    plan = plan_of(tmp_path / "x.safetensors", [{"op": "tensor.cast", "tensors": "b", "dtype": "float16"}])
    assert [tensor.node.type.dtype for tensor in plan.tensors] == [DType.F4, DType.F16]
    manifest = surgery.apply(plan, tmp_path / "out")
    start, stop = manifest.tensors["a"]["data_offsets"]  # type: ignore[misc]
    written = (tmp_path / "out" / "model.safetensors").read_bytes()
    data_start = len(written) - plan.layout.files[0].tensors[-1].stop
    assert written[data_start + start : data_start + stop] == b"\x12\x34\x56"
