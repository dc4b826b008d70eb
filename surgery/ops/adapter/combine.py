"""`adapter.combine`."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import ClassVar, Literal

from surgery.errors import OpError, Problem
from surgery.formats.lora import LoraAdapter, factor_ranks, patterned, read_lora
from surgery.graph import Node
from surgery.numerics.lowrank import Concatenated, Mixed, Recipe, ReducedSum, SummedSVD
from surgery.op import SOURCE, Finished, Op, Rewrite, Scene, doc

Method = Literal[
    "cat", "linear", "svd", "ties", "ties_svd", "dare_linear", "dare_ties", "dare_linear_svd", "dare_ties_svd",
    "magnitude_prune", "magnitude_prune_svd",
]  # fmt: skip

PRUNING: Mapping[str, Literal["magnitude", "random"]] = {
    "ties": "magnitude",
    "magnitude_prune": "magnitude",
    "dare_linear": "random",
    "dare_ties": "random",
}
TARGETING = ("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern")

FIX = "adapters of one base fit together; where their ranks differ, use `cat` or a method with an SVD"

MODELS_SCHEMA = {
    "type": "object",
    "minProperties": 1,
    "additionalProperties": {
        "type": "object",
        "additionalProperties": False,
        "properties": {
            "weight": {"type": "number", "default": 1.0},
            "density": {"type": "number", "exclusiveMinimum": 0, "maximum": 1},
        },
    },
}


@dataclass(frozen=True, slots=True)
class Combine(Op):
    """LoRA adapters into one LoRA adapter: PEFT's `add_weighted_adapter`, without the base model.

    Reads    the source, an adapter directory, and further ones from `models`; Linear, Conv1D, convolution and
             embedding factors in f32|f16|bf16. Δ is scaling·BA, with the scaling that each adapter's config gives
    Writes   an adapter directory with the same keys, in f32 as PEFT writes it
             adapter_config.json  alpha = r for every module, so that the scaling is 1; `rank_pattern` and
             `alpha_pattern` where ranks differ; the rest is the source's
    Method   cat      A = all A, each times weight·scaling; B = all B: exactly Σ weight·Δ, of the sum of the ranks
             cat with `rank` or `energy`  the best approximation of that sum, from the small factors alone, with
                      its weight on either side alike: what `svd` gives, in a fraction of the time
             svd      Σ weight·Δ, formed and decomposed whole: PEFT's bits, and half a minute for a 4096x4096 module
             ties_svd, dare_linear_svd, dare_ties_svd, magnitude_prune_svd   on whole Δ, then as svd
             linear, ties, dare_linear, dare_ties, magnitude_prune   on A and on B, each weighted with
                      √|weight·scaling|, A with its sign: this is NOT the sum of the Δ, for BA of the sums has
                      cross terms between adapters and can be far off. Prefer cat or svd
             Pruning by magnitude keeps the int(density·n) largest, without rescaling, and of equal ones the first;
             dare keeps at random and divides by the density, with masks that are a function of seed, module and
             the adapter's name in the spec
    Mind     `energy` cannot make the file smaller: shapes are known before any weight is read, so rows beyond
             the energy rank are zeros. `rank` makes it smaller
             rsLoRA adapters are scaled as they should be; PEFT 0.21.2 gives sqrt(r) times too much for them
             a copy of the base's embedding that PEFT saved in an adapter is kept if the source has one
    Error    cat: rounding; methods with an SVD: what the rank leaves out, in the manifest for each module
    Raises   OpError for what is no LoRA adapter, DoRA, biases, modules saved whole, initialisations that change
             the base; for unequal ranks where A and B are added; for a module that not all adapters have
    Source   PEFT 0.21.2, `tuners/lora/model.py`, `utils/merge_utils.py`; TIES arXiv 2306.01708, DARE 2311.03099
    """

    selects: ClassVar[Literal["modules", "tensors", "checkpoint"]] = "checkpoint"

    models: Mapping[str, Mapping[str, float]] = field(
        metadata=doc(
            "The adapters, by name, with `weight` (default 1, may be negative) and `density` (the share that pruning "
            "keeps); `source` is the source itself.",
            schema=MODELS_SCHEMA,
            examples=({"source": {"weight": 0.5}, "b": {"weight": 0.5}},),
        )
    )
    method: Method = field(default="cat", metadata=doc("How they are combined, by PEFT's name."))
    rank: int | None = field(
        default=None,
        metadata=doc(
            "The rank of the result, for `cat` and methods with an SVD. Default: for `cat` the sum of the ranks, else "
            "the largest.",
            schema={"type": "integer", "minimum": 1},
        ),
    )
    energy: float | None = field(
        default=None,
        metadata=doc(
            "For `cat`: the share of the sum's squared singular values that is kept.",
            schema={"type": "number", "exclusiveMinimum": 0, "maximum": 1},
            examples=(0.99,),
        ),
    )
    majority_sign_method: Literal["total", "frequency"] = field(
        default="total",
        metadata=doc("For methods with ties: the majority is that of the summed values, or of their signs."),
    )
    missing: Literal["error", "skip"] = field(
        default="error",
        metadata=doc("A module that only some adapters have: refused, or combined from those that have it."),
    )

    def model_names(self) -> Iterable[str]:
        """The adapters."""
        return self.models

    def check(self, patterns: tuple[re.Pattern[str], ...]) -> str:
        """Options that the method has no use for, and those that it lacks."""
        if SOURCE not in self.models:
            return f"`models` lacks `{SOURCE}`, whose factors would be lost: give it a weight"
        if self.rank is not None and not (self.method == "cat" or self.method.endswith("svd")):
            return (
                f"`rank` has no use with `{self.method}`: the ranks stay as they are; use `cat` or `{self.method}_svd`"
            )
        if self.energy is not None and self.method != "cat":
            return f"`energy` has no use with `{self.method}`; use `cat`, which is the exact sum"
        dense = [name for name, options in self.models.items() if "density" in options]
        if self._pruning == "none" and dense:
            return f"`density` has no use with `{self.method}`, which prunes nothing (given for `{dense[0]}`)"
        sparse = [name for name in self.models if name not in dense]
        if self._pruning != "none" and sparse:
            return f"`{self.method}` prunes, and needs a `density` for `{sparse[0]}`"
        return ""

    @property
    def _rule(self) -> str:
        return self.method.removesuffix("_svd")

    @property
    def _pruning(self) -> Literal["none", "magnitude", "random"]:
        return PRUNING.get(self._rule, "none")

    def rewrite_all(self, scene: Scene) -> Rewrite:
        """All factors of the source for those of the combination."""
        adapters = [_opened(name, scene) for name in self.models]
        self._check_modules(adapters)
        gives: dict[str, Node] = {}
        problems: list[Problem] = []
        paths = dict.fromkeys(path for adapter in adapters for path in adapter.modules)
        for path in paths:
            holders = [adapter for adapter in adapters if path in adapter.modules]
            try:
                gives |= self._combined(path, holders, scene)
            except ValueError as error:
                problems.append(Problem(f"`{path}` cannot be combined: {error}", fix=FIX))
        if problems:
            raise OpError(*_folded(problems))
        source = next(adapter for adapter in adapters if adapter.name == SOURCE)
        return Rewrite(tuple(name for name in scene.names if name not in source.copies), gives)

    def _check_modules(self, adapters: Sequence[LoraAdapter]) -> None:
        paths = {path for adapter in adapters for path in adapter.modules}
        problems: list[Problem] = []
        for adapter in adapters if self.missing == "error" else ():
            lacking = sorted(paths - adapter.modules.keys())
            if lacking:
                more = f" and {len(lacking) - 1} more modules" if len(lacking) > 1 else ""
                fix = "`missing: skip` combines a module from the adapters that have it"
                problems.append(Problem(f"`{adapter.name}` lacks `{lacking[0]}`{more} of the others", fix=fix))
        if problems:
            raise OpError(*problems)

    def _combined(self, path: str, holders: Sequence[LoraAdapter], scene: Scene) -> dict[str, Node]:
        first = holders[0].modules[path]
        for adapter in holders[1:]:
            if (adapter.modules[path].a, adapter.modules[path].b) != (first.a, first.b):
                raise ValueError(
                    f"it is `{first.a}` in `{holders[0].name}`, `{adapter.modules[path].a}` in `{adapter.name}`"
                )
        if self.method == "cat":
            pair = self._sum(path, holders, scene)
        elif self.method.endswith("svd"):
            pair = self._decomposed(path, holders, scene)
        else:
            pair = self._mixed(path, holders, scene)
        return dict(zip((first.a, first.b), pair, strict=True))

    def _sum(self, path: str, holders: Sequence[LoraAdapter], scene: Scene) -> tuple[Node, ...]:
        total = sum(adapter.modules[path].rank for adapter in holders)
        factors = [(self._weight(adapter), adapter.modules[path].scaling) for adapter in holders]
        pairs = [adapter.pair(path) for adapter in holders]
        if self.energy is None and (self.rank is None or self.rank >= total):
            (a,) = scene.graph.apply(Concatenated(0, tuple(factors)), *(a for a, _ in pairs))
            (b,) = scene.graph.apply(Concatenated(1, ((),) * len(pairs)), *(b for _, b in pairs))
            return a, b
        rank = min(self.rank or total, total, _largest_rank(*pairs[0]))
        kernel = ReducedSum(tuple(weight * scaling for weight, scaling in factors), rank, self.energy)
        return scene.graph.apply(kernel, *(node for pair in pairs for node in pair))

    def _decomposed(self, path: str, holders: Sequence[LoraAdapter], scene: Scene) -> tuple[Node, ...]:
        pairs = [adapter.pair(path) for adapter in holders]
        rank = self.rank or max(adapter.modules[path].rank for adapter in holders)
        scalings = tuple(adapter.modules[path].scaling for adapter in holders)
        recipe = self._recipe(holders, [self._weight(adapter) for adapter in holders], path, scene)
        kernel = SummedSVD(recipe, scalings, min(rank, _largest_rank(*pairs[0])))
        return scene.graph.apply(kernel, *(node for pair in pairs for node in pair))

    def _mixed(self, path: str, holders: Sequence[LoraAdapter], scene: Scene) -> tuple[Node, ...]:
        ranks = [(adapter.modules[path].rank, adapter.name) for adapter in holders]
        if len({rank for rank, _ in ranks}) > 1:
            listed = ", ".join(f"{rank} in `{name}`" for rank, name in ranks)
            raise ValueError(f"`{self.method}` adds factors, which needs equal ranks, and it has rank {listed}")
        products = [self._weight(adapter) * adapter.modules[path].scaling for adapter in holders]
        roots = [math.sqrt(abs(product)) for product in products]
        signed = [math.copysign(root, product) for root, product in zip(roots, products, strict=True)]
        names = (holders[0].modules[path].a, holders[0].modules[path].b)
        mixed: list[Node] = []
        for side, weights in enumerate((signed, roots)):
            recipe = self._recipe(holders, weights, names[side], scene)
            mixed += scene.graph.apply(Mixed(recipe), *(adapter.pair(path)[side] for adapter in holders))
        return tuple(mixed)

    def _recipe(self, holders: Sequence[LoraAdapter], weights: Sequence[float], drawn_for: str, scene: Scene) -> Recipe:
        names = [adapter.name for adapter in holders]
        draws = tuple(f"{scene.seed}\0{drawn_for}\0{name}" for name in names) if self._pruning == "random" else ()
        densities = tuple(float(self.models[name]["density"]) for name in names) if self._pruning != "none" else ()
        elects = self._rule in ("ties", "dare_ties")
        return Recipe(tuple(weights), self._pruning, densities, draws, elects, self.majority_sign_method)

    def _weight(self, adapter: LoraAdapter) -> float:
        return float(self.models[adapter.name].get("weight", 1.0))

    def config(self, config: Mapping[str, object], finished: Finished) -> Mapping[str, object]:
        """The source's adapter_config.json, with ranks, alphas and targets of the result."""
        ranks = factor_ranks(finished.nodes)
        rank, pattern = patterned(ranks)
        own = {"r": rank, "lora_alpha": rank, "rank_pattern": pattern, "alpha_pattern": dict(pattern)}
        return {**config, **own, "use_rslora": False, **self._targets(list(ranks), finished)}

    def _targets(self, paths: Sequence[str], finished: Finished) -> Mapping[str, object]:
        """Nothing where all adapters say the same and have the same modules, else every module by its path."""
        models = [finished.models[name] for name in self.models]
        said = [[_comparable(model.config.get(key)) for key in TARGETING] for model in models]
        held = [set(factor_ranks(model.nodes)) for model in models]
        if all(each == said[0] for each in said) and all(each == set(paths) for each in held):
            return {}
        return {**dict.fromkeys(TARGETING), "target_modules": list(paths)}


