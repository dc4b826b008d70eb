"""`attach.lora`."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Literal

from surgery.checkpoint.architecture import Architecture, Kind
from surgery.checkpoint.modules import Module
from surgery.errors import OpError, Problem
from surgery.formats.bitsandbytes import dequantized
from surgery.formats.lora import factor_names, factor_suffixes
from surgery.formats.peft.attaching import Task, in_live_order, is_tied, key, runtime_path, target_modules, task_type
from surgery.formats.peft.live_experts import can_adapt_experts, expert_problems, is_taken_for_expert
from surgery.formats.peft.patterns import ending_in
from surgery.formats.peft.saved import Saved, saved_modules
from surgery.formats.peft.settings import Settings
from surgery.graph import Node
from surgery.numerics.cast import Cast
from surgery.numerics.draws import LoraDraws, LoraShape, Script
from surgery.numerics.lowrank import PrincipalComponents, Residual
from surgery.numerics.magnitude import Norms
from surgery.numerics.transpose import Transpose
from surgery.op import Attach, Attached, Rewrite, Scene, Site, doc
from surgery.regexes import Limit, flaw, matching
from surgery.types import DType

ADAPTED = (Kind.LINEAR, Kind.CONV1D, Kind.EMBEDDING, Kind.HEAD, Kind.EXPERT)
UNSCALED = (DType.F64, DType.F32, DType.F16, DType.BF16)
COUNT_SCHEMA = {"type": "integer", "minimum": 1}
ALPHA_SCHEMA = {"type": "number", "exclusiveMinimum": 0}
REGEXES_SCHEMA = {"type": "array", "items": {"type": "string", "minLength": 1}}


@dataclass(frozen=True, slots=True, kw_only=True)
class Lora(Attach):
    """A new LoRA adapter, ready to be trained: low-rank A and B on every matched module.

    Reads    weight  [out, in] of a Linear, a Conv1D's [in, out], an embedding's [tokens, width]; its values only for
             `dora` and `init: pissa`. 4-bit weights are fine
    Writes   adapters/<name>/ as PEFT reads it
             base_model.model.<module>.lora_A.weight  f32 [rank, in],  .lora_B.weight  f32 [out, rank]
             base_model.model.<module>.lora_embedding_A  f32 [rank, tokens],  .lora_embedding_B  f32 [width, rank]
             base_model.model.<module>.lora_magnitude_vector  f32 [out]   (`dora`)
             with `init: pissa` also the weight, less what the factors hold
    Numbers  `kaiming` and `gaussian`: bit for bit what PEFT draws after torch.manual_seed(seed) for the checkpoint in
             its own dtype, to which it rounds: module after module as the live model goes through them. B is 0 (of
             an embedding A), so that nothing changes yet. 4-bit weights count as of the dtype they are read as
             `dora`: the norm of each output's weights, in the weight's dtype
             `pissa`: the first `rank` singular triplets of the weight, exact up to a side of 1024, above by a random
             sketch; B = U·√S, A = √S·Vh, over √scaling; the weight becomes W - scaling·BA, rounded to its dtype
    Mind     modules are named as the live model's class, the first of `architectures` in config.json, names them
             the head of a class ForSequenceClassification, ForTokenClassification or ForQuestionAnswering goes along
             whole, as PEFT has it; that of another class, such as an image classifier's, by `modules_to_save`
             `all-linear` leaves out heads and experts; on a 4-bit base the draws are PEFT's where the base was bf16
             where the checkpoint's architecture is not in the table, the order of draws is that of the names, and
             PEFT's own draws may differ
             experts are fused in the live model: PEFT makes one adapter of those of single experts, for some
             architectures, if all are adapted alike; what it draws for fused experts is something else
             `tied: alone` makes PEFT warn; `tied: both` is for embeddings called `embed_tokens`
    Raises   OpError for a norm, a convolution or a router; a rank larger than the matrix; an embedding or output
             head that share one tensor, without `tied`; a fused tensor of experts, or experts that PEFT cannot fuse
    Source   LoRA, arXiv 2106.09685; rsLoRA, 2312.03732; DoRA, 2402.09353; PiSSA, 2404.02948; PEFT 0.21.2
    """

    rank: int = field(default=8, metadata=doc("The rank.", schema=COUNT_SCHEMA))
    alpha: float = field(default=8, metadata=doc("The product BA is scaled by alpha / rank.", schema=ALPHA_SCHEMA))
    rslora: bool = field(default=False, metadata=doc("Scale by alpha / √rank instead."))
    dora: bool = field(default=False, metadata=doc("Decompose the weight into magnitude and direction."))
    rank_pattern: Mapping[str, int] = field(
        default_factory=dict[str, int],
        metadata=doc(
            "Ranks of some modules, by the end of their path or a regex for it, as in PEFT; the first that matches.",
            schema={"type": "object", "additionalProperties": COUNT_SCHEMA},
        ),
    )
    alpha_pattern: Mapping[str, float] = field(
        default_factory=dict[str, float],
        metadata=doc(
            "Alphas of some modules, likewise.", schema={"type": "object", "additionalProperties": ALPHA_SCHEMA}
        ),
    )
    init: Literal["kaiming", "gaussian", "pissa"] = field(default="kaiming", metadata=doc("How the factors begin."))
    dropout: float = field(
        default=0.0,
        metadata=doc("Dropout in training, before A.", schema={"type": "number", "minimum": 0, "exclusiveMaximum": 1}),
    )
    tied: Literal["alone", "both"] | None = field(
        default=None,
        metadata=doc(
            "What to do where the input embedding and the output head are one tensor: adapt the selected one `alone` "
            "(merging such an adapter unties them), or `both` by the same factors (PEFT's ensure_weight_tying)."
        ),
    )
    modules_to_save: tuple[str, ...] = field(
        default=(),
        metadata=doc(
            "Regexes of modules that the adapter holds whole, to be trained with it.",
            schema=REGEXES_SCHEMA,
            examples=(["classifier"],),
        ),
    )
    task: Task | None = field(
        default=None, metadata=doc("PEFT's task_type. Default: by the class that config.json names.", key="task_type")
    )

    def in_all_linear(self, module: Module, architecture: Architecture) -> bool:
        """As in PEFT: experts are fused at run time, where they are no Linears."""
        del architecture
        return module.kind in (Kind.LINEAR, Kind.CONV1D)

    def check(self, patterns: tuple[re.Pattern[str], ...]) -> str:
        """Options that exclude each other, and regexes that are none."""
        if self.dora and self.init == "pissa":
            return "`dora` and `init: pissa` exclude each other: PiSSA's factors are not zero, nor is DoRA's direction"
        if self.dora and self.tied == "both":
            return "`dora` and `tied: both` exclude each other: PEFT does not tie magnitudes"
        for option, regexes in (
            ("rank_pattern", self.rank_pattern),
            ("alpha_pattern", self.alpha_pattern),
            ("modules_to_save", self.modules_to_save),
        ):
            for regex in regexes:
                if reason := flaw(regex):
                    return f"`{option}`: `{regex}` is no regex: {reason}"
        return ""

    def begin(self, scene: Scene) -> Callable[[Site], Rewrite]:
        """The order of draws for all sites, then each site's factors."""
        self._check_all(scene)
        saved = self._saved(scene)
        settings = self._settings()
        weights, refusals = self._weights(scene, settings)
        order = [site for site in in_live_order(scene.sites, scene) if site.path in weights]
        shapes = [self._shape(site, weights[site.path], settings) for site in order]
        shapes += [_of_head(shape) for site, shape in zip(order, shapes, strict=True) if self._has_tied_head(site)]
        script = Script(shapes, "gaussian" if self.init == "gaussian" else "kaiming")
        places = {site.path: place for place, site in enumerate(order)}

        def rewrite(site: Site) -> Rewrite:
            if site.path in refusals:
                raise refusals[site.path]
            whole = dict(saved.tensors) if site is scene.sites[0] else {}
            if self.init == "pissa":
                return self._principal(site, weights[site.path], settings, whole)
            pair = site.graph.apply(LoraDraws(scene.seed, script, places[site.path]))
            if self._has_tied_head(site):
                pair = site.graph.apply(LoraDraws(scene.seed, script, len(order)))
            added = {**self._named(site, pair), **self._magnitude(site, weights[site.path]), **whole}
            return Rewrite((), {}, adds=added)

        return rewrite

    def _weights(self, scene: Scene, settings: Settings) -> tuple[dict[str, Node], dict[str, OpError]]:
        weights: dict[str, Node] = {}
        refusals: dict[str, OpError] = {}
        for site in scene.sites:
            try:
                weights[site.path] = self._weight(site, settings)
            except OpError as error:
                refusals[site.path] = error
        return weights, refusals

    def _saved(self, scene: Scene) -> Saved:
        saved = saved_modules(self.modules_to_save, scene, self._task(scene))
        tied = [path for path in saved.paths if is_tied(path, scene)]
        if tied:
            what = f"`{tied[0]}` saved whole would be trained, and the output head that shares its tensor would not"
            raise OpError(Problem(what, fix="adapt it by `modules`, with `tied`"))
        return saved

    def _task(self, scene: Scene) -> str | None:
        return self.task or task_type(scene.config)

    def _has_tied_head(self, site: Site) -> bool:
        return self.tied == "both" and site.module.kind is Kind.EMBEDDING and is_tied(site.path, site.scene)

    def _named(self, site: Site, pair: Iterable[Node]) -> dict[str, Node]:
        """A and B. Where the head is tied they are the head's; the embedding's are these, turned and exchanged."""
        a, b = pair
        names = factor_suffixes(embedding=site.module.kind is Kind.EMBEDDING)
        if not self._has_tied_head(site):
            return {key(site.path, name, site.scene): node for name, node in zip(names, (a, b), strict=True)}
        (turned_a,), (turned_b,) = (site.graph.apply(Transpose(), factor) for factor in (a, b))
        of_head = zip(factor_names(site.architecture.heads[0], embedding=False), (a, b), strict=True)
        own = zip(names, (turned_b, turned_a), strict=True)
        return {key(site.path, name, site.scene): node for name, node in own} | dict(of_head)

    def _settings(self) -> Settings:
        return Settings(
            {
                "r": self.rank,
                "lora_alpha": self.alpha,
                "rank_pattern": self.rank_pattern,
                "alpha_pattern": self.alpha_pattern,
                "use_rslora": self.rslora,
            }
        )

    def _check_all(self, scene: Scene) -> None:
        """A pattern that stands for no selected module was meant for one; experts are adapted all alike."""
        paths = [runtime_path(site.path, scene) for site in scene.sites]
        patterns = {"rank_pattern": self.rank_pattern, "alpha_pattern": self.alpha_pattern}
        unused = [
            Problem(f"`{option}`: `{pattern}` matches none of the {len(paths)} modules selected", fix="correct it")
            for option, given in patterns.items()
            for pattern in given
            if not matching(ending_in(pattern), paths, Limit(f" of `{option}`"))
        ]
        settings = {"dora": self.dora, "rslora": self.rslora, "dropout": self.dropout > 0}
        experts = expert_problems(scene, [*self.rank_pattern, *self.alpha_pattern], settings)
        problems = [*unused, *experts]
        if problems:
            raise OpError(*problems)

    def _weight(self, site: Site, settings: Settings) -> Node:
        """The weight as floats. Raises OpError for one that a LoRA of PEFT cannot be put on."""
        _check_kind(site)
        if is_tied(site.path, site.scene):
            self._check_tied(site, settings)
        name = f"{site.path}.weight"
        weight = dequantized(site, None).gives[name] if site.module.is_quantized else site.nodes[name]
        if not weight.type.dtype.is_float or len(weight.type.shape) != 2:
            raise site.refuse(f"is {weight.type}, no matrix of floats", "dequantize it first, or take it away")
        if self.dora and weight.type.dtype not in UNSCALED:
            what = f"is {weight.type}, whose rows may have scales of their own, which `dora` would leave out"
            raise site.refuse(what, "dequantize it first, or do without `dora`")
        rank = settings.rank(runtime_path(site.path, site.scene))
        if rank > min(weight.type.shape):
            what = f"is {weight.type}, whose rank is at most {min(weight.type.shape)}: {rank} is larger"
            raise site.refuse(what, "lower `rank`, or give it its own in `rank_pattern`")
        return weight

    def _check_tied(self, site: Site, settings: Settings) -> None:
        if self.tied is None:
            what = "shares its tensor with the output head"
            fix = "say by `tied` whether it is adapted `alone`, so that merging unties the two, or `both` are alike"
            raise site.refuse(what, fix)
        if self.tied == "alone":
            return
        if site.path.rpartition(".")[2] != "embed_tokens":
            what = "shares its tensor with the output head, and PEFT 0.21 ties the factors of an `embed_tokens` only"
            raise site.refuse(what, "write `tied: alone`, or take it away with `except`")
        path, head = runtime_path(site.path, site.scene), site.architecture.heads[0]
        if (settings.rank(path), settings.alpha(path)) != (settings.rank(head), settings.alpha(head)):
            what = f"has another rank or alpha than `{head}`, which has the same factors by `tied: both`"
            raise site.refuse(what, f"let the pattern match `{head}` too: `embed_tokens|{head}`")

    def _shape(self, site: Site, weight: Node, settings: Settings) -> LoraShape:
        rows, columns = weight.type.shape
        is_embedding = site.module.kind is Kind.EMBEDDING
        if is_embedding or site.module.kind is Kind.CONV1D:
            rows, columns = columns, rows
        rank = settings.rank(runtime_path(site.path, site.scene))
        return LoraShape(columns, rows, rank, is_embedding, rounded_to=_rounding(weight))

    def _magnitude(self, site: Site, weight: Node) -> dict[str, Node]:
        if not self.dora:
            return {}
        transposed = site.module.kind in (Kind.CONV1D, Kind.EMBEDDING)
        (norms,) = site.graph.apply(Norms(weight.type.shape, transposed), weight)
        if _rounding(weight) is not DType.F32:
            (rounded,) = site.graph.apply(Cast(_rounding(weight)), norms)
            (norms,) = site.graph.apply(Cast(DType.F32), rounded)
        return {key(site.path, "lora_magnitude_vector", site.scene): norms}

    def _principal(self, site: Site, weight: Node, settings: Settings, whole: Mapping[str, Node]) -> Rewrite:
        """PiSSA's factors, and what they leave of the weight."""
        if site.module.is_quantized:
            raise site.refuse("is quantized, and PiSSA changes the weight", "attach before `quantize` in the spec")
        if site.module.kind is Kind.EMBEDDING:
            raise site.refuse("is an embedding, for which PEFT has no PiSSA", "take it away with `except`")
        path = runtime_path(site.path, site.scene)
        rank = settings.rank(path)
        scaling = settings.scaling(path, rank)
        transposed = site.module.kind is Kind.CONV1D
        draw = f"{site.scene.seed} pissa {site.path}"
        try:
            a, b = site.graph.apply(PrincipalComponents(rank, scaling, transposed, draw), weight)
            (residual,) = site.graph.apply(Residual(scaling, transposed), weight, a, b)
        except ValueError as error:
            raise site.refuse(f"has no principal components: {error}", "take it away with `except`") from None
        name = f"{site.path}.weight"
        return Rewrite((name,), {name: residual}, adds={**self._named(site, (a, b)), **whole})

    def adapter_config(self, attached: Attached) -> Mapping[str, object]:
        """As PEFT's `save_pretrained` writes it."""
        scene = attached.scene
        kinds = {site.module.kind for site in scene.sites}
        both = self.tied == "both" and any(is_tied(site.path, scene) for site in scene.sites)
        return {
            "peft_type": "LORA",
            "task_type": self._task(scene),
            "base_model_name_or_path": attached.base_name,
            "revision": attached.revision,
            "inference_mode": True,
            "r": self.rank,
            "lora_alpha": self.alpha,
            "lora_dropout": self.dropout,
            "target_modules": target_modules((site.path for site in scene.sites), scene),
            "modules_to_save": list(self._saved(scene).names) or None,
            "rank_pattern": dict(self.rank_pattern),
            "alpha_pattern": dict(self.alpha_pattern),
            "fan_in_fan_out": Kind.CONV1D in kinds,
            "bias": "none",
            "use_rslora": self.rslora,
            "use_dora": self.dora,
            "init_lora_weights": "gaussian" if self.init == "gaussian" else True,
            **({"ensure_weight_tying": True} if both else {}),
        }


