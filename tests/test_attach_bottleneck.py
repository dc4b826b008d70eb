"""`attach.series_adapter`, `attach.parallel_adapter`: AdapterHub's library and surgery.runtime load what they write."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import models
import pytest
import torch
import transformers
from peers.adapterhub import adapters_python, run_jobs
from peft import PeftModel
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import surgery
from surgery import runtime
from surgery.errors import OpError, SpecError
from surgery.formats.adapterhub.bottleneck import reduction_factor, width_of

IDS = torch.tensor([[3, 4, 5, 6, 7, 8], [9, 8, 7, 6, 5, 4]])
F32 = torch.float32
CLASSES = {
    "llama": "LlamaForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "gpt2": "GPT2LMHeadModel",
    "bert": "BertForMaskedLM",
    "t5": "T5ForConditionalGeneration",
}
SERIES, PARALLEL = "attach.series_adapter", "attach.parallel_adapter"
GATE_UP_DOWN = r".*\.mlp\.(gate|up|down)_proj"


@dataclass(frozen=True)
class Case:
    """An edit whose adapter AdapterHub's library loads."""

    model: str
    op: str = SERIES
    options: Mapping[str, Any] = field(default_factory=dict)


CASES = {f"{model}-seq": Case(model) for model in CLASSES}
CASES |= {f"{model}-double": Case(model, SERIES, {"placement": "houlsby", "width": 7}) for model in CLASSES}
CASES |= {f"{model}-par": Case(model, PARALLEL, {"reduction_factor": 5}) for model in CLASSES}
CASES |= {
    "llama-layer": Case("llama", SERIES, {"modules": r"model\.layers\.1\..*", "activation": "gelu_new", "scaling": 2}),
    "t5-decoder": Case("t5", PARALLEL, {"modules": r"decoder\.block\..*", "scaling": 0.5, "init": "bert"}),
}


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("bases")
    for name in CLASSES:
        getattr(models, name)(root / name, dtype=F32)
    return root


def attached(base: Path, op: str, directory: Path, *before: Mapping[str, Any], **options: Any) -> Path:
    edit = {"op": op, "name": "new", **options}
    seed = edit.pop("seed", 0)
    spec = {"version": 1, "source": str(base), "edits": [*before, edit], "seed": seed}
    surgery.apply(surgery.plan(spec), directory)
    return directory / "adapters" / "new"


@dataclass(frozen=True)
class World:
    """Every case twice, as an edit makes it with `init: zero`, and with random weights; and what the library says."""

    root: Path
    answers: Mapping[str, dict[str, Any]]

    def logits(self, name: str) -> Tensor:
        return load_file(self.root / f"{name}.safetensors")["logits"]


@pytest.fixture(scope="module")
def world(bases: Path, tmp_path_factory: pytest.TempPathFactory) -> World:
    adapters_python()
    root = tmp_path_factory.mktemp("attached")
    names = [f"{name}.{kind}" for name in CASES for kind in ("zero", "random")]
    for name in names:
        case = CASES[name.partition(".")[0]]
        options = {**case.options, **({"init": "zero"} if name.endswith("zero") else {})}
        directory = attached(bases / case.model, case.op, root / name, **options)
        if name.endswith("random"):
            randomize(directory / "adapter.safetensors")
    jobs = [
        {
            "do": "load",
            "class": CLASSES[CASES[name.partition(".")[0]].model],
            "base": str(bases / CASES[name.partition(".")[0]].model),
            "adapter": str(root / name / "adapters" / "new"),
            "logits": str(root / f"{name}.safetensors"),
        }
        for name in names
    ]
    return World(root, dict(zip(names, run_jobs(jobs, root), strict=True)))