def _opened(name: str, scene: Scene) -> LoraAdapter:
    model = scene.models[name]
    if not model.checkpoint.is_adapter:
        what = f"`{name}` is no adapter directory: it has no adapter_config.json beside adapter_model.safetensors"
        raise OpError(Problem(what, fix="give an adapter; `adapter.extract` makes one from a fine-tuned checkpoint"))
    return read_lora(name, model.config, scene.names if name == SOURCE else model.nodes)


def _largest_rank(a: Node, b: Node) -> int:
    return min(math.prod(a.type.shape[1:]), b.type.shape[0])


def _comparable(value: object) -> object:
    return sorted(map(str, value)) if isinstance(value, list) else value  # pyright: ignore[reportUnknownArgumentType, reportUnknownVariableType]


def _folded(problems: Sequence[Problem]) -> Iterator[Problem]:
    """One problem for all modules that cannot be combined for the same reason."""
    reasons: dict[tuple[str, str], list[Problem]] = {}
    for problem in problems:
        reasons.setdefault((problem.what.partition("` ")[2], problem.fix), []).append(problem)
    for (what, fix), alike in reasons.items():
        path = alike[0].what.partition("` ")[0]
        more = f" (and {len(alike) - 1} more modules like it)" if len(alike) > 1 else ""
        yield Problem(f"{path}`{more} {what}", fix=fix)