def _check_kind(site: Site) -> None:
    """Raises OpError for what is no matrix that PEFT finds in the live model."""
    kind, model_type = site.module.kind, site.config.get("model_type")
    if f"{site.path}.weight" not in site.nodes:
        what = f"has no weight; it holds {', '.join(site.nodes)}"
        fused = "experts fused in one tensor take PEFT's `target_parameters`, which is not written here"
        raise site.refuse(what, fused if kind is Kind.EXPERT else "narrow `modules` to Linears")
    if kind not in ADAPTED:
        article = "an" if kind in (Kind.ROUTER, Kind.OTHER) else "a"
        what = f"is {article} {kind.value} ({site.nodes[f'{site.path}.weight'].type}), which takes no low-rank factors"
        raise site.refuse(what, "narrow `modules`, or take it away with `except`")
    if kind is Kind.EXPERT and not can_adapt_experts(site.scene):
        what = f"is an expert; PEFT 0.21 loads no adapters for single ones of a {model_type}"
        raise site.refuse(what, "take it away with `except`; the live model has it by PEFT's `target_parameters`")
    if is_taken_for_expert(site):
        what = f"ends like an expert's Linear, which PEFT 0.21 takes it for in a {model_type}"
        raise site.refuse(what, "take it away with `except`")


def _rounding(weight: Node) -> DType:
    """The dtype in which PEFT makes what it then widens to f32."""
    return weight.type.dtype if weight.type.dtype in (DType.BF16, DType.F16) else DType.F32


def _of_head(embedding: LoraShape) -> LoraShape:
    """The output head that shares an embedding's tensor: PEFT draws it last, and gives the embedding its values."""
    return replace(
        embedding,
        num_inputs=embedding.num_outputs,
        num_outputs=embedding.num_inputs,
        is_embedding=False,
        is_turned=True,
    )
