"""`adapter.extract`."""

from __future__ import annotations

import re
from bisect import bisect_right
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import ClassVar, Literal

from surgery.checkpoint.architecture import Kind
from surgery.errors import OpError, Problem
from surgery.formats.lora import PREFIX, factor_names, factor_ranks, is_factor, patterned
from surgery.formats.peft.attaching import is_tied, task_type
from surgery.graph import Node
from surgery.numerics.dtypes import float_dtype
from surgery.numerics.lowrank import LowRankDifference
from surgery.op import SOURCE, Finished, Model, Op, Rewrite, Scene, Site, doc
from surgery.regexes import flaw, matching
from surgery.sizes import SIZE_PATTERN, format_decimal, parse_size

DEFAULT_RANK = 16
DEFAULT_MAX_RANK = 64
HEADER_BYTES = 120  # of a tensor in the file's header, beside its name
WITHOUT_HEAD = ("CAUSAL_LM", "SEQ_2_SEQ_LM")  # tasks for which PEFT trains no head of its own
TRANSPOSED = (Kind.CONV1D, Kind.EMBEDDING)  # kinds whose factors are those of the transposed weight

COUNT_SCHEMA = {"type": "integer", "minimum": 1}
SHARE_SCHEMA = {"type": "number", "exclusiveMinimum": 0, "maximum": 1}
SIZE_SCHEMA = {"anyOf": [{"type": "string", "pattern": SIZE_PATTERN}, {"type": "integer", "minimum": 1}]}
PATTERNS_SCHEMA = {"type": "array", "items": {"type": "string", "minLength": 1}}


