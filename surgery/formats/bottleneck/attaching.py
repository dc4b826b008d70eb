"""What `attach.series_adapter` and `attach.parallel_adapter` share: options, and where the tensors go.

Two layouts, by placement: AdapterHub's, which fills its own slots in whole layers, and surgery's, for adapters at
single Linears.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import ClassVar

from surgery.checkpoint.architecture import Architecture, Kind
from surgery.checkpoint.modules import Module
from surgery.errors import OpError, Problem
from surgery.formats.adapterhub.bottleneck import (
    Bottleneck,
    Preset,
    check_name,
    hub_bottleneck_config,
    hub_keys,
    reduction_factor,
    slots_of,
    width_of,
)
from surgery.formats.adapterhub.hub import hidden_size
from surgery.formats.adapterhub.slots import Stack, family_of, layers_of
from surgery.formats.bitsandbytes import dequantized
from surgery.formats.bottleneck.layout import (
    ACTIVATIONS,
    ModulesConfig,
    Placement,
    Sizes,
    modules_config,
    modules_keys,
)
from surgery.formats.bottleneck.values import Draw, Init, initial_values
from surgery.formats.peft.attaching import runtime_path
from surgery.graph import Node
from surgery.op import Attach, Attached, Rewrite, Scene, Selects, Site, doc

__all__ = ["BottleneckAttach"]

WIDTH = 256  # Hu et al.
ACTIVATION = "tanh"


@dataclass(frozen=True, slots=True, kw_only=True)
class BottleneckAttach(Attach):
    """Base of both ops."""

    selects: ClassVar[Selects] = "modules"
    selects_all: ClassVar[bool] = True

    width: int | None = field(
        default=None,
        metadata=doc(
            "Features within the bottleneck. Default: by `reduction_factor`; 256 at single Linears.",
            schema={"type": "integer", "minimum": 1},
        ),
    )
    reduction_factor: float | None = field(
        default=None,
        metadata=doc(
            "The model's width over the bottleneck's, in AdapterHub's slots. Default: 16 in series, 2 in parallel.",
            schema={"type": "number", "exclusiveMinimum": 0},
        ),
    )
    activation: str | None = field(
        default=None,
        metadata=doc("As transformers calls it. Default: the method's own.", choices=ACTIVATIONS),
    )
    scaling: float | None = field(
        default=None,
        metadata=doc("What the adapter's part is multiplied with. Default: 4 beside a sublayer, else 1."),
    )
    init: Init | None = field(
        default=None,
        metadata=doc(
            "`bert`: normal with deviation 0.02, both. `zero`: up is 0, so that nothing changes yet (AdapterHub's "
            "`mam_adapter`). Default: the method's own."
        ),
    )

    @property
    def stem(self) -> str:  # pyright: ignore[reportIncompatibleVariableOverride]  # by placement, not by op
        """`adapter` is AdapterHub's."""
        return "adapter_model" if isinstance(self.method(), str) else "adapter"

    placement: str = field(default="", metadata=doc("Where it stands."))  # each op has its own

    def method(self) -> Preset | Placement:
        """AdapterHub's configuration, or where the adapter is at single Linears."""
        raise NotImplementedError

    def in_all_linear(self, module: Module, architecture: Architecture) -> bool:
        """Experts are fused at run time, where they are no Linears."""
        del architecture
        return module.kind in (Kind.LINEAR, Kind.CONV1D)

    def check(self, patterns: tuple[re.Pattern[str], ...]) -> str:
        """Options that exclude each other."""
        del patterns
        if self.width is not None and self.reduction_factor is not None:
            return "`width` and `reduction_factor` say the same: give one of them"
        if isinstance(self.method(), str) and self.reduction_factor is not None:
            return "`reduction_factor` is for AdapterHub's slots, whose width is the model's: give `width`"
        return ""

    def begin(self, scene: Scene) -> Callable[[Site], Rewrite]:
        """What is added at each site: of a layer with slots, at its first."""
        check_name(self.adapter)
        method = self.method()
        if isinstance(method, Preset):
            return self._fill_slots(method, scene)
        if len(scene.sites) == len(scene.modules):
            fix = "name Linears by `modules`, or write `modules: all-linear`"
            raise OpError(Problem(f"`placement: {self.placement}` is at single Linears, and none is selected", fix=fix))
        return lambda site: self._at_linear(method, site)

    def adapter_config(self, attached: Attached) -> Mapping[str, object]:
        """As AdapterHub's `save_adapter` writes it, or in surgery's own layout."""
        method, scene = self.method(), attached.scene
        if isinstance(method, Preset):
            chosen = self._bottleneck(method, _chosen(scene)[1])
            factor, init = self._factor(method, _hidden(scene)), self.init or method.init
            return hub_bottleneck_config(chosen, init, factor, self.adapter, scene.config, attached.base_name)
        paths = tuple(runtime_path(site.path, scene) for site in scene.sites)
        scaling = 1.0 if self.scaling is None else float(self.scaling)
        config = ModulesConfig(method, paths, self.width or WIDTH, self.activation or ACTIVATION, scaling, bias=False)
        base = {"base_model_name_or_path": attached.base_name, "revision": attached.revision}
        return modules_config(config, self.adapter, base)

    def _fill_slots(self, preset: Preset, scene: Scene) -> Callable[[Site], Rewrite]:
        hidden = _hidden(scene)
        sizes = Sizes(hidden, width_of(hidden, self._factor(preset, hidden)), hidden)
        first, left_out = _chosen(scene)
        adds: dict[str, dict[str, Node]] = {}
        for layer, slot in slots_of(self._bottleneck(preset, left_out), _layers(scene)):
            keys = hub_keys(runtime_path(f"{layer}.{slot.path}", scene), self.adapter)
            nodes = initial_values(keys, sizes, self.init or preset.init, self._draw(scene))
            adds.setdefault(first[layer], {}).update(nodes)
        return lambda site: Rewrite((), {}, adds=adds.get(site.path, {}))

    def _bottleneck(self, preset: Preset, left_out: tuple[int, ...]) -> Bottleneck:
        return Bottleneck(
            attention=preset.attention,
            output=True,
            reads=preset.reads,
            activation=self.activation or preset.activation,
            scaling=preset.scaling if self.scaling is None else float(self.scaling),
            leave_out=left_out,
        )

    def _factor(self, preset: Preset, hidden: int) -> float:
        if self.width is not None:
            return reduction_factor(hidden, self.width)
        return preset.reduction_factor if self.reduction_factor is None else self.reduction_factor

    def _draw(self, scene: Scene) -> Draw:
        return Draw(scene.graph, scene.seed, self.adapter)

    def _at_linear(self, placement: Placement, site: Site) -> Rewrite:
        inputs, outputs = _features(site)
        read = outputs if placement == "after" else inputs
        given = inputs if placement == "before" else outputs
        width = self.width or WIDTH
        if width > min(read, given):
            what = f"has {inputs} features in and {outputs} out: a width of {width} is no bottleneck"
            raise site.refuse(what, "lower `width`, or take the module away with `except`")
        keys = modules_keys(runtime_path(site.path, site.scene), bias=False)
        sizes = Sizes(read, width, given)
        return Rewrite((), {}, adds=initial_values(keys, sizes, self.init or "bert", self._draw(site.scene)))


