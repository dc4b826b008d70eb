"""`attach.ia3`."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from surgery.checkpoint.architecture import Architecture, Kind
from surgery.checkpoint.modules import Module
from surgery.errors import OpError, Problem
from surgery.formats.bitsandbytes import dequantized
from surgery.formats.peft.attaching import Task, is_tied, key, runtime_path, target_modules, task_type
from surgery.formats.peft.saved import Saved, saved_modules
from surgery.numerics.constant import Constant
from surgery.op import Attach, Attached, Rewrite, Scene, Site, doc
from surgery.regexes import Limit, flaw, matching

SCALED = (Kind.LINEAR, Kind.CONV1D, Kind.HEAD)
REGEXES_SCHEMA = {"type": "array", "items": {"type": "string", "minLength": 1}}


@dataclass(frozen=True, slots=True, kw_only=True)
class Ia3(Attach):
    """A new (IA)³ adapter, ready to be trained: one vector that scales what a module gives, or what it reads.

    Reads    weight  the shape alone: [out, in] of a Linear, a Conv1D's [in, out]. 4-bit weights are fine
    Writes   adapters/<name>/ as PEFT reads it
             base_model.model.<module>.ia3_l  f32 [out, 1], of the modules in `feedforward` [1, in]
    Numbers  ones, so that nothing changes yet
    Mind     the paper scales keys, values, and what the last matrix of the feed-forward reads: for T5 `modules:
             '.*(Attention\\.[kv]|DenseReluDense\\.wo)'`, `feedforward: '.*wo'`
             modules are named as the live model's class, the first of `architectures` in config.json, names them
    Raises   OpError for a norm, a convolution, an embedding, an expert or a router; an output head that shares the
             embedding's tensor; a `feedforward` that matches none of the modules selected
    Source   (IA)³, arXiv 2205.05638; PEFT 0.21.2, `tuners/ia3`
    """

    feedforward: str | None = field(
        default=None,
        metadata=doc(
            "A regex for the selected modules whose input is scaled, not the output; it matches their path in full.",
            schema={"type": "string", "minLength": 1},
            examples=(r".*\.mlp\.down_proj",),
        ),
    )
    modules_to_save: tuple[str, ...] = field(
        default=(),
        metadata=doc("Regexes of modules that the adapter holds whole, to be trained with it.", schema=REGEXES_SCHEMA),
    )
    task: Task | None = field(
        default=None, metadata=doc("PEFT's task_type. Default: by the class that config.json names.", key="task_type")
    )

    def in_all_linear(self, module: Module, architecture: Architecture) -> bool:
        """Experts are fused at run time, where they are no Linears."""
        del architecture
        return module.kind in (Kind.LINEAR, Kind.CONV1D)

    def check(self, patterns: tuple[re.Pattern[str], ...]) -> str:
        """Regexes that are none."""
        regexes = [("modules_to_save", regex) for regex in self.modules_to_save]
        for option, regex in [*regexes, ("feedforward", self.feedforward or "")]:
            if reason := flaw(regex):
                return f"`{option}`: `{regex}` is no regex: {reason}"
        return ""

    def begin(self, scene: Scene) -> Callable[[Site], Rewrite]:
        """Each site's vector."""
        if self.feedforward and not any(self._is_feedforward(site.path) for site in scene.sites):
            what = f"`feedforward`: `{self.feedforward}` matches none of the {len(scene.sites)} modules selected"
            raise OpError(Problem(what, fix="correct it, or select those modules too"))
        saved = self._saved(scene)

        def rewrite(site: Site) -> Rewrite:
            inputs, outputs = _sizes(site)
            shape = (1, inputs) if self._is_feedforward(site.path) else (outputs, 1)
            whole = dict(saved.tensors) if site is scene.sites[0] else {}
            (ones,) = site.graph.apply(Constant(1.0, shape))
            return Rewrite((), {}, adds={key(site.path, "ia3_l", scene): ones, **whole})

        return rewrite

    def _is_feedforward(self, path: str) -> bool:
        return bool(self.feedforward and matching(self.feedforward, [path], Limit(" of `feedforward`")))

    def _saved(self, scene: Scene) -> Saved:
        saved = saved_modules(self.modules_to_save, scene, self.task or task_type(scene.config))
        tied = [path for path in saved.paths if is_tied(path, scene)]
        if tied:
            what = f"`{tied[0]}` saved whole would be trained, and the module that shares its tensor would not"
            raise OpError(Problem(what, fix="take it out of `modules_to_save`"))
        return saved

    def adapter_config(self, attached: Attached) -> Mapping[str, object]:
        """As PEFT's `save_pretrained` writes it."""
        scene = attached.scene
        targets = target_modules((site.path for site in scene.sites), scene)
        return {
            "peft_type": "IA3",
            "task_type": self.task or task_type(scene.config),
            "base_model_name_or_path": attached.base_name,
            "revision": attached.revision,
            "inference_mode": True,
            "target_modules": targets,
            "feedforward_modules": self._feedforward_modules(targets, scene),
            "fan_in_fan_out": any(site.module.kind is Kind.CONV1D for site in scene.sites),
            "modules_to_save": list(self._saved(scene).names) or None,
            "init_ia3_weights": True,
        }

    def _feedforward_modules(self, targets: list[str] | str, scene: Scene) -> list[str] | str:
        """A list must be one of targets, and PEFT takes any path that ends so, be it in the middle of a word."""
        fed = [site.path for site in scene.sites if self._is_feedforward(site.path)]
        if not fed:
            return []
        ends = target_modules(fed, scene)
        if isinstance(ends, str):
            return ends
        reached = {site.path for site in scene.sites if runtime_path(site.path, scene).endswith(tuple(ends))}
        if reached == set(fed) and set(ends) <= set(targets):
            return ends
        return rf"(.*\.)?({'|'.join(map(re.escape, ends))})"


def _sizes(site: Site) -> tuple[int, int]:
    """Inputs and outputs. Raises OpError for what (IA)³ does not scale."""
    kind, name = site.module.kind, f"{site.path}.weight"
    if name not in site.nodes:
        raise site.refuse(f"has no weight; it holds {', '.join(site.nodes)}", "narrow `modules` to Linears")
    if kind not in SCALED:
        article = "an" if kind in (Kind.EMBEDDING, Kind.OTHER) else "a"
        what = f"is {article} {kind.value} ({site.nodes[name].type}), which (IA)³ does not scale"
        raise site.refuse(what, "narrow `modules`, or take it away with `except`")
    if is_tied(site.path, site.scene):
        raise site.refuse("shares the embedding's tensor, which (IA)³ would untie", "take it away with `except`")
    weight = dequantized(site, None).gives[name] if site.module.is_quantized else site.nodes[name]
    if len(weight.type.shape) != 2 or not weight.type.dtype.is_float:
        raise site.refuse(f"is {weight.type}, no matrix of floats", "dequantize it first, or take it away")
    rows, columns = weight.type.shape
    return (rows, columns) if kind is Kind.CONV1D else (columns, rows)