@dataclass(frozen=True, slots=True)
class Extract(Op):
    """A LoRA adapter that turns the source, a base model, into a fine-tuned one as nearly as its rank allows.

    Reads    weight  f32|f16|bf16 [out, in] of the source and of the model that `models` names; a Conv1D's
             [in, out] or an embedding's [tokens, width] is turned first
    Writes   an adapter directory, as PEFT reads it
             base_model.model.<module>.lora_A.weight  [rank, in],  .lora_B.weight  [out, rank]
             base_model.model.<module>.lora_embedding_A  [rank, tokens],  .lora_embedding_B  [width, rank]
             adapter_config.json  every module by its path; `rank_pattern` for modules too small for the rank
    Numbers  tuned - base in f32 = U·S·Vh, cut to the rank; B = U·√S, A = √S·Vh, over √(alpha/rank); the largest
             |component| of each column of U is positive. `svd: auto` is exact up to a side of 1024; above, where
             the rank is small, a random sketch of 2·rank + 16 columns with four power iterations (its draws a
             function of seed and module): 0.2 % more error than the best of that rank where the singular values
             do not decay at all, 0.001 % where they do
    Mind     what is not selected is not compared: a norm, a bias or an embedding that was trained too is lost
             without a word, unless `modules_to_save` copies its module
             `energy` cannot make the file smaller: shapes are known before any weight is read, so each module has
             `max_rank` rows, zeros beyond those that the energy needs
             modules are named as they are on disk; a class whose paths differ (a BertModel's checkpoint in a
             BertForMaskedLM) does not find them
    Error    what the rank leaves out of the difference: max and RMS of each module are in the manifest
    Raises   OpError for a weight that is no matrix, is quantized, is tied to the output head, or that the
             fine-tuned model lacks or has in another shape; for a NaN or Inf (the index is named)
    Source   mergekit 0.1.5, `mergekit-extract-lora`; Halko, Martinsson, Tropp, arXiv 0909.4061
    """

    produces: ClassVar[Literal["same", "adapter"]] = "adapter"

    models: str = field(metadata=doc("The fine-tuned model, by its name under `models` of the spec."))
    rank: int | None = field(
        default=None, metadata=doc(f"The rank of every module. Default {DEFAULT_RANK}.", schema=COUNT_SCHEMA)
    )
    total_size: str | int | None = field(
        default=None,
        metadata=doc(
            "Instead of `rank`: the largest size of the file, in which all modules get the same, largest rank.",
            schema=SIZE_SCHEMA,
            examples=("50MB",),
        ),
    )
    energy: float | None = field(
        default=None,
        metadata=doc(
            "Instead of `rank`: the share of the squared singular values of each module that is kept.",
            schema=SHARE_SCHEMA,
            examples=(0.9,),
        ),
    )
    max_rank: int | None = field(
        default=None,
        metadata=doc(
            f"With `energy`: rows of every factor, and the most it may need. Default {DEFAULT_MAX_RANK}, or what "
            "`total_size` allows.",
            schema=COUNT_SCHEMA,
        ),
    )
    alpha: float | None = field(
        default=None,
        metadata=doc(
            "The adapter's alpha; the factors make up for the scaling alpha/rank. Default: each module's rank.",
            schema={"type": "number", "exclusiveMinimum": 0},
        ),
    )
    svd: Literal["auto", "exact", "randomized"] = field(
        default="auto", metadata=doc("How large matrices are decomposed.")
    )
    dtype: Literal["float32", "float16", "bfloat16"] = field(
        default="float32", metadata=doc("The dtype of the factors; PEFT writes float32.")
    )
    modules_to_save: tuple[str, ...] = field(
        default=(),
        metadata=doc(
            "Regexes of modules that the adapter holds whole, as the fine-tuned model has them.",
            schema=PATTERNS_SCHEMA,
            examples=(["lm_head"],),
        ),
    )

    def model_names(self) -> Iterable[str]:
        """The base and the fine-tuned model."""
        return (SOURCE, self.models)

    def check(self, patterns: tuple[re.Pattern[str], ...]) -> str:
        """Options that exclude each other, sizes and regexes that are none."""
        if self.models == SOURCE:
            return "`models` names the source, which is the base: name the fine-tuned model"
        limits = [name for name in ("rank", "max_rank", "total_size") if getattr(self, name) is not None]
        if len(limits) > 1:
            return f"`{limits[0]}` and `{limits[1]}` both limit the rank: give one"
        if self.energy is not None and self.rank is not None:
            return "`rank` and `energy` exclude each other: with `energy`, `max_rank` is the limit"
        if self.energy is None and self.max_rank is not None:
            return "`max_rank` is for `energy`: give that too, or `rank` alone"
        return _size_mistake(self.total_size) or _regex_mistake(self.modules_to_save)

    def begin(self, scene: Scene) -> Callable[[Site], Rewrite]:
        """Ranks and modules to save for all sites, then each site's factors; the first takes all else away."""
        tuned = scene.models[self.models]
        if tuned.checkpoint.is_adapter or scene.models[SOURCE].checkpoint.is_adapter:
            which = self.models if tuned.checkpoint.is_adapter else SOURCE
            raise OpError(
                Problem(f"`{which}` is an adapter", fix="give a full checkpoint, such as one with it folded in")
            )
        saved = self._saved(scene, tuned)
        ranks = self._ranks(scene.sites, saved)
        selected = {f"{site.path}.weight" for site in scene.sites}
        rest = tuple(name for name in scene.names if name not in selected)

        def rewrite(site: Site) -> Rewrite:
            name = f"{site.path}.weight"
            pair = self._factors(site, tuned, ranks.get(site.path, 1))
            if site is not scene.sites[0]:
                return Rewrite((name,), pair)
            return Rewrite((name, *rest), {**pair, **saved}, rest)

        return rewrite

    def _saved(self, scene: Scene, tuned: Model) -> dict[str, Node]:
        """The tensors of the modules to save, by the names that PEFT gives them."""
        selected = {site.path for site in scene.sites}
        paths = dict.fromkeys(name.rpartition(".")[0] for name in tuned.nodes)
        matched = {path for regex in self.modules_to_save for path in matching(regex, paths)}
        saved = [path for path in paths if path in matched]
        problems = [
            Problem(what, fix=fix) for what, fix in _saving_mistakes(self.modules_to_save, saved, paths, selected)
        ]
        if problems:
            raise OpError(*problems)
        return {PREFIX + name: node for name, node in tuned.nodes.items() if name.rpartition(".")[0] in saved}

    def _ranks(self, sites: Sequence[Site], saved: Mapping[str, Node]) -> dict[str, int]:
        """The rank of each module: the same for all, but for those too small for it."""
        shapes = {site.path: node.type.shape for site in sites for node in _weights(site) if len(node.type.shape) == 2}
        limit = self.rank or self.max_rank or (DEFAULT_MAX_RANK if self.energy else DEFAULT_RANK)
        if self.total_size is not None and shapes:
            limit = self._largest_rank(shapes, saved)
        return {path: min(limit, *shape) for path, shape in shapes.items()}

    def _largest_rank(self, shapes: Mapping[str, tuple[int, ...]], saved: Mapping[str, Node]) -> int:
        """The largest rank whose file is no larger than `total_size`."""
        allowed = parse_size(self.total_size or 0)
        largest = max(min(shape) for shape in shapes.values())
        rank = bisect_right(range(1, largest + 1), allowed, key=lambda rank: self._num_bytes(rank, shapes, saved))
        if rank == 0:
            least = format_decimal(self._num_bytes(1, shapes, saved))
            what = f"`total_size: {self.total_size}` is too small: rank 1 for {len(shapes)} modules takes {least}"
            raise OpError(Problem(what, fix="allow more, or select fewer modules"))
        return rank

    def _num_bytes(self, rank: int, shapes: Mapping[str, tuple[int, ...]], saved: Mapping[str, Node]) -> int:
        """The most that the adapter's file takes."""
        element_bytes = float_dtype(self.dtype).bits // 8
        factors = sum(min(rank, *shape) * sum(shape) * element_bytes for shape in shapes.values())
        headers = sum(2 * (HEADER_BYTES + len(PREFIX) + len(path)) for path in shapes)
        copies = sum(node.type.num_bytes + HEADER_BYTES + len(name) for name, node in saved.items())
        return factors + headers + copies + HEADER_BYTES

    def _factors(self, site: Site, tuned: Model, rank: int) -> dict[str, Node]:
        base = _base_weight(site)
        name = f"{site.path}.weight"
        if name not in tuned.nodes:
            fix = f"take it away with `except`, or give a fine-tuned model of this base as `{self.models}`"
            raise site.refuse(f"has no weight in `{self.models}`", fix)
        transposed = site.module.kind in TRANSPOSED
        scaling = 1.0 if self.alpha is None else self.alpha / rank
        kernel = LowRankDifference(
            rank, scaling, transposed, float_dtype(self.dtype), self.svd, f"{site.scene.seed}\0{site.path}", self.energy
        )
        try:
            pair = site.graph.apply(kernel, base, tuned.nodes[name])
        except ValueError as error:
            fix = "take it away with `except`, or copy it with `modules_to_save`; dequantize a quantized model first"
            raise site.refuse(f"cannot be extracted: {error}", fix) from None
        names = factor_names(site.path, embedding=site.module.kind is Kind.EMBEDDING)
        return dict(zip(names, pair, strict=True))

    def config(self, config: Mapping[str, object], finished: Finished) -> Mapping[str, object]:
        """adapter_config.json."""
        ranks = factor_ranks(finished.nodes)
        rank, pattern = patterned(ranks)
        whole = [name.removeprefix(PREFIX).rpartition(".")[0] for name in finished.nodes if not is_factor(name)]
        conv1d = finished.architecture.conv1d
        task = task_type(config)
        base, _, commit = finished.models[SOURCE].checkpoint.identity.partition("@")
        return {
            "peft_type": "LORA",
            "task_type": task if task in WITHOUT_HEAD else None,
            "base_model_name_or_path": base if commit else None,
            "revision": commit or None,
            "inference_mode": True,
            "r": rank,
            "lora_alpha": rank if self.alpha is None else self.alpha,
            "lora_dropout": 0.0,
            "target_modules": _targets(list(ranks), finished.models[SOURCE].nodes),
            "modules_to_save": list(dict.fromkeys(whole)) or None,
            "rank_pattern": pattern,
            "alpha_pattern": dict(pattern) if self.alpha is None else {},
            "fan_in_fan_out": bool(conv1d) and any(re.fullmatch(conv1d, path) for path in ranks),
            "bias": "none",
            "use_rslora": False,
            "use_dora": False,
            "init_lora_weights": True,
        }