def _hidden(scene: Scene) -> int:
    hidden = hidden_size(scene.config)
    if not isinstance(hidden, int):
        fix = "adapters at single Linears, named by `modules`, do not need it"
        raise OpError(Problem("config.json does not say how wide the model is (`hidden_size`)", fix=fix))
    return hidden


def _layers(scene: Scene) -> Mapping[str, tuple[int, Stack]]:
    family = family_of(scene.config.get("model_type"))
    return layers_of(family, scene.modules)


def _chosen(scene: Scene) -> tuple[Mapping[str, str], tuple[int, ...]]:
    """The layers that hold a selected module, each with the first of them; and the numbers of all other layers."""
    layers = _layers(scene)
    first: dict[str, str] = {}
    for site in scene.sites:
        layer = next((layer for layer in layers if site.path.startswith(f"{layer}.")), None)
        if layer is not None:
            first.setdefault(layer, site.path)
    if not first:
        what = f"none of the {len(scene.sites)} modules selected is in one of the {len(layers)} layers"
        raise OpError(
            Problem(what, fix="select modules of the layers that are to have an adapter, or leave `modules` out")
        )
    return first, tuple(number for layer, (number, _) in layers.items() if layer not in first)


def _features(site: Site) -> tuple[int, int]:
    """Of a Linear, in and out."""
    kind, name = site.module.kind, f"{site.path}.weight"
    if kind not in (Kind.LINEAR, Kind.CONV1D):
        article = "an" if kind.value[0] in "aeiou" else "a"
        fix = "narrow `modules`, or take it away with `except`"
        raise site.refuse(f"is {article} {kind.value}: adapters are at Linears", fix)
    weight = dequantized(site, None).gives[name] if site.module.is_quantized else site.nodes[name]
    rows, columns = weight.type.shape
    return (rows, columns) if kind is Kind.CONV1D else (columns, rows)
