"""`Op`: the plug-in. One op is one file under `surgery/ops/<family>/`, and its path is its name.

An op is a frozen dataclass. Its fields, documented by `doc`, are its part of the JSON Schema; its
docstring is its manual; `rewrite` says which names it reads and writes at one site, `config`
what changes in the config. The arithmetic is in the kernels of the nodes that it makes.

Why a `Scene`: an edit may need more than its site, such as the tensors of other models or of a
whole layer, so it is shown everything there is, and `begin` is where it looks once.
"""

from __future__ import annotations

import dataclasses
import importlib
import inspect
import pkgutil
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from types import NoneType
from typing import ClassVar, Literal, Union, cast, get_args, get_origin, get_type_hints

from surgery.checkpoint import Checkpoint
from surgery.checkpoint.architecture import Architecture
from surgery.checkpoint.modules import Module
from surgery.errors import OpError, Problem
from surgery.graph import Graph, Node, Rule, Source

__all__ = [
    "SOURCE",
    "Attach",
    "Attached",
    "Finished",
    "Model",
    "Op",
    "Option",
    "Rewrite",
    "Scene",
    "Selects",
    "Site",
    "doc",
    "find_op",
    "op_names",
    "options_of",
]

Selects = Literal["modules", "tensors", "checkpoint"]
SOURCE = "source"  # what an edit calls the source among its models
ADAPTER_NAME = r"^[A-Za-z0-9][A-Za-z0-9_.-]{0,95}$(?!\n)"


@dataclass(frozen=True, slots=True)
class Rewrite:
    """What happens to names at one site: `takes` leave, `gives` come in their place.

    A name that is both taken and given stays where it was; a new one follows the one given before it.
    A source tensor that none of `gives` is computed from must be in `drops`: nothing vanishes
    unless an op says so. `adds` are tensors of the adapter that the edit writes, by their name in its file.
    """

    takes: tuple[str, ...]
    gives: Mapping[str, Node]
    drops: tuple[str, ...] = ()
    adds: Mapping[str, Node] = field(default_factory=dict[str, Node])


@dataclass(frozen=True, slots=True)
class Model:
    """The source, or a further model of the spec: its checkpoint, and every tensor as a node."""

    name: str  # `source`, or its key under `models`
    checkpoint: Checkpoint
    nodes: Mapping[str, Node]
    architecture: Architecture

    @property
    def config(self) -> Mapping[str, object]:
        """Its config.json, or adapter_config.json; empty without one."""
        return self.checkpoint.config or {}


@dataclass(frozen=True, slots=True)
class Scene:
    """What an edit works on: every tensor after the edits before it, what it selects, and the models."""

    names: Mapping[str, Node]  # by full name, in order
    modules: Mapping[str, Module]
    config: Mapping[str, object]
    architecture: Architecture
    models: Mapping[str, Model]  # the source, as it is on disk, among them
    graph: Graph
    seed: int
    sites: Sequence[Site] = ()

    def read_record(self, node: Node) -> bytes:
        """The bytes of a small source tensor that describes others. Raises OpError if it is computed."""
        if not isinstance(node.kernel, Source):
            raise OpError(Problem(f"{node.type} is not on disk yet"))
        return self.models[node.kernel.model].checkpoint.read_record(node.kernel.name)


@dataclass(frozen=True, slots=True)
class Site:
    """A module or tensor that an edit selected, with what an op may know of it.

    For a tensor, `path` is its full name; `module` is the module it belongs to.
    """

    path: str
    module: Module
    nodes: Mapping[str, Node]  # the module's tensors, or the one tensor, by full name
    touched_by: str  # the edit that last changed it, as the spec names it; "" if none
    match: re.Match[str] | None  # of the regex that selected it; None for `all-linear`
    scene: Scene

    @property
    def graph(self) -> Graph:
        """Where nodes are made."""
        return self.scene.graph

    @property
    def architecture(self) -> Architecture:
        """The row of the table for this checkpoint."""
        return self.scene.architecture

    @property
    def config(self) -> Mapping[str, object]:
        """The checkpoint's config."""
        return self.scene.config

    def refuse(self, what: str, fix: str = "") -> OpError:
        """The error for this site; the planner adds the edit's place in the spec."""
        return OpError(Problem(f"`{self.path}` {what}", fix=fix))


@dataclass(frozen=True, slots=True)
class Finished:
    """The output as the edits leave it, for those who patch its config."""

    nodes: Mapping[str, Node]
    modules: Mapping[str, Module]
    architecture: Architecture
    models: Mapping[str, Model]


@dataclass(frozen=True, slots=True)
class Attached:
    """An adapter that an edit writes: what the edit saw, and the tensors that came of it."""

    scene: Scene  # `scene.sites` are what it selected
    nodes: Mapping[str, Node]  # by name in the adapter's file
    base_name: str | None  # of the checkpoint that the adapter is for, where it has one
    revision: str | None  # its commit on the Hub


