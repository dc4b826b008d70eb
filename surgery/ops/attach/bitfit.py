"""`attach.bitfit`."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from enum import Enum
from typing import ClassVar

from surgery.checkpoint.architecture import Kind
from surgery.checkpoint.modules import Module
from surgery.errors import OpError, Problem
from surgery.formats.peft.attaching import Task, is_tied, key, target_modules, task_type
from surgery.formats.peft.saved import Saved, saved_modules
from surgery.numerics.constant import Constant
from surgery.op import Attach, Attached, Rewrite, Scene, Selects, Site, doc

NO_TARGETS = "dummy-target-modules"  # PEFT's own word for a LoRA without factors: `DUMMY_TARGET_MODULES`


class Form(Enum):
    """How PEFT can be told what is trained."""

    ALL_BIASES = "LoRA without factors, `bias: all`"
    WHOLE_MODULES = "LoRA without factors, `modules_to_save`"
    SOME_BIASES = "BEFT"


@dataclass(frozen=True, slots=True, kw_only=True)
class Bitfit(Attach):
    """Biases, or other parameters that are there, to be trained alone: copied out as an adapter. Nothing new is made.

    Reads    the tensors selected; without `tensors` every bias
    Writes   adapters/<name>/ as PEFT reads it, in the first of these forms that says what is selected
             every bias of the model: LORA, `bias: all`, no factors:  base_model.model.<module>.bias, as they are
             whole modules: LORA, `modules_to_save`, no factors:  base_model.model.<module>.<parameter>, as they are
             some biases, of Linears: BEFT:  base_model.model.<module>.beft_bias  f32 [1, out], zero: what is trained
             is what is added to the bias
    Numbers  copies, or zeros, so that nothing changes yet
    Mind     PEFT has no BitFit. A LoRA whose targets are PEFT's `dummy-target-modules` loads biases and trains them
             alone; `bias: all` means those of the live model, so that it cannot say some of them: BEFT can, but adds
             a vector to each Linear rather than train its bias. What PEFT cannot say is refused: one parameter of a
             module with several, biases of norms without those of Linears, biases together with other weights.
             PEFT trains the head of a classifier with it, and loads no second adapter beside one of `bias: all`
    Raises   OpError for a model without a bias; a selection that PEFT cannot say; 4-bit weights; a tensor that two
             modules share
    Source   BitFit, arXiv 2106.10199; BEFT, 2509.15974; PEFT 0.21.2, `BaseTuner._mark_only_adapters_as_trainable`
    """

    selects: ClassVar[Selects] = "tensors"
    selects_all: ClassVar[bool] = True

    task: Task | None = field(
        default=None, metadata=doc("PEFT's task_type. Default: by the class that config.json names.", key="task_type")
    )

    def begin(self, scene: Scene) -> Callable[[Site], Rewrite]:
        """What is copied of each site."""
        form, saved = self._plan(scene)

        def rewrite(site: Site) -> Rewrite:
            adds = dict(saved.tensors) if site is scene.sites[0] else {}
            node, path = site.nodes[site.path], site.module.path
            if form is Form.ALL_BIASES and _is_bias(site.path, scene):
                name = key(path, "bias", scene)
                adds |= {} if name in saved.tensors else {name: node}
            elif form is Form.SOME_BIASES:
                adds |= {key(path, "beft_bias", scene): site.graph.apply(Constant(0.0, (1, *node.type.shape)))[0]}
            return Rewrite((), {}, adds=adds)

        return rewrite

    def _plan(self, scene: Scene) -> tuple[Form, Saved]:
        form = _form(scene)
        paths = sorted({site.module.path for site in scene.sites}) if form is Form.WHOLE_MODULES else []
        saved = saved_modules(
            map(re.escape, paths), scene, self.task or task_type(scene.config), is_adapting=form is Form.SOME_BIASES
        )
        return form, saved

    def adapter_config(self, attached: Attached) -> Mapping[str, object]:
        """As PEFT's `save_pretrained` writes it."""
        scene = attached.scene
        form, saved = self._plan(scene)
        general = {
            "peft_type": "BEFT" if form is Form.SOME_BIASES else "LORA",
            "task_type": self.task or task_type(scene.config),
            "base_model_name_or_path": attached.base_name,
            "revision": attached.revision,
            "inference_mode": True,
            "modules_to_save": list(saved.names) or None,
        }
        if form is Form.SOME_BIASES:
            targets = target_modules((site.module.path for site in scene.sites), scene)
            return {**general, "target_modules": targets, "init_weights": True}
        bias = "all" if form is Form.ALL_BIASES else "none"
        return {**general, "target_modules": NO_TARGETS, "bias": bias, "r": 8, "lora_alpha": 8}


def _form(scene: Scene) -> Form:
    """The form that says what is selected. Raises OpError if none does."""
    biases = {name for name in scene.names if _is_bias(name, scene)}
    names = biases if scene.sites[0].match is None else {site.path for site in scene.sites}
    if not names:
        raise OpError(Problem("the model has no biases", fix="select other parameters by `tensors`"))
    if names == biases:
        return Form.ALL_BIASES
    modules = [site.module for site in scene.sites]
    partial = next((module.path for module in modules if not _is_whole(module, names, scene)), None)
    if partial is None:
        tied = next((module.path for module in modules if is_tied(module.path, scene)), None)
        if tied is None:
            return Form.WHOLE_MODULES
        raise OpError(Problem(f"`{tied}` would be trained, and the module that shares its tensor would not"))
    if names <= biases and all(module.kind in (Kind.LINEAR, Kind.HEAD) for module in modules):
        return Form.SOME_BIASES
    what = f"of `{partial}` a part is selected: PEFT can train all biases, some biases of Linears, or whole modules"
    raise OpError(Problem(what, fix="select one of these; several adapters are several edits"))


def _is_bias(name: str, scene: Scene) -> bool:
    type_ = scene.names[name].type
    return name.rpartition(".")[2] == "bias" and len(type_.shape) == 1 and type_.dtype.is_float


def _is_whole(module: Module, names: set[str], scene: Scene) -> bool:
    has_parts = any(path.startswith(f"{module.path}.") for path in scene.modules)
    return bool(module.path) and not has_parts and names >= set(module.tensors)
