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
from surgery.errors import Problem
from surgery.graph import Node, Source, TiledKernel, toposort
from surgery.numerics.dtypes import dtype_of
from surgery.op import Attach, Op, Rewrite, Scene, find_op, op_names, options_of
from surgery.plan import names as threading
from surgery.spec import Edit
from surgery.types import DType, TensorType

LARGE = (600, 700)  # more than one of the smallest tiles of every kernel
RANK = 400  # of the larger module's LoRA: its factors have more than one tile too
ALL = {"modules": "all-linear"}
NF4 = {"op": "quantize.nf4", **ALL}
FP4 = {"op": "quantize.fp4", **ALL}
WEIGHTS = {"tensors": r".*\.weight"}
DEPTH: dict[str, Any] = {".*proj.*": [0.2, 0.7], ".*": 0.4}


def merge(method: str, models: Any = ("a", "b"), /, **options: Any) -> dict[str, Any]:
    """A merge of `models`: names, or numbers by name."""
    return {"op": f"merge.{method}", "models": list(models) if isinstance(models, tuple) else models, **options}


def each(**numbers: Any) -> dict[str, Any]:
    """The same numbers for both further models, weights of their own."""
    return {"a": {"weight": 0.7, **numbers}, "b": {"weight": DEPTH, **numbers}}


def fold(models: Any = "lora", /, **options: Any) -> dict[str, Any]:
    return {"op": "adapter.fold", "models": models, **options}


def combine(method: str, /, density: float | None = None, **options: Any) -> dict[str, Any]:
    numbers = {} if density is None else {"density": density}
    models = {"source": {"weight": 0.6, **numbers}, "lora2": {"weight": -0.7, **numbers}}
    return {"op": "adapter.combine", "method": method, "models": models, **options}


def extract(**options: Any) -> dict[str, Any]:
    return {"op": "adapter.extract", **ALL, "models": "a", **options}


def slices(*pieces: dict[str, Any], **options: Any) -> dict[str, Any]:
    return {"op": "layers.select", "slices": list(pieces), **options}


def attach(method: str, /, **options: Any) -> dict[str, Any]:
    """On every Linear, but for the ops that select something else, or nothing."""
    selecting = ALL if method in ("ia3", "lora") else {}
    return {"op": f"attach.{method}", "name": "new", **selecting, **options}


FIRST = {"layers": [0, 1]}

