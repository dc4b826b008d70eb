"""Adapters on a live model, several at once by name.

Why one container: all adapters of a model are in one module, `surgery_adapters`, that is registered in the model, so
that optimizers, `.to()` and `train()` reach them, and nothing else of the model changes: no module is replaced, and
no name. It goes when the last adapter is detached.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from safetensors.torch import load_file  # pyright: ignore[reportUnknownVariableType]
from torch import nn
from torch.utils.hooks import RemovableHandle

from surgery.checkpoint import ADAPTER_CONFIG, open_checkpoint
from surgery.errors import CheckpointError, OpError, Problem
from surgery.runtime.building import Placed, build, layout_of, own_name
from surgery.runtime.saving import write_adapter
from surgery.runtime.wrapping import check_unwrapped

__all__ = ["attach", "attached", "detach", "save", "set_active"]

CONTAINER = "surgery_adapters"


def attach(model: nn.Module, adapter_dir: str | Path, name: str | None = None, *, trainable: bool = True) -> str:
    """Put the adapter in `adapter_dir` on `model`; gives its name, which is its own unless `name` is another.

    The model computes with it at once. Its parameters have the dtype and device of the modules that they are at; they
    are trained (unless `trainable` is False), and those of the model are frozen until the last adapter is detached.
    Several adapters at one place: each sees what those that were attached before it have changed.

    The head of a classifier is frozen with the rest, and `save` does not write it, while AdapterHub's `train_adapter`
    leaves it trainable. To train it, unfreeze it after attaching (`model.classifier.requires_grad_(True)`; a decoder's
    is `model.score`), and save it yourself.

    Raises OpError if it does not fit the model, or if the model is compiled or wrapped; CheckpointError if its files
    do not hold. The model is then as it was.
    """
    _check_type("adapter_dir", adapter_dir, (str, os.PathLike), "a path")
    _check_type("name", name, (str, type(None)), "a str")
    there = attached(model)
    check_unwrapped(model)
    with torch.inference_mode(False):  # what is made under it could never be trained
        checkpoint = open_checkpoint(str(adapter_dir), download=True)
        if not checkpoint.is_adapter or checkpoint.config is None:
            raise CheckpointError(Problem(f"holds no {ADAPTER_CONFIG} beside weights", str(adapter_dir)))
        config = dict(checkpoint.config)
        own = own_name(config, Path(str(checkpoint.home)).name)
        name = own if name is None else name
        _check_name(name, there)
        placed = build(model, config, load_file(str(checkpoint.files[0].place)))
        _put_on(model, name, _Adapter(config, placed, trainable=trainable))
    return name


def attached(model: nn.Module) -> tuple[str, ...]:
    """The names of the adapters on `model`, in the order in which they were attached."""
    container = _container(model)
    return tuple(name for name, _ in container.named_children()) if container else ()


def set_active(model: nn.Module, names: Iterable[str]) -> None:
    """Compute with these adapters alone; the others stay, without effect. Raises OpError for one that is not there."""
    active = {name: _get(model, name) for name in ([names] if isinstance(names, str) else names)}
    for name in attached(model):
        for placed in _get(model, name).placed:
            placed.adapter.active = name in active


def save(model: nn.Module, adapter_dir: str | Path, name: str) -> Path:
    """Write the adapter `name` as it is now, in the layout it came in; gives the directory.

    What it writes, `attach` reads, and so does AdapterHub's library what is in its layout. The directory appears whole
    or not at all; an adapter that is there is replaced.
    Raises OpError if there is no such adapter, OutputError if the directory cannot be written or holds anything else.
    """
    _check_type("adapter_dir", adapter_dir, (str, os.PathLike), "a path")
    adapter = _get(model, name)
    layout = layout_of(adapter.config)
    tensors = {
        key: placed.adapter.get_parameter(part).detach().contiguous()
        for placed in adapter.placed
        for part, key in placed.keys(layout, name).items()
    }
    return write_adapter(Path(adapter_dir), layout, {**adapter.config, "name": name}, tensors)


def detach(model: nn.Module, name: str) -> None:
    """Take the adapter `name` off. Without any the model is as it was: modules, parameters, and what is trained."""
    adapter, container = _get(model, name), _container(model)
    assert container is not None
    _take_off(model, container, name, adapter)


class _Container(nn.Module):
    """All adapters of a model, by name, and which of its own parameters were trained before."""

    def __init__(self, trained: frozenset[str]) -> None:
        super().__init__()
        self._trained = trained

    def forward(self, x: object) -> object:
        """Nothing, for a Sequential, which calls whatever is registered in it."""
        return x

    def train_model(self, model: nn.Module, mode: bool) -> None:
        """Freeze what was trained, or thaw it."""
        for name, parameter in model.named_parameters():
            if name in self._trained:
                parameter.requires_grad_(mode)


class _Adapter(nn.Module):
    """One adapter: its config, and its bottlenecks, which change the model while they are hooked."""

    def __init__(self, config: Mapping[str, object], placed: list[Placed], *, trainable: bool) -> None:
        super().__init__()
        self.config = config
        self.placed = placed
        self._handles: list[RemovableHandle] = []
        for item in placed:
            self.add_module(_module_name(item.path), item.adapter)
        self.requires_grad_(trainable)

    def hook(self) -> None:
        for item in self.placed:
            for handle in item.adapter.hook():
                self._handles.append(handle)

    def release(self) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles.clear()


def _module_name(path: str) -> str:
    """`path` without the dots that torch forbids: another for every path, and the name of no attribute."""
    return "at-" + path.replace("%", "%25").replace("-", "%2d").replace(".", "-")


def _put_on(model: nn.Module, name: str, adapter: _Adapter) -> None:
    """Register, hook, freeze; or leave the model as it was."""
    container = _container(model)
    is_first = container is None
    if container is None:
        container = _new_container(model)
    try:
        container.add_module(name, adapter)
        if is_first:
            model.add_module(CONTAINER, container)
        adapter.hook()
        if is_first:
            container.train_model(model, False)
    except BaseException:
        _take_off(model, container, name, adapter)
        raise


def _take_off(model: nn.Module, container: _Container, name: str, adapter: _Adapter) -> None:
    adapter.release()
    if dict(container.named_children()).get(name) is adapter:
        delattr(container, name)
    if not list(container.children()):
        container.train_model(model, True)
        if _container(model) is container:
            delattr(model, CONTAINER)


def _container(model: nn.Module) -> _Container | None:
    _check_type("model", model, nn.Module, "a torch.nn.Module")
    container = dict(model.named_children()).get(CONTAINER)
    return container if isinstance(container, _Container) else None


def _new_container(model: nn.Module) -> _Container:
    if hasattr(model, CONTAINER):
        raise OpError(Problem(f"this {type(model).__name__} has a `{CONTAINER}` of its own, where adapters are put"))
    return _Container(frozenset(name for name, parameter in model.named_parameters() if parameter.requires_grad))


def _get(model: nn.Module, name: str) -> _Adapter:
    container = _container(model)
    _check_type("name", name, str, "a str")
    adapter = dict(container.named_children()).get(name) if container else None
    if not isinstance(adapter, _Adapter):
        there = ", ".join(attached(model)) or "none"
        raise OpError(Problem(f"there is no adapter `{name}` on this {type(model).__name__}", fix=f"there is {there}"))
    return adapter


def _check_type(argument: str, value: object, types: type | tuple[type, ...], wanted: str) -> None:
    if not isinstance(value, types):
        raise TypeError(f"`{argument}` is {wanted}, not {type(value).__name__}")


def _check_name(name: str, there: tuple[str, ...]) -> None:
    if name in there:
        raise OpError(Problem(f"an adapter `{name}` is attached already", fix="detach it, or give another `name`"))
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_-]*", name) or hasattr(_Container(frozenset()), name):
        what = f"`{name}` cannot be an adapter's name: torch keeps it for itself, or it is not letters, digits, _ and -"
        raise OpError(Problem(what, fix="give another `name`"))