def _targets(paths: Sequence[str], base: Iterable[str]) -> list[str] | str:
    """Every module by its path; as a regex where PEFT would take a path for the end of another module's too."""
    exact = set(paths)
    others = {name.rpartition(".")[0] for name in base} - exact
    parts = (path.split(".") for path in others)
    if any(".".join(words[start:]) in exact for words in parts for start in range(1, len(words))):
        return "|".join(map(re.escape, paths))
    return list(paths)


def _weights(site: Site) -> Sequence[Node]:
    return [node for name, node in site.nodes.items() if name == f"{site.path}.weight"]


def _base_weight(site: Site) -> Node:
    """The weight to start from. Raises OpError for one that a LoRA of PEFT cannot change."""
    if site.module.is_quantized:
        raise site.refuse("is quantized", "put `quantize.dequantize` before this edit, or start from the full model")
    weights = _weights(site)
    if not weights:
        raise site.refuse(f"has no weight; it holds {', '.join(site.nodes)}", "narrow `modules`, or `modules_to_save`")
    if site.module.kind is Kind.EMBEDDING and is_tied(site.path, site.scene):
        what = "is tied to the output head, which a LoRA on the embedding would not reach"
        raise site.refuse(what, "take it away with `except`")
    return weights[0]


def _size_mistake(size: str | int | None) -> str:
    try:
        parse_size(1 if size is None else size)
    except ValueError as error:
        return f"`total_size`: {error}"
    return ""


def _regex_mistake(regexes: Iterable[str]) -> str:
    for regex in regexes:
        if reason := flaw(regex):
            return f"`modules_to_save`: `{regex}` is no regex: {reason}"
    return ""


def _saving_mistakes(
    regexes: Iterable[str], saved: Sequence[str], paths: Iterable[str], selected: Iterable[str]
) -> Iterable[tuple[str, str]]:
    """What PEFT would not load as it is meant: it takes every module whose path ends like one to be saved."""
    for regex in regexes:
        if not matching(regex, saved):
            yield f"`modules_to_save`: `{regex}` matches no module of the fine-tuned model", "correct the regex"
    for path in saved:
        if path in selected:
            yield f"`{path}` is both extracted and saved whole", "take it away from one of the two"
    others = (set(paths) | set(selected)) - set(saved)
    for path in saved:
        like = sorted(other for other in others if other.endswith(path) or other.startswith(f"{path}."))
        if like:
            yield f"PEFT would save `{like[0]}` too, whose path is like `{path}`", "save both, or neither"