CASES: dict[str, list[list[dict[str, Any]]]] = {
    "adapter.combine": [
        [combine("cat")],
        [combine("cat", rank=7)],
        [combine("cat", energy=0.9, rank=12)],
        [combine("svd", rank=5)],
        [combine("linear")],
        [combine("ties", density=0.3, majority_sign_method="frequency")],
        [combine("magnitude_prune", density=0.5)],
        [combine("dare_ties", density=0.4)],
        [combine("dare_linear_svd", density=0.4, rank=5)],
    ],
    "adapter.convert": [
        [{"op": "adapter.convert", "to": "adapterhub", "base": "a", "name": "mine"}],
        [{"op": "adapter.convert", "to": "peft"}],
    ],
    "adapter.extract": [
        [extract(rank=8)],
        [extract(rank=8, svd="randomized", dtype="bfloat16", alpha=32)],
        [extract(energy=0.5, max_rank=12)],
    ],
    "adapter.fold": [
        [fold()],
        [fold({"lora": {"weight": -0.4}, "plain": {}})],
        [NF4, fold()],
        [fold("dora"), NF4],
        [fold("ia3")],
    ],
    "attach.bitfit": [[attach("bitfit")], [NF4, attach("bitfit")]],
    "attach.ia3": [[attach("ia3", feedforward=r".*(up_proj|c_proj)")], [NF4, attach("ia3")]],
    "attach.lora": [
        [attach("lora", rslora=True)],
        [attach("lora", dora=True, init="gaussian", rank_pattern={r".*mlp\.\w+": 3})],
        [attach("lora", init="pissa", rank=5, alpha=3)],
        [NF4, attach("lora", dora=True)],
        [fold(), attach("lora", init="pissa"), NF4],
    ],
    "attach.p_tuning": [
        [attach("p_tuning", num_virtual_tokens=5, encoder="lstm")],
        [NF4, attach("p_tuning", num_virtual_tokens=5)],
    ],
    "attach.parallel_adapter": [
        [attach("parallel_adapter")],
        [attach("parallel_adapter", placement="linear", width=4, **ALL), NF4],
    ],
    "attach.prefix_tuning": [
        [attach("prefix_tuning", num_virtual_tokens=5)],
        [attach("prefix_tuning", num_virtual_tokens=5, reparametrize="mlp"), NF4],
    ],
    "attach.prompt_tuning": [
        [attach("prompt_tuning", num_virtual_tokens=5)],
        [attach("prompt_tuning", num_virtual_tokens=5, init_tokens=[3, 1, 4]), NF4],
        [attach("prompt_tuning", num_virtual_tokens=5, init="sample_vocab")],
    ],
    "attach.series_adapter": [
        [attach("series_adapter", placement="houlsby")],
        [attach("series_adapter", placement="before", width=4, init="zero", **ALL)],
    ],
    "layers.select": [
        [slices(FIRST, {"model": "a", "layers": [0, 1], "scale": {".*proj.*": 0.3}}, FIRST)],
        [{"op": "layers.select", "keep": [0]}],
        [slices({"model": "a", "layers": [0, 1]}, head="a"), FP4],
    ],
    "merge.arcee_fusion": [[merge("arcee_fusion", ("a",))], [merge("arcee_fusion", ("b",), compute_dtype="source")]],
    "merge.breadcrumbs": [[merge("breadcrumbs", each(density=0.6, gamma=0.05), rescale=True)]],
    "merge.breadcrumbs_ties": [[merge("breadcrumbs_ties", each(density=0.6, gamma=0.05), normalize=True)]],
    "merge.dare_linear": [[merge("dare_linear", each(density=0.4))]],
    "merge.dare_ties": [[merge("dare_ties", each(density=0.4), normalize=True, compute_dtype="source")]],
    "merge.della": [[merge("della", each(density=0.5, epsilon=0.2))]],
    "merge.della_linear": [[merge("della_linear", each(density=0.5, epsilon=0.2), rescale=False)]],
    "merge.karcher": [[merge("karcher", ("source", "a", "b"))], [merge("karcher", compute_dtype="source", max_iter=3)]],
    "merge.linear": [
        [merge("linear", {"source": {"weight": 0.2}, **each()})],
        [merge("linear", each(), normalize=False, compute_dtype="source")],
        [merge("linear", {"source": {"weight": 0.5}, "lora": {"weight": 0.5}}), NF4],
    ],
    "merge.model_stock": [
        [merge("model_stock")],
        [merge("model_stock", filter_wise=True)],
        [merge("model_stock", compute_dtype="source")],
    ],
    "merge.multislerp": [
        [merge("multislerp", each())],
        [merge("multislerp", {"source": {"weight": 0.2}, **each()}, normalize_weights=False, compute_dtype="source")],
    ],
    "merge.nearswap": [
        [merge("nearswap", ("a",), t=0.02)],
        [merge("nearswap", ("a",), t=0.02, compute_dtype="source")],
    ],
    "merge.nuslerp": [
        [merge("nuslerp", each())],
        [merge("nuslerp", {"source": {"weight": 0.4}, "a": {"weight": 0.6}}, nuslerp_flatten=False)],
        [merge("nuslerp", each(), nuslerp_flatten=False, nuslerp_row_wise=True, compute_dtype="source")],
    ],
    "merge.ram": [[merge("ram", epsilon=0.01)], [merge("ram", compute_dtype="source")]],
    "merge.ramplus": [[merge("ramplus", epsilon=0.01, r=0.3)]],
    "merge.sce": [[merge("sce", select_topk=0.3)], [merge("sce", select_topk=DEPTH, compute_dtype="source")]],
    "merge.slerp": [
        [merge("slerp", ("a",), t=DEPTH)],
        [merge("slerp", ("a",), t=0.3, compute_dtype="source"), {**NF4, "double_quant": False}],
        [fold(), {**merge("slerp", ("lora",), t=0.5), "tensors": ".*proj.*"}],
    ],
    "merge.task_arithmetic": [
        [merge("task_arithmetic", each(), **{"lambda": 0.8})],
        [merge("task_arithmetic", each(), normalize=True, compute_dtype="source")],
    ],
    "merge.ties": [
        [merge("ties", each(density=0.3))],
        [merge("ties", each(density={".*proj.*": 0.5, ".*": 1.0}), rescale=True, compute_dtype="source")],
        [merge("ties", {"a": {"weight": 0.7, "density": 0.4}, "lora": {"weight": 0.5, "density": 0.6}}), NF4],
    ],
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


CONFIGS: dict[str, dict[str, Any]] = {
    "llama": {
        "model_type": "llama",
        "architectures": ["LlamaForCausalLM"],
        "vocab_size": 40,
        "hidden_size": 99,
        "num_hidden_layers": 1,
        "num_attention_heads": 3,
        "num_key_value_heads": 1,
    },
    "gpt2": {
        "model_type": "gpt2",
        "architectures": ["GPT2LMHeadModel"],
        "vocab_size": 40,
        "n_embd": 99,
        "n_layer": 1,
        "n_head": 3,
    },
}


def sources_for(name: str, index: int) -> tuple[str, ...]:
    """The kinds of source that a case is applied to: both, or one after the other for ops on several models."""
    if not name.startswith(("adapter.", "layers.", "merge.")):
        return ("llama", "gpt2")
    return ("llama", "gpt2-bf16")[index % 2 : index % 2 + 1] if index else ("llama", "gpt2-bf16")


every_op = pytest.mark.parametrize("name", op_names())
every_op_on_tensors = pytest.mark.parametrize(
    "name", [name for name in op_names() if not issubclass(find_op(name), Attach)]
)
every_source = pytest.mark.parametrize("source", ["llama", "gpt2"], indirect=True)
every_case = pytest.mark.parametrize(
    ("name", "edits", "source"),
    [
        pytest.param(name, edits, source, id=f"{source}-{name}-{index}")
        for name, cases in CASES.items()
        for index, edits in enumerate(cases)
        for source in sources_for(name, index)
    ],
    indirect=["source"],
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


def tuned(tensors: Mapping[str, Tensor], seed: int) -> dict[str, Tensor]:
    """Few distinct differences, so that many tie wherever a merge ranks them; none at all in a tenth."""
    generator = torch.Generator().manual_seed(seed)
    steps = {name: torch.randint(-9, 10, x.shape, generator=generator) / 64 for name, x in tensors.items()}
    kept = {name: torch.rand(x.shape, generator=generator) > 0.1 for name, x in tensors.items()}
    return {name: (x.float() + steps[name] * kept[name]).to(x.dtype) for name, x in tensors.items()}


def save(path: Path, tensors: Mapping[str, Tensor], config: Mapping[str, object], stem: str = "model") -> None:
    path.mkdir()
    save_file({name: x.contiguous() for name, x in tensors.items()}, path / f"{stem}.safetensors")
    (path / ("config.json" if stem == "model" else f"{stem.partition('_')[0]}_config.json")).write_text(
        json.dumps(config)
    )


def save_adapter(
    path: Path, modules: Mapping[str, tuple[int, int]], ranks: tuple[int, int], seed: int, **config: object
) -> None:
    """A LoRA as PEFT saves it, of two modules, each [out, in]."""
    generator = torch.Generator().manual_seed(seed)
    tensors: dict[str, Tensor] = {}
    for (module, (rows, columns)), rank in zip(modules.items(), ranks, strict=True):
        prefix = f"base_model.model.{module}"
        tensors[f"{prefix}.lora_A.weight"] = torch.randn(rank, columns, generator=generator) * 0.05
        tensors[f"{prefix}.lora_B.weight"] = torch.randn(rows, rank, generator=generator) * 0.05
        if config.get("use_dora"):
            tensors[f"{prefix}.lora_magnitude_vector"] = torch.rand(rows, generator=generator) + 20
    (last,) = list(modules)[1:]
    pattern = {} if ranks[0] == ranks[1] else {"rank_pattern": {last: ranks[1]}, "alpha_pattern": {last: 3}}
    fields = {"peft_type": "LORA", "r": ranks[0], "lora_alpha": 6, "target_modules": list(modules)}
    save(path, tensors, {**fields, **pattern, **config}, "adapter_model")


def save_ia3(path: Path, modules: Mapping[str, tuple[int, int]], **config: object) -> None:
    """An (IA)³ that scales what one module reads, and what the other gives."""
    (reads, gives), generator = modules.items(), torch.Generator().manual_seed(0)
    tensors = {
        f"base_model.model.{reads[0]}.ia3_l": torch.rand(1, reads[1][1], generator=generator) + 0.5,
        f"base_model.model.{gives[0]}.ia3_l": torch.rand(gives[1][0], 1, generator=generator) + 0.5,
    }
    fields = {"peft_type": "IA3", "target_modules": list(modules), "feedforward_modules": [reads[0]]}
    save(path, tensors, {**fields, **config}, "adapter_model")


@pytest.fixture(scope="module")
def source(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A large Linear or Conv1D, one with an odd number of elements, a bias and a norm; beside it further models."""
    model_type, _, dtype = request.param.partition("-")
    path = tmp_path_factory.mktemp("contract") / "source"
    is_conv1d = model_type == "gpt2"
    names = ("transformer.h.0.mlp.c_fc", "transformer.h.0.mlp.c_proj", "transformer.wte")
    if not is_conv1d:
        names = ("model.layers.0.mlp.up_proj", "model.layers.0.self_attn.q_proj", "model.embed_tokens")
    tensors = {
        f"{names[2]}.weight": torch.randn(40, 99, generator=torch.Generator().manual_seed(1)),
        f"{names[0]}.weight": hostile(*LARGE),
        f"{names[0]}.bias": torch.randn(700, generator=torch.Generator().manual_seed(0)),
        f"{names[1]}.weight": hostile(83, 99),
        "norm.weight": torch.randn(99, generator=torch.Generator().manual_seed(0)),
    }
    tensors = {name: x.bfloat16() if dtype else x for name, x in tensors.items()}
    config = CONFIGS[model_type]
    save(path, tensors, config)
    save(path.parent / "a", tuned(tensors, 1), config)
    save(path.parent / "b", tuned(tensors, 2), config)
    shapes = [LARGE[::-1], (99, 83)] if is_conv1d else [LARGE, (83, 99)]
    modules = dict(zip(names[:2], shapes, strict=True))
    save_adapters(path.parent, modules, fan_in_fan_out=is_conv1d)
    return path


def save_adapters(home: Path, modules: Mapping[str, tuple[int, int]], **config: object) -> None:
    save_adapter(home / "lora", modules, (RANK, 4), 1, **config)
    save_adapter(home / "lora2", modules, (RANK, 4), 2, **config)
    save_adapter(home / "dora", modules, (4, 4), 3, use_dora=True, **config)
    save_adapter(home / "plain", modules, (4, 4), 4, **config)
    save_ia3(home / "ia3", modules, **config)
    to_hub = plan_of(home / "source", CASES["adapter.convert"][0])
    surgery.apply(to_hub, home / "hub")


STARTS = {"adapterhub": "plain", "peft": "hub"}  # what is converted


def plan_of(source: Path, edits: list[dict[str, Any]]) -> Any:
    """The plan, with every model that an edit names from beside the source; an op on adapters has one as source."""
    ops = [op_of(edit) for edit in edits]
    names = {name for op in ops for name in op.model_names()} - {"source"}
    if edits and edits[0]["op"] == "adapter.combine":
        source = source.parent / "lora"
    if edits and edits[0]["op"] == "adapter.convert":
        source = source.parent / STARTS[edits[0]["to"]]
    models = {name: str(source.parent / name) for name in sorted(names)}
    return surgery.plan({"version": 1, "source": str(source), "models": models, "edits": edits})


def op_of(edit: dict[str, Any]) -> Op:
    op = find_op(edit["op"])
    return op(**{option.field: edit[option.key] for option in options_of(op) if option.key in edit})


def read(directory: Path) -> dict[str, Tensor]:
    """Every tensor of a checkpoint, and of the adapters beside it by their names in the plan."""
    if directory.is_file():
        return read_file(directory)
    tensors: dict[str, Tensor] = {}
    for path in directory.glob("**/*.safetensors"):
        parts = path.relative_to(directory).parts[:-1]
        tensors |= {"/".join((*parts, name)): x for name, x in read_file(path).items()}
    return tensors


def read_file(path: Path) -> dict[str, Tensor]:
    with safe_open(path, "pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118, no mapping


Tensors = Mapping[tuple[str, str], Tensor]  # by model and name


def tensors_of(plan: Any) -> Tensors:
    """Every tensor of every model of a plan."""
    checkpoints = plan.checkpoints.items()
    return {(model, name): x for model, checkpoint in checkpoints for name, x in read(checkpoint.home.path).items()}


def evaluate(node: Node, tensors: Tensors) -> Tensor:
    """The reference: whole tensors, kernel after kernel."""
    if isinstance(node.kernel, Source):
        return tensors[node.kernel.model, node.kernel.name]
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
    plan = plan_of(source, edits)
    tensors = tensors_of(plan)
    for tensor in plan.tensors:
        assert type_of(evaluate(tensor.node, tensors)) == tensor.node.type, tensor.name
    for node in toposort(tensor.node for tensor in plan.tensors):
        assert node.kernel.infer(*(child.type for child in node.inputs))[node.port] == node.type


@every_case
def test_what_is_streamed_is_what_the_reference_produces(
    name: str, edits: list[dict[str, Any]], source: Path, tmp_path: Path
) -> None:
    plan = plan_of(source, edits)
    tensors = tensors_of(plan)
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
    small, large = (
        {
            path.relative_to(tmp_path / name): path.read_bytes()
            for path in (tmp_path / name).rglob("*")
            if path.is_file()
        }
        for name in ("small", "large")
    )
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
    leaves_a_rest = any(edit.get("init") == "pissa" for edit in edits)
    for tensor, entry in manifest.tensors.items():
        if entry["sources"] != [tensor] or leaves_a_rest:
            continue
        error = (loaded[tensor].double() - reads[tensor].double()).abs()
        assert ("error" in entry) >= bool(error.max()), f"{tensor} is rounded, and the manifest does not say so"
        if "error" in entry:
            stated: Any = entry["error"]
            assert stated["max"] == pytest.approx(float(error.max()), rel=1e-5), tensor
            assert stated["rms"] == pytest.approx(float(error.square().mean().sqrt()), rel=1e-5), tensor


@every_source
@pytest.mark.parametrize("quantize", [NF4, {**FP4, "double_quant": False}], ids=["nf4", "fp4"])
def test_what_is_quantized_after_a_merge_errs_from_the_merge(
    quantize: dict[str, Any], source: Path, tmp_path: Path
) -> None:
    """Not from the source, of which little is left."""
    edit = merge("ties", each(density=0.3))
    manifest = surgery.apply(plan_of(source, [edit, quantize]), tmp_path / "out")
    surgery.apply(plan_of(source, [edit]), tmp_path / "merged")
    surgery.apply(plan_of(tmp_path / "out", [{"op": "quantize.dequantize", **ALL}]), tmp_path / "back")
    merged, back = read(tmp_path / "merged"), read(tmp_path / "back")
    stated: dict[str, Any] = {name: entry["error"] for name, entry in manifest.tensors.items() if "error" in entry}
    assert len(stated) == 2
    for name, error in stated.items():
        off = (back[name].double() - merged[name].double()).abs()
        assert error["max"] == pytest.approx(float(off.max()), rel=1e-5), name
        assert error["rms"] == pytest.approx(float(off.square().mean().sqrt()), rel=1e-5), name


@every_source
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


Rewrites = tuple[list[Rewrite], list[Problem]]


@every_op_on_tensors
@every_source
def test_an_op_that_lets_a_tensor_vanish_is_found_out(name: str, source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rewrites_of = threading._rewrites

    def forgetful(edit: Edit, scene: Scene) -> Rewrites:
        rewrites, problems = rewrites_of(edit, scene)
        if edit.op.name == name:
            rewrites = [Rewrite(rewrite.takes, {}) for rewrite in rewrites]
        return rewrites, problems

    monkeypatch.setattr(threading, "_rewrites", forgetful)
    with pytest.raises(surgery.ConservationError, match="would vanish"):
        plan_of(source, CASES[name][0])


@every_op_on_tensors
@every_source
def test_an_op_that_lets_one_of_several_tensors_vanish_is_found_out(
    name: str, source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A node in the place of a tensor must be computed from it."""
    rewrites_of = threading._rewrites

    def confused(edit: Edit, scene: Scene) -> Rewrites:
        rewrites, problems = rewrites_of(edit, scene)
        first = scene.names[rewrites[0].takes[0]]
        if edit.op.name == name:
            rewrites = [Rewrite(done.takes, dict.fromkeys(done.gives or done.takes, first)) for done in rewrites]
        return rewrites, problems

    monkeypatch.setattr(threading, "_rewrites", confused)
    edits = CASES[name][0]
    if name == "tensor.drop":
        edits = [{"op": "tensor.drop", "tensors": ".*"}]
    with pytest.raises(surgery.ConservationError, match="would vanish"):
        plan_of(source, edits)


@every_source
def test_an_adapter_that_takes_its_values_from_a_weight_must_leave_the_weight(
    source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What PiSSA takes out of a weight is in the adapter; the rest must stay in the checkpoint."""
    rewrites_of = threading._rewrites

    def forgetful(edit: Edit, scene: Scene) -> Rewrites:
        rewrites, problems = rewrites_of(edit, scene)
        return [Rewrite(rewrite.takes, {}, adds=rewrite.adds) for rewrite in rewrites], problems

    monkeypatch.setattr(threading, "_rewrites", forgetful)
    with pytest.raises(surgery.ConservationError, match="would vanish"):
        plan_of(source, [attach("lora", init="pissa")])


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
