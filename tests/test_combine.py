"""`adapter.combine` against PEFT's own `add_weighted_adapter`, and what PEFT opens."""

import json
import math
import re
import warnings
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from models import gpt2, llama, read, same_bytes
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

import surgery
from surgery.errors import OpError, SpecError
from surgery.numerics.lowrank import Mixed, Recipe, ReducedSum
from surgery.types import DType, TensorType

pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning")  # of PEFT, not ours

TARGETS = ["q_proj", "down_proj"]
WEIGHTS = {"source": 0.6, "b": -0.7}
DENSITY = 0.4
EXACT = ["cat", "linear", "svd", "ties", "ties_svd", "magnitude_prune", "magnitude_prune_svd"]
RANDOM = ["dare_linear", "dare_ties", "dare_linear_svd", "dare_ties_svd"]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return llama(tmp_path_factory.mktemp("base") / "llama", dtype=torch.float32, num_hidden_layers=1)


@pytest.fixture(scope="module")
def conv1d_base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return gpt2(tmp_path_factory.mktemp("base") / "gpt2", dtype=torch.float32, n_layer=1)


@pytest.fixture(scope="module")
def adapters(base: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Adapters of one base, as PEFT saves them."""
    root = tmp_path_factory.mktemp("adapters")
    make = partial(lora, base, root)
    return {
        "a": make("a", 1, r=4, lora_alpha=8),
        "b": make("b", 2, r=4, lora_alpha=6),
        "c": make("c", 3, r=3, lora_alpha=3),
        "rs": make("rs", 4, r=4, lora_alpha=8, use_rslora=True),
        "patterned": make("patterned", 5, r=4, rank_pattern={"q_proj": 2}, alpha_pattern={"down_proj": 32}),
        "narrow": make("narrow", 6, r=4, target_modules=["q_proj"]),
        "dora": make("dora", 7, r=4, use_dora=True),
        "saved": make("saved", 8, r=4, modules_to_save=["lm_head"]),
        "biased": make("biased", 9, r=4, bias="all", target_modules=["q_proj"]),
        "embedding": make("embedding", 10, r=4, target_modules=["embed_tokens", "q_proj"]),
        "embedding2": make("embedding2", 11, r=4, target_modules=["embed_tokens", "q_proj"]),
    }


def lora(base: Path, root: Path, name: str, seed: int, **options: Any) -> Path:
    config = LoraConfig(task_type="CAUSAL_LM", **{"target_modules": TARGETS, **options})
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(base), config)
    randomized(model, seed)
    quietly(model.save_pretrained, root / name)
    return root / name


def randomized(model: nn.Module, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if "lora_A" in name or "lora_B" in name or "lora_embedding" in name:
            parameter.data = torch.randn(parameter.shape, generator=generator) * 0.1


def quietly(function: Any, *args: Any, **options: Any) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return function(*args, **options)


def opened(base: Path, adapter: Path) -> Any:
    """The model with the adapter, which must fill every weight of it and nothing else."""
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), adapter)
    result = model.load_adapter(adapter, "again")
    assert not [key for key in result.unexpected_keys if not key.endswith("base_layer.weight")]
    assert not [key for key in result.missing_keys if ".again" in key]
    return model


def peft_combined(base: Path, a: Path, b: Path, method: str, path: Path, **options: Any) -> dict[str, Tensor]:
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), a, "a")
    model.load_adapter(b, "b")
    if method not in ("cat", "linear", "svd"):
        options["density"] = DENSITY
    model.add_weighted_adapter(["a", "b"], list(WEIGHTS.values()), "both", combination_type=method, **options)
    quietly(model.save_pretrained, path, selected_adapters=["both"])
    return read(path / "both")


def edit(method: str, weights: Mapping[str, float] = WEIGHTS, **options: Any) -> dict[str, Any]:
    prunes = method not in ("cat", "linear", "svd")
    models = {name: {"weight": weight, **({"density": DENSITY} if prunes else {})} for name, weight in weights.items()}
    return {"op": "adapter.combine", "models": models, "method": method, **options}


def combined(path: Path, source: Path, models: Mapping[str, Path], *edits: dict[str, Any], seed: int = 0) -> Path:
    others = {name: str(model) for name, model in models.items()}
    spec = {"version": 1, "source": str(source), "models": others, "edits": list(edits), "seed": seed}
    surgery.apply(surgery.plan(spec), path / "out")
    return path / "out"


def deltas(base: Path, adapter: Path) -> dict[str, Tensor]:
    """What PEFT adds to each weight."""
    model = opened(base, adapter)
    layers = {name: module for name, module in model.named_modules() if hasattr(module, "get_delta_weight")}
    return {name: layer.get_delta_weight("default").detach() for name, layer in layers.items()}


@pytest.mark.parametrize("method", EXACT)
def test_methods_without_chance_have_the_bits_of_peft(
    method: str, base: Path, adapters: dict[str, Path], tmp_path: Path
) -> None:
    out = combined(tmp_path, adapters["a"], {"b": adapters["b"]}, edit(method))
    expected = peft_combined(base, adapters["a"], adapters["b"], method, tmp_path)
    tensors = read(out)
    assert tensors.keys() == expected.keys()
    assert all(same_bytes(tensors[name], expected[name]) for name in expected)
    opened(base, out)


@pytest.mark.parametrize("method", ["ties", "ties_svd"])
def test_the_majority_by_frequency_is_that_of_peft(
    method: str, base: Path, adapters: dict[str, Path], tmp_path: Path
) -> None:
    option = {"majority_sign_method": "frequency"}
    out = combined(tmp_path, adapters["a"], {"b": adapters["b"]}, edit(method, **option))
    expected = peft_combined(base, adapters["a"], adapters["b"], method, tmp_path, **option)
    assert all(same_bytes(tensor, expected[name]) for name, tensor in read(out).items())


@pytest.mark.parametrize("method", ["cat", "linear", "ties_svd"])
def test_conv1d_and_embeddings_have_the_bits_of_peft(method: str, conv1d_base: Path, tmp_path: Path) -> None:
    options = {"target_modules": ["c_attn", "c_proj", "wte"], "fan_in_fan_out": True, "r": 3}
    a, b = (quietly(lora, conv1d_base, tmp_path, name, seed, **options) for seed, name in enumerate("ab"))
    out = combined(tmp_path, a, {"b": b}, edit(method))
    expected = quietly(peft_combined, conv1d_base, a, b, method, tmp_path)
    factors = {name: tensor for name, tensor in read(out).items() if "lora_" in name}
    assert {name for name in expected if "lora_" in name} == factors.keys()
    assert any("lora_embedding_A" in name for name in factors)
    assert all(same_bytes(tensor, expected[name]) for name, tensor in factors.items())
    quietly(opened, conv1d_base, out)


def test_adapters_in_short_dtypes_give_what_peft_gives(base: Path, adapters: dict[str, Path], tmp_path: Path) -> None:
    short = {}
    for name, dtype in {"a": torch.bfloat16, "b": torch.float16}.items():
        short[name] = tmp_path / name
        short[name].mkdir()
        save_file(
            {key: value.to(dtype) for key, value in read(adapters[name]).items()},
            short[name] / "adapter_model.safetensors",
        )
        (short[name] / "adapter_config.json").write_text((adapters[name] / "adapter_config.json").read_text())
    out = combined(tmp_path, short["a"], {"b": short["b"]}, edit("svd"))
    expected = peft_combined(base, short["a"], short["b"], "svd", tmp_path)
    assert all(same_bytes(tensor, expected[name]) for name, tensor in read(out).items())
    assert {tensor.dtype for tensor in read(out).values()} == {torch.float32}


@pytest.mark.parametrize("others", [("c",), ("rs",), ("patterned",), ("c", "rs", "patterned")])
def test_cat_is_exactly_the_weighted_sum_whatever_the_ranks_and_scalings(
    others: tuple[str, ...], base: Path, adapters: dict[str, Path], tmp_path: Path
) -> None:
    weights = dict(zip(("source", *others), (0.6, -0.7, 1.5, 1.0), strict=False))
    out = combined(tmp_path, adapters["a"], {name: adapters[name] for name in others}, edit("cat", weights))
    each = [deltas(base, adapters[name]) for name in ("a", *others)]
    for name, delta in deltas(base, out).items():
        expected = sum(weight * one[name] for weight, one in zip(weights.values(), each, strict=True))
        torch.testing.assert_close(delta, expected, rtol=1e-5, atol=1e-6)


def test_cat_cut_to_a_rank_is_the_best_approximation_as_svd_gives_it(
    base: Path, adapters: dict[str, Path], tmp_path: Path
) -> None:
    models = {"b": adapters["b"]}
    (tmp_path / "cat").mkdir()
    (tmp_path / "svd").mkdir()
    cut = combined(tmp_path / "cat", adapters["a"], models, edit("cat", rank=5))
    svd = deltas(base, combined(tmp_path / "svd", adapters["a"], models, edit("svd", rank=5)))
    for name, delta in deltas(base, cut).items():
        torch.testing.assert_close(delta, svd[name], rtol=1e-4, atol=1e-5)
    factors = read(cut)
    for name in (name for name in factors if "lora_A" in name):
        a, b = factors[name], factors[name.replace("lora_A", "lora_B")]
        torch.testing.assert_close(a.norm(dim=1), b.norm(dim=0))  # both sides carry the same weight
        assert (b.gather(0, b.abs().argmax(0, keepdim=True)) > 0).all()


def test_energy_keeps_the_share_it_names_and_no_more(base: Path, adapters: dict[str, Path], tmp_path: Path) -> None:
    out = combined(tmp_path, adapters["a"], {"b": adapters["b"]}, edit("cat", energy=0.9))
    each = [deltas(base, adapters[name]) for name in ("a", "b")]
    tensors = read(out)
    for name, delta in deltas(base, out).items():
        singular = torch.linalg.svdvals(0.6 * each[0][name] - 0.7 * each[1][name]).double().square()
        needed = int((singular.cumsum(0) < 0.9 * singular.sum()).sum()) + 1
        factor = tensors[f"{name}.lora_A.weight"]
        assert int((factor != 0).any(dim=1).sum()) == needed < factor.shape[0]
        assert float(delta.double().square().sum() / singular.sum()) == pytest.approx(
            float(singular[:needed].sum() / singular.sum()), abs=1e-5
        )


def test_rslora_adapters_are_scaled_as_peft_scales_them_alone(
    base: Path, adapters: dict[str, Path], tmp_path: Path
) -> None:
    out = combined(tmp_path, adapters["rs"], {}, edit("svd", {"source": 1.0}))
    alone = deltas(base, adapters["rs"])
    for name, delta in deltas(base, out).items():
        torch.testing.assert_close(delta, alone[name], rtol=1e-4, atol=1e-5)


def test_a_module_that_only_some_have_is_refused_or_combined_from_those(
    base: Path, adapters: dict[str, Path], tmp_path: Path
) -> None:
    models = {"b": adapters["narrow"]}
    with pytest.raises(OpError, match=r"`b` lacks `model.layers.0.mlp.down_proj` of the others"):
        combined(tmp_path, adapters["a"], models, edit("cat"))
    out = combined(tmp_path, adapters["a"], models, edit("cat", missing="skip"))
    config = json.loads((out / "adapter_config.json").read_text())
    assert sorted(config["target_modules"]) == ["model.layers.0.mlp.down_proj", "model.layers.0.self_attn.q_proj"]
    assert len(config["rank_pattern"]) == 1 and config["rank_pattern"] == config["alpha_pattern"]
    a, b, both = (deltas(base, adapter) for adapter in (adapters["a"], adapters["narrow"], out))
    for name, delta in both.items():
        expected = 0.6 * a[name] - (0.7 * b[name] if name in b else 0)
        torch.testing.assert_close(delta, expected, rtol=1e-5, atol=1e-6)


def test_an_embedding_that_peft_saved_beside_its_factors_is_kept(
    base: Path, adapters: dict[str, Path], tmp_path: Path
) -> None:
    out = combined(tmp_path, adapters["embedding"], {"b": adapters["embedding2"]}, edit("cat"))
    copies = [name for name in read(adapters["embedding"]) if name.endswith("base_layer.weight")]
    assert copies and all(same_bytes(read(out)[name], read(adapters["embedding"])[name]) for name in copies)


@pytest.mark.parametrize("method", RANDOM)
def test_random_masks_are_a_function_of_the_seed(
    method: str, base: Path, adapters: dict[str, Path], tmp_path: Path
) -> None:
    written = []
    for run, seed in enumerate((0, 0, 1)):
        torch.manual_seed(run)  # the global generator has no part in it
        (tmp_path / str(run)).mkdir()
        written.append(
            read(combined(tmp_path / str(run), adapters["a"], {"b": adapters["b"]}, edit(method), seed=seed))
        )
    assert all(same_bytes(written[0][name], written[1][name]) for name in written[0])
    assert not any(torch.equal(written[0][name], written[2][name]) for name in written[0])


@pytest.mark.parametrize("elects", [False, True])
def test_random_pruning_has_the_distribution_of_peft(elects: bool) -> None:
    tensors = [torch.full((200, 200), 2.0), torch.full((200, 200), 1.0)]
    recipe = Recipe((1.0, 3.0), "random", (0.25, 0.5), ("one", "two"), elects)
    (ours,) = Mixed(recipe).run(*tensors)
    torch.manual_seed(0)
    pruned = [
        peft.utils.merge_utils.prune(t, d, "random", rescale=True) for t, d in zip(tensors, (0.25, 0.5), strict=True)
    ]
    theirs = 1.0 * pruned[0] + 3.0 * pruned[1]
    if elects:
        theirs /= ((pruned[0] != 0).float() + (pruned[1] != 0)).clamp(min=1)
    values, counts = ours.unique(return_counts=True)
    expected, expected_counts = theirs.unique(return_counts=True)
    torch.testing.assert_close(values, expected)
    torch.testing.assert_close(counts / ours.numel(), expected_counts / ours.numel(), atol=0.02, rtol=0)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_nan_is_named_with_its_adapter(value: float) -> None:
    a, b = torch.ones(2, 3), torch.ones(3, 2)
    bad = torch.tensor([[1.0, 1.0], [1.0, value], [1.0, 1.0]])
    with pytest.raises(ValueError, match=r"factor B of adapter 2 of 2 holds a NaN or Inf at \[1, 1\]"):
        ReducedSum((1.0, 1.0), 2).run(a, b, a, bad)
    with pytest.raises(ValueError, match="adapter 1 of 2 holds a NaN or Inf"):
        Mixed(Recipe((1.0, 1.0))).run(bad, b)


def test_of_equal_magnitudes_the_first_are_kept() -> None:
    x = torch.tensor([1.0, -2.0, 1.0, -1.0, 3.0, 1.0])
    (kept,) = Mixed(Recipe((1.0,), "magnitude", (2 / 3,))).run(x)
    assert kept.tolist() == [1.0, -2.0, 1.0, 0.0, 3.0, 0.0]


def test_the_sum_of_a_convolution_keeps_its_shape() -> None:
    a, b = torch.randn(3, 5, 3, 3), torch.randn(7, 3, 1, 1)
    kernel = ReducedSum((2.0,), 3)
    types = kernel.infer(*(TensorType(DType.F32, tuple(tensor.shape)) for tensor in (a, b)))
    factors = kernel.run(a, b)
    assert [tuple(factor.shape) for factor in factors] == [type_.shape for type_ in types]
    product = factors[1].flatten(1) @ factors[0].flatten(1)
    torch.testing.assert_close(product, 2 * b.flatten(1) @ a.flatten(1), rtol=1e-4, atol=1e-5)
    error = kernel.measure((a, b), factors)
    assert error is not None and error.max_abs < 1e-4


def test_the_manifest_says_what_the_rank_leaves_out(base: Path, adapters: dict[str, Path], tmp_path: Path) -> None:
    out = combined(tmp_path, adapters["a"], {"b": adapters["b"]}, edit("svd"))
    a, b, both = (deltas(base, adapter) for adapter in (adapters["a"], adapters["b"], out))
    manifest = json.loads((out / "surgery-manifest.json").read_text())
    for name, delta in both.items():
        error = 0.6 * a[name] - 0.7 * b[name] - delta
        said = manifest["tensors"][f"{name}.lora_A.weight"]["error"]
        assert said["max"] == pytest.approx(float(error.abs().max()), rel=1e-3)
        assert said["rms"] == pytest.approx(float(error.square().mean().sqrt()), rel=1e-3)


REFUSED = {
    "dora": ("cat", r"`b` is DoRA.*use_dora"),
    "saved": ("cat", r"`b` holds whole modules.*modules_to_save"),
    "biased": ("cat", r"`b` holds biases"),
    "c": ("linear", r"\(and 1 more modules like it\) cannot be combined: `linear` adds.*rank 4 in `source`, 3 in `b`"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_no_sum_of_factors_is_refused(name: str, adapters: dict[str, Path], tmp_path: Path) -> None:
    method, message = REFUSED[name]
    with pytest.raises(OpError, match=message):
        combined(tmp_path, adapters["a"], {"b": adapters[name]}, edit(method))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"peft_type": "IA3"}, "`b` is IA3, not LORA"),
        ({"init_lora_weights": "pissa_niter_4"}, "initialised with pissa_niter_4"),
        ({"target_parameters": ["experts.gate_up_proj"]}, "targets parameters of fused experts"),
        ({"r": 5}, r"`model.layers.0.* of `b` has rank 4, .* config says 5"),
        ({"rank_pattern": {"(": 3}}, "is no regex"),
    ],
)
def test_a_config_that_does_not_fit_is_refused(
    change: dict[str, Any], message: str, adapters: dict[str, Path], tmp_path: Path
) -> None:
    copy = changed(adapters["b"], tmp_path / "b", change)
    with pytest.raises(OpError, match=message):
        combined(tmp_path, adapters["a"], {"b": copy}, edit("cat"))


def test_a_tensor_that_is_no_factor_is_named(adapters: dict[str, Path], tmp_path: Path) -> None:
    copy = changed(adapters["b"], tmp_path / "b", {}, {"base_model.model.lm_head.weight": torch.zeros(3)})
    with pytest.raises(
        OpError, match=re.escape("`b` holds `base_model.model.lm_head.weight`, which is no LoRA factor")
    ):
        combined(tmp_path, adapters["a"], {"b": copy}, edit("cat"))


def test_a_checkpoint_is_no_adapter(base: Path, adapters: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(OpError, match="`b` is no adapter directory"):
        combined(tmp_path, adapters["a"], {"b": base}, edit("cat"))


def changed(adapter: Path, copy: Path, config: dict[str, Any], tensors: Mapping[str, Tensor] | None = None) -> Path:
    copy.mkdir()
    save_file({**read(adapter), **(tensors or {})}, copy / "adapter_model.safetensors")
    content = json.loads((adapter / "adapter_config.json").read_text())
    (copy / "adapter_config.json").write_text(json.dumps({**content, **config}))
    return copy


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"models": {"b": {}}}, "`models` lacks `source`"),
        ({"method": "linear", "rank": 3}, "`rank` has no use with `linear`"),
        ({"method": "svd", "energy": 0.9}, "`energy` has no use with `svd`"),
        ({"models": {"source": {"density": 0.5}, "b": {}}}, "`density` has no use with `cat`"),
        ({"method": "ties", "models": {"source": {"density": 0.5}, "b": {}}}, "needs a `density` for `b`"),
    ],
)
def test_options_without_use_are_refused(options: dict[str, Any], message: str, adapters: dict[str, Path]) -> None:
    used = {"op": "adapter.combine", "models": {"source": {}, "b": {}}, **options}
    spec = {"version": 1, "source": str(adapters["a"]), "models": {"b": str(adapters["b"])}, "edits": [used]}
    with pytest.raises(SpecError, match=message):
        surgery.plan(spec)


def test_a_rank_beyond_the_module_is_the_modules_own(base: Path, adapters: dict[str, Path], tmp_path: Path) -> None:
    out = combined(tmp_path, adapters["a"], {"b": adapters["b"]}, edit("svd", rank=1000))
    ranks = {name: tensor.shape[0] for name, tensor in read(out).items() if "lora_A" in name}
    assert set(ranks.values()) == {128}
    assert math.isclose(json.loads((out / "adapter_config.json").read_text())["lora_alpha"], 128)
    opened(base, out)