def randomize(file: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    tensors = load_file(file)
    save_file({name: 0.3 * torch.randn(tensor.shape, generator=generator) for name, tensor in tensors.items()}, file)


def loaded(bases: Path, name: str) -> nn.Module:
    return getattr(transformers, CLASSES[name]).from_pretrained(bases / name, dtype=F32).eval()


@torch.no_grad()
def logits(model: nn.Module) -> Tensor:
    inputs = {"input_ids": IDS, "attention_mask": torch.ones_like(IDS)}
    if model.config.is_encoder_decoder:
        inputs["decoder_input_ids"] = IDS[:, :4]
    return model(**inputs).logits


def assert_close(a: Tensor, b: Tensor) -> None:
    torch.testing.assert_close(a, b, rtol=2e-5, atol=2e-5 * float(b.abs().max()))


@pytest.mark.parametrize("name", CASES)
def test_adapterhub_loads_every_tensor_and_nothing_is_missing(name: str, world: World) -> None:
    expected = {"name": "new", "warned": [], "missing_keys": [], "unexpected_keys": []}
    assert world.answers[f"{name}.zero"] == world.answers[f"{name}.random"] == expected


@pytest.mark.parametrize("name", CASES)
def test_what_begins_as_zero_changes_nothing_in_adapterhub(name: str, bases: Path, world: World) -> None:
    assert_close(world.logits(f"{name}.zero"), logits(loaded(bases, CASES[name].model)))


@pytest.mark.parametrize("name", CASES)
def test_adapterhub_and_the_runtime_compute_the_same(name: str, bases: Path, world: World) -> None:
    model = loaded(bases, CASES[name].model)
    before = logits(model)
    runtime.attach(model, world.root / f"{name}.random" / "adapters" / "new")
    assert_close(world.logits(f"{name}.random"), logits(model))
    assert (before - logits(model)).abs().max() > 1e-3 * before.abs().max()


def test_the_config_is_what_the_library_saves(bases: Path, tmp_path: Path) -> None:
    """Field for field; its own `model_name` is a path, which surgery never writes."""
    methods = {
        "SeqBnConfig": (SERIES, {}),
        "DoubleSeqBnConfig": (SERIES, {"placement": "houlsby"}),
        "ParBnConfig": (PARALLEL, {}),
    }
    jobs = [
        {
            "do": "make",
            "class": CLASSES[model],
            "base": str(bases / model),
            "config_class": config_class,
            "config": {},
            "adapter": str(tmp_path / f"{model}-{config_class}"),
            "with_head": False,
            "logits": str(tmp_path / "logits.safetensors"),
        }
        for model in CLASSES
        for config_class in methods
    ]
    run_jobs(jobs, tmp_path)
    for job in jobs:
        op, options = methods[job["config_class"]]
        name = Path(job["adapter"]).name
        ours = attached(Path(job["base"]), op, tmp_path / f"ours-{name}", **options)
        config, theirs = (json.loads((path / "adapter_config.json").read_text()) for path in (ours, tmp_path / name))
        assert {**config, "name": "made", "model_name": theirs["model_name"]} == theirs
        assert {
            key.replace(".made.", ".new."): tensor.shape
            for key, tensor in load_file(tmp_path / name / "adapter.safetensors").items()
        } == {key: tensor.shape for key, tensor in load_file(ours / "adapter.safetensors").items()}


@pytest.mark.parametrize(("op", "placement"), [(SERIES, "before"), (SERIES, "after"), (PARALLEL, "linear")])
@pytest.mark.parametrize("model", ["llama", "gpt2"])
def test_adapters_at_linears_attach_whole(model: str, op: str, placement: str, bases: Path, tmp_path: Path) -> None:
    """That the runtime computes the published forward is tested with it; here, that every tensor finds its place."""
    modules = GATE_UP_DOWN if model == "llama" else r".*\.mlp\.c_(fc|proj)"
    options = {"placement": placement, "modules": modules, "width": 8}
    directory = attached(bases / model, op, tmp_path / "new", **options)
    live = loaded(bases, model)
    before = logits(live)
    runtime.attach(live, directory)
    assert not torch.equal(logits(live), before)
    zero = attached(bases / model, op, tmp_path / "zero", init="zero", **options)
    other = loaded(bases, model)
    runtime.attach(other, zero)
    assert torch.equal(logits(other), before)


def test_hu_et_al_is_the_default_at_linears(bases: Path, tmp_path: Path) -> None:
    models.llama(tmp_path / "base", hidden_size=256, intermediate_size=384, num_hidden_layers=1)
    directory = attached(tmp_path / "base", PARALLEL, tmp_path / "out", placement="linear", modules=r".*gate_proj")
    config = json.loads((directory / "adapter_config.json").read_text())
    assert config == {
        "adapter_type": "surgery",
        "version": 1,
        "name": "new",
        "method": "bottleneck",
        "placement": "parallel",
        "modules": ["model.layers.0.mlp.gate_proj"],
        "width": 256,
        "activation": "tanh",
        "scaling": 1.0,
        "bias": False,
        "base_model_name_or_path": None,
        "revision": None,
    }
    tensors = load_file(directory / "adapter_model.safetensors")
    assert {key: tuple(tensor.shape) for key, tensor in tensors.items()} == {
        "model.layers.0.mlp.gate_proj.adapter_down.weight": (256, 256),
        "model.layers.0.mlp.gate_proj.adapter_up.weight": (384, 256),
    }
    for tensor in tensors.values():
        assert abs(float(tensor.std()) - 0.02) < 0.001


def test_peers_refuse_the_own_layout(bases: Path, tmp_path: Path) -> None:
    directory = attached(bases / "llama", PARALLEL, tmp_path / "out", placement="linear", modules=GATE_UP_DOWN, width=8)
    with pytest.raises(KeyError, match="peft_type"):
        PeftModel.from_pretrained(loaded(bases, "llama"), str(directory))
    adapters_python()
    job = {"do": "load", "class": CLASSES["llama"], "base": str(bases / "llama"), "adapter": str(directory)}
    with pytest.raises(AssertionError, match="Error"):
        run_jobs([{**job, "logits": str(tmp_path / "logits.safetensors")}], tmp_path)


def test_initial_values_are_a_function_of_seed_and_name(bases: Path, tmp_path: Path) -> None:
    def values(directory: str, **options: Any) -> dict[str, Tensor]:
        made = attached(bases / "llama", SERIES, tmp_path / directory, placement="houlsby", **options)
        return load_file(made / "adapter.safetensors")

    whole, again, other = values("a"), values("b", modules=r".*layers\.1\..*"), values("c", seed=1)
    assert len(again) == 8
    assert all(torch.equal(whole[key], tensor) for key, tensor in again.items())
    weights = [tensor for key, tensor in whole.items() if key.endswith("weight")]
    assert all(not torch.equal(tensor, other[key]) for key, tensor in whole.items() if key.endswith("weight"))
    assert all(0.017 < float(tensor.std()) < 0.023 for tensor in weights)
    assert all(not tensor.any() for key, tensor in whole.items() if key.endswith("bias"))


def test_a_parallel_adapter_begins_as_he_et_al(bases: Path, tmp_path: Path) -> None:
    directory = attached(bases / "llama", PARALLEL, tmp_path / "out")
    for key, tensor in load_file(directory / "adapter.safetensors").items():
        bound = 128**-0.5
        if key.endswith("adapter_down.0.weight"):
            assert 0.95 * bound < float(tensor.abs().max()) <= bound
        else:
            assert not tensor.any()


def test_every_width_comes_out_of_its_reduction_factor() -> None:
    for hidden in (32, 100, 768, 4096):
        for width in {1, 2, 3, 7, hidden // 3, hidden // 2, hidden // 2 + 1, hidden - 1, hidden}:
            assert int(hidden // json.loads(json.dumps(reduction_factor(hidden, width)))) == width
    assert width_of(100, 16) == 6


def test_a_quantized_base_takes_adapters_in_slots_and_at_linears(bases: Path, tmp_path: Path) -> None:
    nf4 = {"op": "quantize.nf4", "modules": "all-linear"}
    linear = {"placement": "linear", "modules": GATE_UP_DOWN, "width": 8}
    plain = attached(bases / "llama", PARALLEL, tmp_path / "plain", **linear)
    same_pass = attached(bases / "llama", PARALLEL, tmp_path / "same", nf4, **linear)
    later = attached(tmp_path / "same", PARALLEL, tmp_path / "later", **linear)
    tensors = load_file(plain / "adapter_model.safetensors")
    for directory in (same_pass, later):
        held = load_file(directory / "adapter_model.safetensors")
        assert held.keys() == tensors.keys()
        assert all(torch.equal(held[key], tensor) for key, tensor in tensors.items())
    slots = attached(tmp_path / "same", SERIES, tmp_path / "slots")
    assert len(load_file(slots / "adapter.safetensors")) == 8


REFUSED: dict[str, tuple[str, str, dict[str, Any], str]] = {
    "norm": ("llama", SERIES, {"placement": "after", "modules": r".*_layernorm"}, "is a norm: adapters are at Linears"),
    "embedding": ("llama", SERIES, {"placement": "after", "modules": r".*embed_tokens"}, "is an embedding"),
    "head": ("llama", PARALLEL, {"placement": "linear", "modules": "lm_head"}, "is an output head"),
    "wide": (
        "llama",
        PARALLEL,
        {"placement": "linear", "modules": r".*k_proj", "width": 65},
        "a width of 65 is no bot",
    ),
    "wide slot": ("llama", SERIES, {"width": 129}, "`width` 129 is no bottleneck of 128 features"),
    "narrow slot": ("llama", SERIES, {"reduction_factor": 200}, "`reduction_factor` 200 makes 0 of 128 features"),
    "no modules": ("llama", SERIES, {"placement": "before"}, "`placement: before` is at single Linears, and none"),
    "no layer": ("llama", SERIES, {"modules": "lm_head"}, "none of the 1 modules selected is in one of the 2 layers"),
    "both": ("llama", SERIES, {"width": 8, "reduction_factor": 2}, "`width` and `reduction_factor` say the same"),
    "factor": ("llama", PARALLEL, {"placement": "linear", "reduction_factor": 2}, "`reduction_factor` is for Adapter"),
    "activation": ("llama", SERIES, {"activation": "prelu"}, "'prelu'"),
    "name": ("llama", SERIES, {"name": "train"}, "`train` cannot be an adapter's name"),
    "architecture": ("mixtral", SERIES, {}, "where the adapters library puts bottlenecks in `mixtral` is not known"),
    "expert": ("mixtral", SERIES, {"placement": "after", "modules": r".*\.w2"}, "is a MoE expert"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_is_refused(name: str, bases: Path, tmp_path: Path) -> None:
    model, op, options, message = REFUSED[name]
    base = models.mixtral(tmp_path / "base") if model == "mixtral" else bases / model
    with pytest.raises((OpError, SpecError)) as raised:
        attached(base, op, tmp_path / "out", **options)
    assert message in str(raised.value)
