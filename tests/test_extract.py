"""`adapter.extract`: adapters that PEFT opens, as near to the fine-tuned model as their rank allows."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from models import bert, gpt2, llama, read, same_bytes, t5
from peft import PeftModel
from safetensors.torch import save_file
from test_combine import deltas, lora, opened, quietly
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoModelForMaskedLM, AutoModelForSeq2SeqLM

import surgery
from surgery.errors import OpError, SpecError
from surgery.numerics.lowrank import LowRankDifference
from surgery.types import DType, TensorType

pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning")  # of PEFT, not ours

PROJECTIONS = r".*\.(q_proj|down_proj)"


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return llama(tmp_path_factory.mktemp("base") / "llama", dtype=torch.float32, num_hidden_layers=1)


@pytest.fixture(scope="module")
def adapter(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return lora(base, tmp_path_factory.mktemp("adapters"), "a", 1, r=4, lora_alpha=8)


@pytest.fixture(scope="module")
def tuned(base: Path, adapter: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The base with the adapter folded in."""
    path = tmp_path_factory.mktemp("tuned") / "llama"
    PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), adapter).merge_and_unload().save_pretrained(
        path
    )
    return path


@pytest.fixture(scope="module")
def noisy(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The base with every weight changed a little: a difference of full rank."""
    return perturbed(base, tmp_path_factory.mktemp("noisy") / "llama")


def perturbed(base: Path, path: Path, dtype: torch.dtype | None = None) -> Path:
    generator = torch.Generator().manual_seed(7)
    path.mkdir(parents=True)
    tensors = {}
    for name, tensor in read(base).items():
        change = torch.randn(tensor.shape, generator=generator) * 0.01
        tensors[name] = (tensor.float() + change).to(dtype or tensor.dtype)
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
    (path / "config.json").write_text((base / "config.json").read_text())
    return path


def spec_of(base: Path, tuned: Path, **options: Any) -> dict[str, Any]:
    edit = {"op": "adapter.extract", "models": "tuned", "modules": PROJECTIONS, **options}
    return {"version": 1, "source": str(base), "models": {"tuned": str(tuned)}, "edits": [edit]}


def extracted(path: Path, base: Path, tuned: Path, **options: Any) -> Path:
    surgery.apply(surgery.plan(spec_of(base, tuned, **options)), path / "out")
    return path / "out"


def difference(base: Path, tuned: Path, module: str) -> Tensor:
    return read(tuned)[f"{module}.weight"].float() - read(base)[f"{module}.weight"].float()


def best_error(delta: Tensor, rank: int) -> float:
    """Of all matrices of the rank (Eckart-Young), in the Frobenius norm."""
    return float(torch.linalg.svdvals(delta.double())[rank:].square().sum().sqrt())


def modules_of(adapter: Path) -> list[str]:
    names = (name.removeprefix("base_model.model.") for name in read(adapter))
    return [name.removesuffix(".lora_A.weight") for name in names if name.endswith(".lora_A.weight")]


def test_what_an_adapter_added_is_extracted_again(base: Path, adapter: Path, tuned: Path, tmp_path: Path) -> None:
    out = extracted(tmp_path, base, tuned, rank=4)
    added = deltas(base, adapter)
    found = deltas(base, out)
    assert found.keys() == added.keys()
    for name, delta in found.items():
        torch.testing.assert_close(delta, added[name], rtol=0, atol=1e-5)


@pytest.mark.parametrize("options", [{"rank": 8}, {"rank": 8, "alpha": 2}, {"rank": 8, "svd": "exact"}])
def test_the_error_is_that_of_the_best_approximation_of_the_rank(
    options: dict[str, Any], base: Path, noisy: Path, tmp_path: Path
) -> None:
    out = extracted(tmp_path, base, noisy, **options)
    manifest = json.loads((out / "surgery-manifest.json").read_text())
    for name, found in deltas(base, out).items():
        delta = difference(base, noisy, name.removeprefix("base_model.model."))
        error = delta - found
        assert float(error.double().norm()) == pytest.approx(best_error(delta, 8), rel=1e-4)
        said = manifest["tensors"][f"{name}.lora_A.weight"]["error"]
        assert said["max"] == pytest.approx(float(error.abs().max()), rel=1e-3)
        assert said["rms"] == pytest.approx(float(error.square().mean().sqrt()), rel=1e-3)


def kernel(rank: int, **options: Any) -> LowRankDifference:
    defaults: dict[str, Any] = {"scaling": 1.0, "transposed": False, "dtype": DType.F32, "method": "auto", "draw": "x"}
    return LowRankDifference(rank, **{**defaults, **options})


@pytest.mark.parametrize(("decay", "tolerance"), [(0.0, 0.01), (-0.5, 1e-3), (-2.0, 1e-3)])
def test_a_random_sketch_is_within_a_percent_of_the_best(decay: float, tolerance: float) -> None:
    torch.manual_seed(0)
    left, right = (torch.linalg.qr(torch.randn(600, 400))[0] for _ in range(2))
    delta = left * torch.arange(1, 401).pow(decay) @ right[:400].T
    zero = torch.zeros_like(delta)
    for rank in (4, 32):
        a, b = kernel(rank, method="randomized").run(zero, delta)
        error = float((delta - b @ a).norm())
        assert best_error(delta, rank) * 0.9999 <= error <= best_error(delta, rank) * (1 + tolerance)
        again = kernel(rank, method="randomized").run(zero, delta)
        other = kernel(rank, method="randomized", draw="y").run(zero, delta)
        assert same_bytes(a, again[0]) and same_bytes(b, again[1]) and not torch.equal(a, other[0])


def test_large_matrices_of_small_rank_are_sketched() -> None:
    assert kernel(16).is_randomized(4096, 14336)
    assert not kernel(16).is_randomized(1024, 4096)
    assert not kernel(1024).is_randomized(4096, 4096)
    assert not kernel(16, method="exact").is_randomized(4096, 4096)
    large = TensorType(DType.BF16, (4096, 4096))
    assert kernel(16).workspace(large, large) < kernel(16, method="exact").workspace(large, large) / 2


def test_signs_do_not_depend_on_lapack_and_both_factors_weigh_the_same() -> None:
    torch.manual_seed(0)
    base, tuned = torch.randn(30, 20), torch.randn(30, 20)
    a, b = kernel(5).run(base, tuned)
    assert (b.gather(0, b.abs().argmax(0, keepdim=True)) > 0).all()
    torch.testing.assert_close(a.norm(dim=1), b.norm(dim=0))
    a, b = kernel(5, scaling=4.0).run(base, tuned)
    torch.testing.assert_close(a.norm(dim=1), b.norm(dim=0))


def test_an_unchanged_module_gives_zeros() -> None:
    weight = torch.randn(30, 20)
    for method in ("exact", "randomized"):
        for factor in kernel(5, method=method, energy=0.9).run(weight, weight):
            assert not factor.any() and not factor.isnan().any()


def test_energy_keeps_what_it_names_and_pads_with_zeros(base: Path, noisy: Path, tmp_path: Path) -> None:
    out = extracted(tmp_path, base, noisy, energy=0.5, max_rank=60)
    for name in modules_of(out):
        squares = torch.linalg.svdvals(difference(base, noisy, name)).double().square()
        needed = int((squares.cumsum(0) < 0.5 * squares.sum()).sum()) + 1
        a = read(out)[f"base_model.model.{name}.lora_A.weight"]
        assert a.shape[0] == 60
        assert int((a != 0).any(dim=1).sum()) == needed < 60


@pytest.mark.parametrize("size", ["20kB", "100kB", "10MB"])
def test_total_size_gives_the_largest_rank_that_fits(size: str, base: Path, noisy: Path, tmp_path: Path) -> None:
    out = extracted(tmp_path, base, noisy, total_size=size)
    allowed = int(float(size[:-2]) * {"kB": 1e3, "MB": 1e6}[size[-2:]])
    written = (out / "adapter_model.safetensors").stat().st_size
    a_rank_more = 4 * (128 + 128 + 128 + 192)
    full = 128  # of both modules
    config = json.loads((out / "adapter_config.json").read_text())
    assert written <= allowed
    assert config["r"] == full or written > allowed - a_rank_more - 1000
    opened(base, out)


def test_conv1d_and_embeddings_are_turned(tmp_path: Path) -> None:
    base = gpt2(tmp_path / "base", dtype=torch.float32, n_layer=1)
    tuned = perturbed(base, tmp_path / "tuned")
    out = extracted(tmp_path, base, tuned, modules=r".*\.(c_attn|c_fc|wpe)", rank=64)
    assert json.loads((out / "adapter_config.json").read_text())["fan_in_fan_out"] is True
    for name, found in quietly(deltas, base, out).items():
        delta = difference(base, tuned, name.removeprefix("base_model.model."))
        torch.testing.assert_close(found, delta, rtol=0, atol=1e-5)


def test_a_module_too_small_for_the_rank_has_its_own(base: Path, noisy: Path, tmp_path: Path) -> None:
    out = extracted(tmp_path, base, noisy, modules=r".*\.(q_proj|k_proj|down_proj)", rank=100)
    config = json.loads((out / "adapter_config.json").read_text())
    assert config["r"] == config["lora_alpha"] == 100
    assert list(config["rank_pattern"].values()) == list(config["alpha_pattern"].values()) == [64]
    for name, found in deltas(base, out).items():
        delta = difference(base, noisy, name.removeprefix("base_model.model."))
        assert float((delta - found).norm()) == pytest.approx(best_error(delta, 100), abs=1e-4)


def test_the_model_with_all_that_changed_computes_what_the_tuned_one_does(tmp_path: Path) -> None:
    base = llama(tmp_path / "base", dtype=torch.float32, num_hidden_layers=1)
    tuned = perturbed(base, tmp_path / "tuned")
    options = {"modules": "all-linear", "rank": 128, "modules_to_save": [".*norm", "lm_head", r".*embed_tokens"]}
    out = extracted(tmp_path, base, tuned, **options)
    tokens = torch.arange(1, 20).unsqueeze(0)
    model = quietly(PeftModel.from_pretrained, AutoModelForCausalLM.from_pretrained(base), out)
    expected = AutoModelForCausalLM.from_pretrained(tuned)(tokens).logits
    torch.testing.assert_close(model(tokens).logits, expected, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("make", [bert, t5])
def test_models_of_other_tasks_load_with_their_paths_on_disk(make: Any, tmp_path: Path) -> None:
    base = make(tmp_path / "base", dtype=torch.float32)
    tuned = perturbed(base, tmp_path / "tuned")
    out = extracted(tmp_path, base, tuned, modules="all-linear", rank=4)
    loader = AutoModelForMaskedLM if make is bert else AutoModelForSeq2SeqLM
    model = PeftModel.from_pretrained(loader.from_pretrained(base), out)
    result = model.load_adapter(out, "again")
    assert not result.unexpected_keys and not [key for key in result.missing_keys if ".again" in key]
    task = json.loads((out / "adapter_config.json").read_text())["task_type"]
    assert task == (None if make is bert else "SEQ_2_SEQ_LM")


def test_the_same_names_and_shapes_as_peft_writes(base: Path, adapter: Path, tuned: Path, tmp_path: Path) -> None:
    ours, theirs = read(extracted(tmp_path, base, tuned, rank=4)), read(adapter)
    assert {name: (t.shape, t.dtype) for name, t in ours.items()} == {n: (t.shape, t.dtype) for n, t in theirs.items()}


def test_factors_in_a_short_dtype_are_rounded_once(base: Path, noisy: Path, tmp_path: Path) -> None:
    (tmp_path / "long").mkdir()
    short, long = extracted(tmp_path, base, noisy, dtype="bfloat16"), extracted(tmp_path / "long", base, noisy)
    assert all(same_bytes(tensor, read(long)[name].bfloat16()) for name, tensor in read(short).items())


def test_a_path_that_ends_another_path_is_targeted_by_regex() -> None:
    from surgery.ops.adapter.extract import _targets

    assert _targets(["q"], ["q.weight", "x.k.weight"]) == ["q"]
    assert _targets(["q", "a.b"], ["q.weight", "x.q.weight"]) == r"q|a\.b"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"modules": r".*\.input_layernorm"}, r"`model.layers.0.input_layernorm` cannot be extracted: .* is no matrix"),
        ({"modules_to_save": ["nothing"]}, "`nothing` matches no module of the fine-tuned model"),
        ({"modules_to_save": [PROJECTIONS]}, "is both extracted and saved whole"),
        ({"total_size": 100}, "`total_size: 100` is too small: rank 1 for 2 modules takes"),
    ],
)
def test_what_cannot_be_extracted_is_refused(options: dict[str, Any], message: str, base: Path, noisy: Path) -> None:
    with pytest.raises(OpError, match=message):
        surgery.plan(spec_of(base, noisy, **options))


def test_models_that_do_not_belong_together_are_refused(base: Path, tmp_path: Path) -> None:
    other = llama(tmp_path / "other", intermediate_size=64, num_hidden_layers=1)
    with pytest.raises(OpError, match=r"it is f32\[128, 192\] in the base and bf16\[128, 64\] in the fine-tuned model"):
        surgery.plan(spec_of(base, other))
    with pytest.raises(OpError, match="has no weight in `tuned`"):
        surgery.plan(spec_of(base, gpt2(tmp_path / "gpt2")))


def test_an_adapter_is_no_fine_tuned_model(base: Path, adapter: Path) -> None:
    with pytest.raises(OpError, match="`tuned` is an adapter"):
        surgery.plan(spec_of(base, adapter))


def test_a_tied_embedding_is_refused(tmp_path: Path) -> None:
    base = llama(tmp_path / "tied", tie=True, num_hidden_layers=1)
    with pytest.raises(OpError, match="is tied to the output head"):
        surgery.plan(spec_of(base, base, modules=".*embed_tokens"))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rank": 4, "total_size": "1MB"}, "`rank` and `total_size` both limit the rank"),
        ({"rank": 4, "energy": 0.9}, "`rank` and `energy` exclude each other"),
        ({"max_rank": 4}, "`max_rank` is for `energy`"),
        ({"modules_to_save": ["("]}, r"`\(` is no regex"),
        ({"models": "source"}, "name the fine-tuned model"),
    ],
)
def test_options_that_contradict_each_other_are_refused(
    options: dict[str, Any], message: str, base: Path, noisy: Path
) -> None:
    with pytest.raises(SpecError, match=message):
        surgery.plan(spec_of(base, noisy, **options))
