"""`surgery.runtime`: adapters on live models compute what AdapterHub's library computes, train, and come off."""

import copy
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from live import DOWN, GATE, IDS, MODELS, logits, of_hub, of_modules, random_model, trace
from peers.adapterhub import adapters_python, run_jobs
from safetensors.torch import load_file
from torch import Tensor, nn

from surgery import runtime
from surgery.formats.adapterhub.bottleneck import read_hub_bottleneck
from surgery.formats.bottleneck.layout import ACTIVATIONS
from surgery.runtime.activations import FUNCTIONS

METHODS = {"double": "DoubleSeqBnConfig", "seq": "SeqBnConfig", "par": "ParBnConfig"}


@dataclass(frozen=True)
class Case:
    """An adapter that AdapterHub's library makes."""

    model: str
    method: str
    options: Mapping[str, Any] = field(default_factory=lambda: {"reduction_factor": 4})


CASES = {f"{model}-{method}": Case(model, method) for model in MODELS for method in METHODS} | {
    "llama-left-out": Case("llama", "double", {"reduction_factor": 5, "leave_out": [0], "non_linearity": "gelu_new"}),
    "llama-both-parallel": Case("llama", "par", {"mh_adapter": True, "scaling": 2.5}),
    "t5-left-out": Case("t5", "seq", {"leave_out": [0, 2], "mh_adapter": True, "non_linearity": "tanh"}),
    "bert-both": Case("bert", "seq", {"mh_adapter": True, "dropout": 0.1, "non_linearity": "leakyrelu"}),
}


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("bases")
    for name in MODELS:
        random_model(name).save_pretrained(root / name)
    return root


@pytest.fixture(scope="module")
def made(bases: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Every case as AdapterHub's library saves it, weights random, with the logits beside it."""
    adapters_python()
    root = tmp_path_factory.mktemp("made")
    jobs = [
        {
            "do": "make",
            "class": MODELS[case.model][1],
            "base": str(bases / case.model),
            "config_class": METHODS[case.method],
            "config": dict(case.options),
            "adapter": str(root / name),
            "with_head": False,
            "logits": str(root / f"{name}.safetensors"),
        }
        for name, case in CASES.items()
    ]
    run_jobs(jobs, root)
    return root


def loaded(bases: Path, name: str) -> nn.Module:
    return getattr(transformers, MODELS[name][1]).from_pretrained(bases / name).eval()


@pytest.mark.parametrize("name", CASES)
def test_an_attached_adapter_computes_what_adapterhub_computes(name: str, bases: Path, made: Path) -> None:
    model = loaded(bases, CASES[name].model)
    before = logits(model)
    assert runtime.attach(model, made / name) == "made"
    wanted = load_file(made / f"{name}.safetensors")["logits"]
    if CASES[name].model == "mt5":  # a tied one is scaled before the head by the library's transformers, not by ours
        wanted = wanted * model.config.d_model**0.5
    torch.testing.assert_close(logits(model), wanted, rtol=1e-5, atol=1e-5 * float(wanted.abs().max()))
    assert (before - wanted).abs().max() > 1e-2 * wanted.abs().max(), "the adapter does nothing: nothing was tested"


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("placement", ["before", "after", "parallel"])
def test_an_adapter_at_a_linear_computes_what_was_published(placement: str, bias: bool, tmp_path: Path) -> None:
    """Hu et al., arXiv 2304.01933."""
    linear = nn.Linear(6, 6 if placement == "parallel" else 10)
    width = linear.out_features if placement == "after" else 6
    sizes = (6, linear.out_features) if placement == "parallel" else (width, width)
    directory = of_modules(tmp_path / "a", {"0": sizes}, placement=placement, bias=bias)
    model = nn.Sequential(linear, nn.Identity()).eval()
    x = torch.randn(3, 6)
    wanted = _published(linear, placement, load_file(directory / "adapter_model.safetensors"), x)
    runtime.attach(model, directory)
    torch.testing.assert_close(model(x), wanted)
    torch.testing.assert_close(model[0](input=x), wanted)


def _published(linear: nn.Linear, placement: str, tensors: Mapping[str, Tensor], x: Tensor) -> Tensor:
    def adapter(z: Tensor) -> Tensor:
        down = z @ tensors["0.adapter_down.weight"].T + tensors.get("0.adapter_down.bias", 0)
        return 1.5 * (torch.tanh(down) @ tensors["0.adapter_up.weight"].T + tensors.get("0.adapter_up.bias", 0))

    if placement == "before":
        return linear(x + adapter(x))
    return linear(x) + adapter(linear(x) if placement == "after" else x)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("layout", ["adapterhub", "surgery"])
def test_a_detached_adapter_leaves_notrace(layout: str, dtype: torch.dtype, tmp_path: Path) -> None:
    model = random_model("llama").to(dtype)
    model.model.embed_tokens.weight.requires_grad_(False)
    before, untouched = logits(model), trace(model)
    directory = of_hub(tmp_path / "a") if layout == "adapterhub" else of_modules(tmp_path / "a", {GATE: (32, 48)})
    name = runtime.attach(model, directory)
    assert not torch.equal(logits(model), before)
    assert set(untouched[0]) <= set(model.state_dict())
    assert {parameter.dtype for parameter in model.parameters()} == {dtype}
    assert [name for name, p in model.named_parameters() if p.requires_grad and "surgery_adapters" not in name] == []
    runtime.detach(model, name)
    assert torch.equal(logits(model), before)
    assert trace(model) == untouched


@pytest.mark.parametrize("layout", ["adapterhub", "surgery"])
def test_training_lowers_the_loss_and_changes_the_adapter_alone(layout: str, tmp_path: Path) -> None:
    model = random_model("llama").train()
    sizes = {GATE: (32, 48), DOWN: (48, 32)}
    name = runtime.attach(
        model, of_hub(tmp_path / "a") if layout == "adapterhub" else of_modules(tmp_path / "a", sizes)
    )
    before = copy.deepcopy(model.state_dict())
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=0.02)
    losses: list[float] = []
    for _ in range(8):
        optimizer.zero_grad()
        loss = model(input_ids=IDS, labels=IDS).loss
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.8 * losses[0], losses
    changed = {key for key, value in model.state_dict().items() if not torch.equal(value, before[key])}
    assert changed == {key for key in before if key.startswith(f"surgery_adapters.{name}.")}


