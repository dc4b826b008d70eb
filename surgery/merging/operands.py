"""What is merged at one tensor: a further model's own, or the source's with an adapter folded in."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace

from surgery.checkpoint.architecture import EMBEDDINGS, HEADS
from surgery.checkpoint.modules import QUANTIZED_PARTS, module_of, modules_of
from surgery.errors import OpError, Problem
from surgery.formats.peft import Patch, read_adapter, refuse_other_base
from surgery.graph import Node
from surgery.merging.pad import PadRows
from surgery.op import SOURCE, Model, Scene, Site

__all__ = ["Operands"]


class Operands:
    """The tensors of the models of one edit, adapters evaluated over the source as it is on disk."""

    def __init__(self, scene: Scene, names: Iterable[str], *, any_base: bool) -> None:
        self._scene = scene
        self._models = {name: scene.models[name] for name in names}
        self._patches = {
            name: _patches(model, scene.models[SOURCE], any_base=any_base)
            for name, model in self._models.items()
            if model.checkpoint.is_adapter and name != SOURCE
        }

    @property
    def checkpoints(self) -> Iterable[Model]:
        """The further models that are no adapters."""
        return [model for name, model in self._models.items() if name != SOURCE and name not in self._patches]

    def find(self, model: str, tensor: str) -> Node | None:
        """The tensor of `model`; None where it has none."""
        if model == SOURCE:
            return self._scene.names[tensor]
        if model not in self._patches:
            return self._models[model].nodes.get(tensor)
        base = self._scene.models[SOURCE].nodes.get(tensor)
        patch = self._patches[model].get(tensor)
        return patch.apply(self._scene.graph, base) if base and patch else base

    def tied(self, model: str, tensor: str) -> Node | None:
        """The embedding that `model` uses in place of its output head `tensor`; None if it does not."""
        found = self._models[model]
        if module_of(tensor) not in found.architecture.heads or not found.architecture.is_tied(found.config):
            return None
        embeddings = [
            name
            for name in found.nodes
            if EMBEDDINGS.fullmatch(module_of(name)) and found.nodes[name].type == self._scene.names[tensor].type
        ]
        return found.nodes[embeddings[0]] if embeddings else None


def _patches(model: Model, source: Model, *, any_base: bool) -> Mapping[str, Patch]:
    if not any_base:
        refuse_other_base(model, source)
    adapter = read_adapter(model)
    types = {name: node.type for name, node in source.nodes.items()}
    try:
        return adapter.patches(types, modules_of(types, source.architecture), source.architecture, source.config)
    except OpError as error:
        raise OpError(*(replace(problem, fix=_merge_fix(problem.fix)) for problem in error.problems)) from None


def _merge_fix(fix: str) -> str:
    """How to mend it in a merge: what `adapter.fold` offers, its output can be merged with."""
    return f"fold it into a checkpoint of its own first, with `adapter.fold`: {fix}" if "`tied:" in fix else fix


def refuse_quantized(site: Site, operands: Mapping[str, Node]) -> OpError | None:
    """Codes of a quantized weight cannot be averaged."""
    if site.module.is_quantized and (QUANTIZED_PARTS.fullmatch(site.path) or site.path == f"{site.module.path}.weight"):
        fix = "run `quantize.dequantize` in an edit before, and quantize again in one after"
        return site.refuse("is a part of a quantized weight: its codes cannot be merged", fix)
    for name, node in operands.items():
        if site.nodes[site.path].type.dtype.is_float and not node.type.dtype.is_float:
            what = f"is {node.type} in `{name}`, {site.nodes[site.path].type} in the source"
            return site.refuse(what, f"dequantize `{name}` into a checkpoint of its own first")
    return None


def padded(site: Site, operands: Mapping[str, Node], *, pad_vocab: bool) -> Mapping[str, Node]:
    """`operands` of one shape. Raises OpError where they differ, but for the rows of a vocabulary with `pad_vocab`."""
    shapes = {name: node.type.shape for name, node in operands.items()}
    if len(set(shapes.values())) == 1:
        return operands
    listed = ", ".join(f"{list(shape)} in `{name}`" for name, shape in shapes.items())
    is_vocabulary = EMBEDDINGS.fullmatch(site.module.path) or HEADS.fullmatch(site.module.path)
    if not is_vocabulary or len({shape[1:] for shape in shapes.values()}) > 1:
        fix = "merge models of one architecture, or leave the tensor out of `tensors`: the source's is kept"
        raise site.refuse(f"has unlike shapes: {listed}", fix)
    if not pad_vocab:
        fix = "write `pad_vocab: true` to take rows that a model lacks from the first one that has them"
        raise site.refuse(f"has vocabularies of different size: {listed}", fix)
    largest = max(operands.values(), key=lambda node: node.type.shape[0])
    try:
        return {
            name: node if node.type.shape == largest.type.shape else site.graph.apply(PadRows(), node, largest)[0]
            for name, node in operands.items()
        }
    except ValueError as error:
        raise site.refuse(str(error), "give all models one dtype first") from None


def unlike_dtypes(site: Site, operands: Mapping[str, Node]) -> OpError | None:
    """Merging bf16 with f32 is fine in float32, but seldom meant."""
    dtypes = {name: node.type.dtype for name, node in operands.items()}
    if len(set(dtypes.values())) == 1:
        return None
    listed = ", ".join(f"{dtype} in `{name}`" for name, dtype in dtypes.items())
    fix = "write `mixed_dtypes: true` to merge them as they are; the result has the source's dtype"
    return site.refuse(f"has unlike dtypes: {listed}", fix)


def unused_tensors(model: Model, scene: Scene) -> OpError | None:
    """A model's tensors that the source does not have would be lost."""
    extra = [name for name in model.nodes if name not in scene.names]
    if not extra:
        return None
    common = len(model.nodes) - len(extra)
    mine, theirs = scene.config.get("model_type"), model.config.get("model_type")
    if not common or mine != theirs:
        kinds = f": a {theirs!r}, where the source is a {mine!r}" if mine != theirs else ""
        what = f"`{model.name}` shares {common} of its {len(model.nodes)} tensors' names with the source{kinds}"
        what += f" (`{extra[0]}` there, `{next(iter(scene.names))}` here)"
        return OpError(Problem(what, fix="merge models of one architecture"))
    heads = [name for name in extra if module_of(name) in model.architecture.heads]
    if heads == extra and scene.architecture.is_tied(scene.config):
        what = f"the source ties its output head to the embedding, `{model.name}` does not: {', '.join(extra)}"
        fix = "write `unused: ignore` to leave that head out"
        return OpError(Problem(what, fix=f"{fix}, or make the other model the source"))
    what = f"`{model.name}` has {len(extra)} tensors that the source lacks: {', '.join(extra[:3])}"
    fix = "write `unused: ignore` to leave them out, or name the tensors to be merged with `tensors`"
    return OpError(Problem(what, fix=fix))
