"""`surgery.runtime`: what cannot be is refused by name, and whatever fails, model and directory stay as they were."""

import errno
import json
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from live import ENCODER, GATE, GROUPED, IDS, of_hub, of_modules, random_model, trace, write
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from torch import nn

from surgery import runtime
from surgery.errors import CheckpointError, OpError, OutputError

REFUSED: dict[str, tuple[Mapping[str, Any], str]] = {
    "unlike": ({"phm_layer": True}, "`adapter_config.json` says `phm_layer: True`, which is not done here"),
    "learned": ({"scaling": "learned"}, "says `scaling: learned`"),
    "another method": ({"architecture": "lora"}, "is an adapter of architecture `lora`, no bottleneck"),
    "activation": ({"non_linearity": "prelu"}, "`activation` is `prelu`, which is not known"),
    "no flag": ({"mh_adapter": "x"}, "says `mh_adapter: x`, which is neither true nor false"),
    "dropout below": ({"dropout": -1}, "says `dropout: -1`, which is no probability"),
    "dropout above": ({"dropout": 1.5}, "says `dropout: 1.5`, which is no probability"),
    "dropout far above": ({"dropout": 10**9}, "says `dropout: 1000000000`, which is no probability"),
    "dropout of no float": ({"dropout": 10**400}, "says `dropout: 1000"),
    "leaves out a number": ({"leave_out": -1}, "says `leave_out: -1`, which is no list of layer numbers"),
    "leaves out half a layer": ({"leave_out": 1.5}, "says `leave_out: 1.5`, which is no list"),
    "leaves out true": ({"leave_out": True}, "says `leave_out: True`, which is no list"),
    "leaves out letters": ({"leave_out": ["a"]}, "says `leave_out: ['a']`, which is no list of layer numbers"),
    "leaves out the last": ({"leave_out": [-1]}, "says `leave_out: [-1]`, which is no list of layer numbers"),
    "slots": ({"mh_adapter": True}, "(8 of 16 are missing)"),
    "layers": ({"leave_out": [1]}, "has no place in the model by adapter_config.json (4 like it)"),
    "model": ({"model_type": "gpt2"}, "the adapter is for `gpt2`, and the model is `llama`"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_not_done_is_refused_and_the_model_stays_as_it_is(name: str, tmp_path: Path) -> None:
    options, message = REFUSED[name]
    model = random_model("llama")
    before = trace(model)
    with pytest.raises((OpError, CheckpointError), match=_escaped(message)):
        runtime.attach(model, of_hub(tmp_path / "a", **options))
    assert trace(model) == before


def _escaped(text: str) -> str:
    return "".join(f"\\{character}" if character in "()[].`" else character for character in text)


OWN_REFUSED: dict[str, tuple[Mapping[str, Any], str]] = {
    "version": ({"version": True}, "is version True of `bottleneck`, not known here"),
    "name": ({"name": ["own"]}, "says `name: ['own']`, which is no text"),
    "no name": ({"name": ""}, "`` cannot be an adapter's name"),
    "twice": ({"modules": [GATE, GATE]}, f"`modules` names `{GATE}` more than once"),
    "number": ({"modules": [GATE, 5]}, "`modules` is ['model.layers.0.mlp.gate_proj', 5], no list of module paths"),
    "scaling": ({"scaling": float("inf")}, "`scaling` is inf, no finite number"),
}


@pytest.mark.parametrize("name", OWN_REFUSED)
def test_what_the_own_layout_cannot_mean_is_refused_and_the_model_stays_as_it_is(name: str, tmp_path: Path) -> None:
    options, message = OWN_REFUSED[name]
    model, directory = random_model("llama"), of_modules(tmp_path / "a", {GATE: (32, 48)})
    config = json.loads((directory / "adapter_config.json").read_text())
    (directory / "adapter_config.json").write_text(json.dumps({**config, **options}))
    before = trace(model)
    with pytest.raises(OpError, match=re.escape(message)):
        runtime.attach(model, directory)
    assert trace(model) == before


def test_one_module_by_two_paths_is_refused(tmp_path: Path) -> None:
    directory = of_modules(tmp_path / "a", {GATE: (32, 48), GATE.removeprefix("model."): (32, 48)})
    with pytest.raises(OpError, match="the adapter names one module twice"):
        runtime.attach(random_model("llama"), directory)


def _awkward(*names: str) -> nn.Module:
    model = nn.Sequential()
    model.add_module("a", nn.Sequential())
    model.a.add_module("b", nn.Linear(6, 6))
    for name in names:
        model.add_module(name, nn.Linear(6, 6))
    return model


def test_every_module_has_an_adapter_of_its_own_whatever_its_name(tmp_path: Path) -> None:
    names = ("a-b", "a%2db", "placed", "config", "hook")
    model = _awkward(*names)
    name = runtime.attach(model, of_modules(tmp_path / "a", dict.fromkeys(("a.b", *names), (6, 6)), placement="after"))
    trained = [key for key, parameter in model.named_parameters() if parameter.requires_grad]
    assert len(trained) == 12
    assert all(key.startswith("surgery_adapters.own.") for key in trained)
    runtime.save(model, tmp_path / "b", name)
    first, again = (load_file(tmp_path / directory / "adapter_model.safetensors") for directory in "ab")
    assert first.keys() == again.keys()
    assert all(torch.equal(first[key], tensor) for key, tensor in again.items())


@pytest.mark.parametrize("standing", [False, True])
def test_a_failure_in_the_middle_leaves_the_model_as_it_was(
    standing: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = random_model("llama")
    model.model.embed_tokens.weight.requires_grad_(False)
    if standing:
        runtime.attach(model, of_modules(tmp_path / "b", {GATE: (32, 48)}))
    before, names = trace(model), runtime.attached(model)
    directory = of_hub(tmp_path / "a", original_ln_before=True)
    last = model.model.layers[1].post_attention_layernorm
    monkeypatch.setattr(last, "register_forward_pre_hook", _interrupted)  # the second hook of the second slot
    with pytest.raises(KeyboardInterrupt):
        runtime.attach(model, directory)
    monkeypatch.undo()
    assert (trace(model), runtime.attached(model)) == (before, names)


def test_a_model_that_cannot_be_frozen_is_left_as_it_was(tmp_path: Path) -> None:
    model, directory = _awkward(), of_modules(tmp_path / "a", {"a.b": (6, 6)})
    model.a.b.bias = None
    model.a.b._parameters["bias"] = torch.ones(6, requires_grad=True) * 2  # no leaf, as functional transforms leave it
    before = trace(model)
    with pytest.raises(RuntimeError, match="leaf"):
        runtime.attach(model, directory)
    assert trace(model) == before
    assert model.a.b.weight.requires_grad


def _interrupted(*args: object, **kwargs: object) -> None:
    raise KeyboardInterrupt


def test_a_model_with_a_module_of_the_containers_name_is_refused(tmp_path: Path) -> None:
    with pytest.raises(OpError, match="has a `surgery_adapters` of its own"):
        runtime.attach(_awkward("surgery_adapters"), of_modules(tmp_path / "a", {"a.b": (6, 6)}))


def test_what_is_of_another_type_is_said_so(tmp_path: Path) -> None:
    model, directory = _awkward(), of_modules(tmp_path / "a", {"a.b": (6, 6)})
    wrong: Any = 5
    with pytest.raises(TypeError, match="`name` is a str, not int"):
        runtime.attach(model, directory, wrong)
    with pytest.raises(TypeError, match="`adapter_dir` is a path, not int"):
        runtime.attach(model, wrong)
    for call in (runtime.attach, runtime.detach, runtime.set_active):
        with pytest.raises(TypeError, match=r"`model` is a torch\.nn\.Module, not int"):
            call(wrong, "own")
    with pytest.raises(TypeError, match="`name` is a str, not int"):
        runtime.detach(model, wrong)
    with pytest.raises(OpError, match="`` cannot be an adapter's name"):
        runtime.attach(model, directory, "")


def test_a_save_replaces_an_adapter_whole_and_nothing_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, directory = random_model("llama"), of_modules(tmp_path / "a", {GATE: (32, 48)})
    runtime.attach(model, of_hub(tmp_path / "b"), "new")
    mode = directory.stat().st_mode
    runtime.save(model, directory, "new")
    assert sorted(path.name for path in directory.iterdir()) == ["adapter.safetensors", "adapter_config.json"]
    assert directory.stat().st_mode == mode
    runtime.attach(model, directory, "again")
    written = {path.name: path.read_bytes() for path in directory.iterdir()}
    monkeypatch.setattr("surgery.workplace.Workplace.publish", _disk_full)
    with pytest.raises(OutputError, match=r"cannot be written: .*No space left"):
        runtime.save(model, directory, "again")
    monkeypatch.undo()
    assert {path.name: path.read_bytes() for path in directory.iterdir()} == written
    (directory / "README.md").touch()
    (tmp_path / "file").touch()
    with pytest.raises(OutputError, match=r"holds more than an adapter, which would go: `README\.md`"):
        runtime.save(model, directory, "new")
    with pytest.raises(OutputError, match="is no directory"):
        runtime.save(model, tmp_path / "file", "new")
    with pytest.raises(OutputError, match="cannot be written"):
        runtime.save(model, tmp_path / "file" / "under", "new")
    monkeypatch.chdir(tmp_path / "b")
    with pytest.raises(OutputError, match="is where you are"):
        runtime.save(model, ".", "new")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "b", "file"]


def _disk_full(workplace: object) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_an_adapter_attached_under_inference_mode_can_be_trained(tmp_path: Path) -> None:
    model = random_model("llama")
    with torch.inference_mode():
        runtime.attach(model, of_hub(tmp_path / "a"))
    assert not any(parameter.is_inference() for parameter in model.parameters())
    model(input_ids=IDS, labels=IDS).loss.backward()
    assert all(parameter.grad is not None for parameter in model.surgery_adapters.parameters())


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")  # of PEFT
def test_a_model_that_is_wrapped_is_told_to_be_attached_to_before(tmp_path: Path) -> None:
    directory = of_modules(tmp_path / "a", {GATE: (32, 48)})
    compiled = torch.compile(random_model("llama"), backend="eager")
    with pytest.raises(OpError, match=r"OptimizedModule is compiled[\s\S]*attach first, and compile then"):
        runtime.attach(compiled, directory)
    in_place = random_model("llama")
    in_place.model.layers[0].compile(backend="eager")
    with pytest.raises(OpError, match=r"`model\.layers\.0` of this LlamaForCausalLM is compiled"):
        runtime.attach(in_place, directory)
    wrapped = get_peft_model(random_model("llama"), LoraConfig(target_modules=["q_proj"]))
    with pytest.raises(OpError, match=r"is a PeftModel[\s\S]*attach to the model before it is wrapped"):
        runtime.attach(wrapped, directory)
    with pytest.raises(OpError, match="is a DataParallel"):
        runtime.attach(nn.DataParallel(random_model("llama")), directory)


def test_the_head_of_a_classifier_is_trained_once_it_is_unfrozen(tmp_path: Path) -> None:
    """As the manuals say: frozen with the rest, and not saved."""
    config = transformers.LlamaConfig(**GROUPED, num_labels=3)
    model = transformers.LlamaForSequenceClassification(config)
    runtime.attach(model, of_hub(tmp_path / "a"))
    assert not model.score.weight.requires_grad
    model.score.requires_grad_(True)
    runtime.attach(model, of_modules(tmp_path / "b", {GATE: (32, 48)}))
    assert model.score.weight.requires_grad
    assert "score.weight" not in load_file(runtime.save(model, tmp_path / "c", "hand") / "adapter.safetensors")


def test_an_unknown_architecture_is_told_what_can_be_used(tmp_path: Path) -> None:
    model = transformers.GPTNeoXForCausalLM(transformers.GPTNeoXConfig(**ENCODER))
    with pytest.raises(OpError, match=r"in `gpt_neox` is not known[\s\S]*named by `modules`, go with any model"):
        runtime.attach(model, of_hub(tmp_path / "a"))
    with pytest.raises(OpError, match="Sequential has no transformers config"):
        runtime.attach(nn.Sequential(), tmp_path / "a")


def test_misfits_name_the_module(tmp_path: Path) -> None:
    model = random_model("llama")
    with pytest.raises(OpError, match=r"`model\.layers\.0\.mlp\.gate_proj` has 32 features where the adapter has 31"):
        runtime.attach(model, of_modules(tmp_path / "a", {GATE: (31, 48)}))
    with pytest.raises(OpError, match=r"`nowhere`, which the adapter names, is no module of LlamaForCausalLM"):
        runtime.attach(model, of_modules(tmp_path / "b", {"nowhere": (32, 48)}))
    with pytest.raises(OpError, match="there is no adapter `own` on this LlamaForCausalLM"):
        runtime.detach(model, "own")
    write(tmp_path / "c", {"peft_type": "LORA"}, {"x": torch.ones(1)})
    with pytest.raises(OpError, match="this is a PEFT adapter"):
        runtime.attach(model, tmp_path / "c")
    runtime.attach(model, of_modules(tmp_path / "d", {GATE: (32, 48)}))
    with pytest.raises(OpError, match="`own` is attached already"):
        runtime.attach(model, tmp_path / "d")
    with pytest.raises(OpError, match="`train` cannot be an adapter's name"):
        runtime.attach(model, tmp_path / "d", "train")