@pytest.mark.parametrize("layout", ["adapterhub", "surgery"])
def test_what_is_saved_attaches_as_it_was(layout: str, tmp_path: Path) -> None:
    model, other = random_model("llama"), random_model("llama")
    directory = of_hub(tmp_path / "a") if layout == "adapterhub" else of_modules(tmp_path / "a", {GATE: (32, 48)})
    runtime.attach(model, directory, "math")
    with torch.no_grad():
        for parameter in model.surgery_adapters.parameters():
            parameter.mul_(-1.25)
    assert runtime.attach(other, runtime.save(model, tmp_path / "b", "math")) == "math"
    assert torch.equal(logits(other), logits(model))
    assert runtime.attach(other, directory) != "math"
    original, again = (json.loads((tmp_path / name / "adapter_config.json").read_text()) for name in "ab")
    assert again == {**original, "name": "math"}


def test_adapterhub_loads_what_was_saved(bases: Path, made: Path, tmp_path: Path) -> None:
    model = loaded(bases, "bert")
    runtime.attach(model, made / "bert-both", "trained")
    with torch.no_grad():
        for parameter in model.surgery_adapters.parameters():
            parameter.mul_(0.5)
    runtime.save(model, tmp_path / "saved", "trained")
    job = {"do": "load", "class": MODELS["bert"][1], "base": str(bases / "bert"), "adapter": str(tmp_path / "saved")}
    (answer,) = run_jobs([{**job, "logits": str(tmp_path / "logits.safetensors")}], tmp_path)
    assert answer == {"name": "trained", "warned": [], "missing_keys": [], "unexpected_keys": []}
    wanted = load_file(tmp_path / "logits.safetensors")["logits"]
    torch.testing.assert_close(logits(model), wanted, rtol=1e-4, atol=1e-4)


