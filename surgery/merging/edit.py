"""`Merge`: the edit that all merge methods are; a method says which numbers it takes and which kernel it is."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import ClassVar, Literal, cast

from surgery.errors import OpError, Problem, problems_of
from surgery.formats.vocabulary import with_vocabulary
from surgery.graph import Kernel, Node
from surgery.merging.operands import Operands, padded, refuse_quantized, unlike_dtypes, unused_tensors
from surgery.merging.schedule import SCHEDULE_SCHEMA, Depths, Schedule
from surgery.merging.tokenizers import unlike_tokens
from surgery.numerics.merge.same import Same
from surgery.op import SOURCE, Finished, Op, Rewrite, Scene, Selects, Site, doc
from surgery.types import DType

__all__ = ["Merge", "Recipe", "models_field", "number_field"]

NUMBER_HINT = "A number, a list (a gradient over depth), or {regex: number}"


def models_field(*, least: int = 1, most: int = 0, **numbers: float | None) -> Mapping[str, object]:
    """The `models` of a method whose models take `numbers`: default by name, None where one must be given."""
    required = [name for name, default in numbers.items() if default is None]
    each: dict[str, object] = {
        "type": ["object", "null"] if not required else "object",
        "additionalProperties": False,
        "properties": {
            name: {**SCHEDULE_SCHEMA, **({} if default is None else {"default": default})}
            for name, default in numbers.items()
        },
        **({"required": required} if required else {}),
    }
    limits: dict[str, object] = {"minProperties": least, **({"maxProperties": most} if most else {})}
    choices: list[dict[str, object]] = [{"type": "object", "additionalProperties": each, **limits}]
    if not required:
        choices.append({"type": "string", "minLength": 1})
        items: dict[str, object] = {"minItems": least, **({"maxItems": most} if most else {})}
        choices.append({"type": "array", "items": {"type": "string"}, "uniqueItems": True, **items})
    per_model = f", each with {', '.join(numbers)}" if numbers else ""
    text = f"The models to be merged by their names in the spec{per_model}; `source` is the source. {NUMBER_HINT}."
    return {
        **doc(text if numbers else text.partition(NUMBER_HINT)[0].strip(), schema={"anyOf": choices}),
        "numbers": numbers,
    }


def number_field(text: str, *, key: str = "") -> Mapping[str, object]:
    """The `metadata` of a number of the whole edit that may change over depth and names."""
    return doc(f"{text} {NUMBER_HINT}.", key=key, schema=SCHEDULE_SCHEMA)


@dataclass(frozen=True, slots=True)
class Recipe:
    """What a method is told of one tensor."""

    tensor: str
    shape: tuple[int, ...]
    models: tuple[str, ...]  # without the base
    has_base: bool
    compute: DType | None  # None: the dtype that the inputs' dtypes promote to
    dtype: DType
    seed: int
    numbers: Mapping[str, tuple[float, ...]]  # of each model, in order of `models`
    shared: Mapping[str, float]  # of the edit


@dataclass(frozen=True, slots=True, kw_only=True)
class Merge(Op):
    """A merge of whole checkpoints; a subclass is a method."""

    selects: ClassVar[Selects] = "tensors"
    selects_all: ClassVar[bool] = True
    base: ClassVar[Literal["source", "optional", "none"]] = "source"
    num_models: ClassVar[int] = 0  # beside the base; 0: any number

    models: object
    compute_dtype: Literal["float32", "source"] = field(
        default="float32",
        metadata=doc(
            "`float32`: compute in float32 and round once to the source's dtype. `source`: compute in the tensors' "
            "own dtype and round after every step, with mergekit's bits."
        ),
    )
    missing: Literal["error", "source"] = field(
        default="error",
        metadata=doc("A tensor that a model lacks: an error, or the source's own stands in for it."),
    )
    unused: Literal["error", "ignore"] = field(
        default="error",
        metadata=doc("Tensors of a model that the source lacks: an error, or left out."),
    )
    tied: Literal["error", "embedding"] = field(
        default="error",
        metadata=doc("An output head that a model ties to its embedding: an error, or the embedding stands for it."),
    )
    pad_vocab: bool = field(
        default=False,
        metadata=doc("Vocabularies of different size: rows that a model lacks are those of the first that has them."),
    )
    mixed_dtypes: bool = field(
        default=False, metadata=doc("Models of unlike dtypes are merged; the result has the source's.")
    )
    tokenizers: Literal["same", "any"] = field(
        default="same",
        metadata=doc(
            "`same`: models whose tokenizers give tokens other ids are an error. `any`: the source's is kept."
        ),
    )
    any_base: bool = field(
        default=False, metadata=doc("Take an adapter that was extracted for another base than the source.")
    )

    def kernel(self, recipe: Recipe) -> Kernel:
        """The kernel that merges one tensor: inputs the base, if there is one, then the models in order."""
        raise NotImplementedError

    def model_names(self) -> Iterable[str]:
        """The models in order."""
        if isinstance(self.models, str):
            return (self.models,)
        return tuple(cast("Iterable[str]", self.models))

    def begin(self, scene: Scene) -> Callable[[Site], Rewrite]:
        """Checks what concerns the models as wholes, then merges tensor by tensor."""
        return _Merging(self, scene).rewrite

    def config(self, config: Mapping[str, object], finished: Finished) -> Mapping[str, object]:
        """`vocab_size`, where `pad_vocab` made it grow."""
        if not self.pad_vocab:
            return config
        return with_vocabulary(config, finished)


class _Merging:
    """One merge edit at work."""

    def __init__(self, op: Merge, scene: Scene) -> None:
        self._op = op
        self._scene = scene
        names = list(op.model_names())
        self._has_base = op.base == "source" or (op.base == "optional" and SOURCE not in names)
        self._models = [name for name in names if not (self._has_base and name == SOURCE)]
        self._check_models(names)
        self._operands = Operands(scene, names, any_base=op.any_base)
        self._depths = Depths(scene.names)
        self._numbers = self._schedules()
        self._shared = self._shared_schedules()
        self._check_wholes()
        self._check_schedules()

    def _check_models(self, names: list[str]) -> None:
        if self._has_base and SOURCE in names:
            what = f"`{SOURCE}` is the base of `{self._op.name}`, it cannot be one of its models too"
            raise OpError(Problem(what, fix=f"take `{SOURCE}` out of `models`"))
        wanted = self._op.num_models
        if wanted and len(self._models) != wanted:
            others = "" if self._has_base else f", `{SOURCE}` among them or not"
            what = f"`{self._op.name}` merges {wanted} models{others}; {len(self._models)} are given"
            raise OpError(Problem(what, fix=f"name {wanted} in `models`"))
        if self._scene.models[SOURCE].checkpoint.is_adapter:
            fix = "`adapter.combine` merges adapters into one"
            raise OpError(Problem("the source is an adapter, not a checkpoint", fix=fix))

    def _schedules(self) -> dict[str, list[Schedule]]:
        (models,) = (item for item in dataclasses.fields(self._op) if item.name == "models")
        defaults = cast("Mapping[str, float | None]", models.metadata["numbers"])
        given: Mapping[str, Mapping[str, object] | None] = {}
        listed = self._op.models
        if isinstance(listed, Mapping):
            given = cast("Mapping[str, Mapping[str, object] | None]", listed)
        return {
            number: [
                Schedule.parse(f"models.{model}.{number}", (given.get(model) or {}).get(number), default)
                for model in self._models
            ]
            for number, default in defaults.items()
        }

    def _shared_schedules(self) -> dict[str, Schedule]:
        shared = [item for item in dataclasses.fields(self._op) if item.metadata.get("schema") is SCHEDULE_SCHEMA]
        return {
            item.name: Schedule.parse(item.metadata["key"] or item.name, getattr(self._op, item.name))
            for item in shared
        }

    def _check_wholes(self) -> None:
        source = self._scene.models[SOURCE].checkpoint
        errors: list[OpError] = []
        merges_all = len(self._scene.sites) == len(self._scene.names)
        for model in self._operands.checkpoints:
            unused = unused_tensors(model, self._scene) if merges_all and self._op.unused == "error" else None
            errors += [unused] if unused else []
            unlike = unlike_tokens(source, model.checkpoint) if self._op.tokenizers == "same" else ""
            if unlike:
                what = f"the tokenizer of `{model.name}` differs from the source's in {unlike}"
                fix = "merge models with one tokenizer, or write `tokenizers: any`: the source's is kept"
                errors.append(OpError(Problem(what, fix=fix)))
        if errors:
            raise OpError(*problems_of(errors))

    def _check_schedules(self) -> None:
        schedules = [*(item for items in self._numbers.values() for item in items), *self._shared.values()]
        errors: list[OpError] = []
        for schedule in schedules:
            for site in self._scene.sites if schedule.unused else ():
                schedule.see(site.path)
            try:
                schedule.check_used()
            except OpError as error:
                errors.append(error)
        if errors:
            raise OpError(*problems_of(errors))

    def rewrite(self, site: Site) -> Rewrite:
        """The merged tensor."""
        operands = self._found(site)
        own = site.nodes[site.path]
        refused = refuse_quantized(site, operands)
        if refused:
            raise refused
        if SOURCE not in operands:  # it has no part in the result, but is what the config and other tensors fit
            padded(site, {SOURCE: own, **operands}, pad_vocab=self._op.pad_vocab)
        operands = padded(site, operands, pad_vocab=self._op.pad_vocab)
        if not own.type.dtype.is_float:
            merged = self._same(site, {SOURCE: own, **operands})
        elif not own.type.num_elements:
            merged = own
        else:
            merged = self._merged(site, operands)
        # Where the source itself is no operand, it is left out on purpose; elsewhere conservation keeps watch.
        return Rewrite((site.path,), {site.path: merged}, drops=() if SOURCE in operands else (site.path,))

    def _found(self, site: Site) -> dict[str, Node]:
        names = [SOURCE, *self._models] if self._has_base else self._models
        found: dict[str, Node] = {}
        for name in names:
            node = self._operands.find(name, site.path)
            if node is None:
                node = self._stand_in(site, name)
            found[name] = node
        return found

    def _stand_in(self, site: Site, model: str) -> Node:
        embedding = self._operands.tied(model, site.path)
        if embedding is not None:
            if self._op.tied == "embedding":
                return embedding
            what = f"is tied to the embedding in `{model}`, and a tensor of its own in the source"
            fix = "write `tied: embedding` to merge with that model's embedding, or leave it out of `tensors`"
            raise site.refuse(what, fix)
        if self._op.missing == "source":
            return self._scene.names[site.path]
        fix = "write `missing: source` to let the source's own stand in for it, or leave it out of `tensors`"
        raise site.refuse(f"is not in `{model}`", fix)

    def _same(self, site: Site, operands: Mapping[str, Node]) -> Node:
        nodes = list(dict.fromkeys(operands.values()))
        try:
            return site.graph.apply(Same(len(nodes)), *nodes)[0] if len(nodes) > 1 else nodes[0]
        except ValueError as error:
            raise site.refuse(f"cannot be merged: {error}", "leave it out of `tensors`: the source's is kept") from None

    def _merged(self, site: Site, operands: Mapping[str, Node]) -> Node:
        unlike = None if self._op.mixed_dtypes else unlike_dtypes(site, {SOURCE: site.nodes[site.path], **operands})
        if unlike:
            raise unlike
        depth = self._depths.of(site.path)
        first = next(iter(operands.values()))
        dtypes = {node.type.dtype for node in operands.values()}
        own = dtypes.pop() if len(dtypes) == 1 else None
        recipe = Recipe(
            tensor=site.path,
            shape=first.type.shape,
            models=tuple(self._models),
            has_base=self._has_base,
            compute=DType.F32 if self._op.compute_dtype == "float32" else own,
            dtype=site.nodes[site.path].type.dtype,
            seed=self._scene.seed,
            numbers={name: tuple(item.at(site.path, depth) for item in items) for name, items in self._numbers.items()},
            shared={name: item.at(site.path, depth) for name, item in self._shared.items()},
        )
        try:
            return site.graph.apply(self._op.kernel(recipe), *operands.values())[0]
        except ValueError as error:
            raise site.refuse(f"cannot be merged: {error}", "leave it out of `tensors`: the source's is kept") from None