class Op:
    """Base of every op. `name` is set from the file's path by the registry."""

    __slots__ = ()
    name: ClassVar[str] = ""
    selects: ClassVar[Selects] = "modules"
    selects_all: ClassVar[bool] = False  # without a selection: everything
    stem: ClassVar[str] = ""  # of the weight files, where it is not the usual one
    produces: ClassVar[Literal["same", "adapter"]] = "same"  # an adapter, whatever the source is
    rules: ClassVar[tuple[Rule, ...]] = ()  # graph rewrites that belong to this op

    def in_all_linear(self, module: Module, architecture: Architecture) -> bool:
        """Whether `modules: all-linear` stands for `module` too."""
        del architecture
        return module.is_linear

    def check(self, patterns: tuple[re.Pattern[str], ...]) -> str:
        """What is wrong between the options and the regexes; empty if nothing is."""
        del patterns
        return ""

    def model_names(self) -> Iterable[str]:
        """The models that this edit uses, `source` among them if it is named."""
        return ()

    def begin(self, scene: Scene) -> Callable[[Site], Rewrite]:
        """What is done at each site, after what is done once. Raises OpError if it cannot be applied at all."""
        del scene
        return self.rewrite

    def rewrite(self, site: Site) -> Rewrite:
        """The names this op reads and writes at `site`. Raises OpError if it cannot be applied."""
        raise NotImplementedError

    def rewrite_all(self, scene: Scene) -> Rewrite:
        """The names that an op on the whole checkpoint reads and writes. Raises OpError if it cannot be applied."""
        raise NotImplementedError

    def config(self, config: Mapping[str, object], finished: Finished) -> Mapping[str, object]:
        """The config after this edit: config.json, or adapter_config.json of an adapter."""
        del finished
        return config

    def conflicts(self, other: Op) -> str:
        """Why the same checkpoint cannot hold the results of both ops; empty if it can."""
        del other
        return ""


def doc(
    text: str,
    *,
    key: str = "",
    examples: tuple[object, ...] = (),
    choices: tuple[object, ...] = (),
    schema: Mapping[str, object] | None = None,
) -> Mapping[str, object]:
    """The `metadata` of a dataclass field that is an option of the spec.

    The JSON type comes from `schema`, or from the field's annotation: bool, int, float, str, or a Literal.
    """
    return {"doc": text, "key": key, "examples": examples, "choices": choices, "schema": schema}


@dataclass(frozen=True, slots=True, kw_only=True)
class Attach(Op):
    """Base of ops that write an adapter of their own, `adapters/<name>/`, and leave the checkpoint as it is."""

    stem: ClassVar[str] = "adapter_model"

    adapter: str = field(
        metadata=doc(
            "The adapter's name: it is written to `adapters/<name>/`.",
            key="name",
            schema={"type": "string", "pattern": ADAPTER_NAME},
        )
    )
    base: str | None = field(
        default=None,
        metadata=doc(
            "What the adapter's config calls the checkpoint it is for. Default: the source's Hub id and commit, or "
            "`../..` where the checkpoint is written beside it.",
            key="base_model_name_or_path",
            schema={"type": "string", "minLength": 1},
        ),
    )

    def adapter_config(self, attached: Attached) -> Mapping[str, object]:
        """The adapter's adapter_config.json. Raises OpError if the adapter cannot be what it was to be."""
        raise NotImplementedError

    def conflicts(self, other: Op) -> str:
        """Two adapters of one name."""
        same = isinstance(other, Attach) and other.adapter.casefold() == self.adapter.casefold()
        return f"both write `adapters/{self.adapter}`" if same else ""


@dataclass(frozen=True, slots=True)
class Option:
    """One field of an op as the spec and the schema know it."""

    field: str  # of the dataclass; `key` in the spec, which may be a word that Python keeps for itself
    key: str
    doc: str
    required: bool
    default: object
    schema: Mapping[str, object]


_JSON_TYPES = {bool: "boolean", int: "integer", float: "number", str: "string"}


def _annotation_schema(annotation: object) -> dict[str, object]:
    if get_origin(annotation) is Literal:
        return {"enum": list(get_args(annotation))}
    if get_origin(annotation) is Union or get_args(annotation):
        annotation = next(arg for arg in get_args(annotation) if arg is not NoneType)
        return _annotation_schema(annotation)
    return {"type": _JSON_TYPES[cast(type, annotation)]}


def options_of(op: type[Op]) -> list[Option]:
    """The options of an op, in the order of its fields."""
    hints = get_type_hints(op)
    options: list[Option] = []
    for entry in dataclasses.fields(cast("type[_DataclassOp]", op)):
        schema = dict(entry.metadata["schema"] or {}) or _annotation_schema(hints[entry.name])
        if entry.metadata["choices"]:
            schema = {"enum": list(entry.metadata["choices"])}
        if entry.metadata["examples"]:
            schema["examples"] = list(entry.metadata["examples"])
        made = None if entry.default_factory is dataclasses.MISSING else entry.default_factory()
        required = entry.default is dataclasses.MISSING and made is None
        default = made if entry.default is dataclasses.MISSING else entry.default
        default = list(cast("tuple[object, ...]", default)) if isinstance(default, tuple) else default
        key = entry.metadata["key"] or entry.name
        options.append(Option(entry.name, key, entry.metadata["doc"], required, default, schema))
    return options


@dataclass(frozen=True)
class _DataclassOp(Op):
    """Only for the type checker: every op is a dataclass."""


@cache
def op_names() -> tuple[str, ...]:
    """The names of all ops, `family.name`, sorted: one for each file under `surgery/ops`."""
    return tuple(sorted(_walk_ops()))


def _walk_ops() -> Iterator[str]:
    package = importlib.import_module("surgery.ops")
    for family in pkgutil.iter_modules(package.__path__):
        for module in pkgutil.iter_modules([f"{package.__path__[0]}/{family.name}"]):
            if not module.name.startswith("_"):
                yield f"{family.name}.{module.name}"


@cache
def find_op(name: str) -> type[Op]:
    """The op called `name`. Raises KeyError if there is none."""
    if name not in op_names():
        raise KeyError(name)
    module = importlib.import_module(f"surgery.ops.{name}")
    classes = [
        value
        for _, value in inspect.getmembers(module, inspect.isclass)
        if issubclass(value, Op) and value.__module__ == module.__name__
    ]
    (op,) = classes
    op.name = name
    return op