def test_several_adapters_stand_at_once_and_each_can_be_taken_off(tmp_path: Path) -> None:
    model = random_model("llama")
    first, second = of_hub(tmp_path / "a"), of_modules(tmp_path / "b", {GATE: (32, 48), DOWN: (48, 32)})
    plain = logits(model)
    runtime.attach(model, first, "one")
    with_first = logits(model)
    runtime.attach(model, second, "two")
    both = logits(model)
    assert runtime.attached(model) == ("one", "two")
    runtime.set_active(model, ["one"])
    assert torch.equal(logits(model), with_first)
    runtime.set_active(model, [])
    assert torch.equal(logits(model), plain)
    runtime.set_active(model, ["one", "two"])
    assert torch.equal(logits(model), both)
    runtime.detach(model, "one")
    runtime.attach(model, first, "one")  # at other places than `two`, so the order does not matter
    assert torch.equal(logits(model), both)
    runtime.detach(model, "two")
    assert torch.equal(logits(model), with_first)


def test_one_slot_holds_two_adapters_the_second_reading_what_the_first_made_of_it(tmp_path: Path) -> None:
    linear = nn.Sequential(nn.Linear(6, 6))
    of_modules(tmp_path / "a", {"0": (6, 6)}, placement="after")
    of_modules(tmp_path / "b", {"0": (6, 6)}, placement="after", seed=1)
    x = torch.randn(3, 6)
    y = linear(x)
    for name in "ab":
        y = _published(nn.Identity(), "after", load_file(tmp_path / name / "adapter_model.safetensors"), y)  # type: ignore
        runtime.attach(linear, tmp_path / name, name)
    torch.testing.assert_close(linear(x), y)


def test_an_adapter_of_a_model_with_a_head_attaches_to_the_model_without(tmp_path: Path) -> None:
    whole = random_model("llama")
    base = copy.deepcopy(whole.model)
    for directory in (of_hub(tmp_path / "a"), of_modules(tmp_path / "b", {GATE: (32, 48)})):
        runtime.attach(whole, directory, directory.name)
        runtime.attach(base, directory, directory.name)
    with torch.no_grad():
        assert torch.equal(base(IDS).last_hidden_state, whole.model(IDS).last_hidden_state)


def test_a_copy_of_a_model_has_adapters_of_its_own(tmp_path: Path) -> None:
    model = random_model("llama")
    runtime.attach(model, of_hub(tmp_path / "a"))
    runtime.attach(model, of_modules(tmp_path / "b", {GATE: (32, 48)}))
    before = logits(model)
    other = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in other.surgery_adapters.parameters():
            parameter.zero_()
    assert torch.equal(logits(model), before)
    changed = logits(other)
    runtime.detach(other, "hand")
    runtime.detach(other, "own")
    assert torch.equal(logits(other), changed)
    assert torch.equal(logits(other), logits(random_model("llama")))


def test_gradient_checkpointing_gives_the_same_gradients(tmp_path: Path) -> None:
    gradients: list[list[Tensor]] = []
    for checkpointing in (False, True):
        model = random_model("llama").train()
        runtime.attach(model, of_hub(tmp_path / str(checkpointing), original_ln_before=True))
        if checkpointing:
            model.activation_checkpointing_enable({"use_reentrant": False})
        model(input_ids=IDS, labels=IDS).loss.backward()
        gradients.append([p.grad for p in model.surgery_adapters.parameters() if p.grad is not None])
    assert len(gradients[0]) == 8
    torch.testing.assert_close(gradients[1], gradients[0])


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_an_activation_is_what_transformers_calls_so(name: str) -> None:
    x = torch.linspace(-12, 12, 400)
    reference = transformers.activations.get_activation(name.replace("leakyrelu", "leaky_relu"))
    torch.testing.assert_close(FUNCTIONS[name](x), reference(x))


def test_a_config_older_than_versions_means_another_gelu() -> None:
    """As AdapterHub's loader reads it."""
    config = {"config": {"output_adapter": True, "non_linearity": "gelu"}}
    assert read_hub_bottleneck(config).activation == "gelu_new"
    assert read_hub_bottleneck({**config, "version": "adapters.1.0.0"}).activation == "gelu"
