"""LoRA adapters of PEFT as they lie on disk: which tensors are factors, of what rank, with what scaling.

Why not more: what a magnitude, a bias or an embedding saved in full would mean for the sum of adapters is
not written down anywhere, so an adapter that holds anything but factors is refused by name.

Source: PEFT 0.21.2, `utils/save_and_load.py`, `tuners/lora/layer.py`.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

from surgery.errors import OpError, Problem
from surgery.formats.peft.base import Misfit
from surgery.formats.peft.lora import CHANGE_THE_BASE
from surgery.formats.peft.settings import Settings
from surgery.graph import Node

__all__ = [
    "PREFIX",
    "LoraAdapter",
    "LoraFactors",
    "factor_names",
    "factor_ranks",
    "factor_suffixes",
    "is_factor",
    "patterned",
    "read_lora",
]

PREFIX = "base_model.model."
_FACTOR = re.compile(r"(?P<module>.+)\.(lora_(?P<side>[AB])\.weight|lora_embedding_(?P<embedding>[AB]))")
_BASE_COPY = re.compile(r".+\.base_layer\.weight")  # PEFT saves an embedding beside its factors

# What makes an adapter more than scaled products: its name in adapter_config.json, and what it is.
_MORE_THAN_FACTORS = {
    "use_dora": "is DoRA: its magnitudes multiply the base's weight",
    "lora_bias": "has biases on its B factors",
    "modules_to_save": "holds whole modules",
    "trainable_token_indices": "holds trained tokens",
    "target_parameters": "targets parameters of fused experts",
    "layer_replication": "replicates layers of the base",
    "use_qalora": "is QA-LoRA, which pools its inputs",
    "use_bdlora": "is block-diagonal",
    "arrow_config": "routes between experts",
    "kasa_config": "is KaSA, which changes the base",
    "monteclora_config": "is MonteCLoRA, which samples its factors",
    "alora_invocation_tokens": "acts after its invocation tokens only",
}


@dataclass(frozen=True, slots=True)
class LoraFactors:
    """The factors of one module: the full names of A and B, the rank, and what BA is multiplied with."""

    module: str  # its path in the model, without PEFT's prefix
    a: str
    b: str
    rank: int
    scaling: float


@dataclass(frozen=True, slots=True)
class LoraAdapter:
    """A LoRA adapter; `copies` are tensors of the base that PEFT saved along."""

    name: str
    config: Mapping[str, object]
    nodes: Mapping[str, Node]
    modules: Mapping[str, LoraFactors]
    copies: tuple[str, ...]

    def pair(self, module: str) -> tuple[Node, Node]:
        """A and B of `module`."""
        factors = self.modules[module]
        return self.nodes[factors.a], self.nodes[factors.b]


def read_lora(name: str, config: Mapping[str, object], nodes: Mapping[str, Node]) -> LoraAdapter:
    """The adapter with adapter_config.json `config` and tensors `nodes`.

    Raises OpError with every reason why it is not a sum of scaled products and nothing else.
    """
    sides, copies, others = _sorted_names(nodes)
    refusals = list(_refusals(config)) or list(_strays(sides, others))
    if refusals:
        raise OpError(*(Problem(f"`{name}` {what}", fix=fix) for what, fix in refusals))
    settings = Settings(config)
    modules = {path: _factors(name, path, pair, settings, nodes) for path, pair in sides.items()}
    return LoraAdapter(name, config, nodes, modules, copies)


def _refusals(config: Mapping[str, object]) -> Iterator[tuple[str, str]]:
    if config.get("peft_type") != "LORA":
        kind = config.get("peft_type") or "no PEFT adapter"
        yield f"is {kind}, not LORA", "only LoRA adapters can be combined"
        return
    fold = "fold it into its base instead"
    for key, what in _MORE_THAN_FACTORS.items():
        if config.get(key):
            yield f"{what} (`{key}` in adapter_config.json), which a sum of LoRA factors cannot hold", fold
    if config.get("bias", "none") not in (None, "none"):
        yield f"holds biases (`bias: {config['bias']}`), which a sum of LoRA factors cannot hold", fold
    init = config.get("init_lora_weights")
    if isinstance(init, str) and init.startswith(CHANGE_THE_BASE):
        fix = "convert it first: PEFT's `save_pretrained(path_initial_model_for_weight_conversion=...)`"
        yield f"was initialised with {init}, so that it belongs to a changed base", fix


def _sorted_names(names: Iterable[str]) -> tuple[dict[str, dict[str, str]], tuple[str, ...], list[str]]:
    """Factors by module and side, copies of the base, and everything else."""
    sides: dict[str, dict[str, str]] = {}
    copies: list[str] = []
    others: list[str] = []
    for name in names:
        match = _FACTOR.fullmatch(name)
        if match and name.startswith(PREFIX):
            path = match["module"].removeprefix(PREFIX)
            sides.setdefault(path, {})[match["side"] or match["embedding"]] = name
        elif _BASE_COPY.fullmatch(name):
            copies.append(name)
        else:
            others.append(name)
    return sides, tuple(copies), others


def _strays(sides: Mapping[str, Mapping[str, str]], others: list[str]) -> Iterator[tuple[str, str]]:
    if others:
        more = f" (and {len(others) - 1} more)" if len(others) > 1 else ""
        fix = f"only keys as PEFT saves them can be combined (`{PREFIX}<module>.lora_A.weight`); drop it if not needed"
        yield f"holds `{others[0]}`{more}, which is no LoRA factor", fix
    lonely = [next(iter(pair.values())) for pair in sides.values() if len(pair) != 2]
    if lonely:
        yield f"holds `{lonely[0]}` without its other factor", "save the adapter again"
    if not sides and not others:
        yield "holds no LoRA factor at all", "give another adapter"


def _factors(
    name: str, path: str, pair: Mapping[str, str], settings: Settings, nodes: Mapping[str, Node]
) -> LoraFactors:
    a, b = nodes[pair["A"]].type, nodes[pair["B"]].type
    if len(a.shape) < 2 or len(b.shape) < 2:
        raise OpError(Problem(f"`{name}` has factors {a} and {b} for `{path}`, which are no matrices"))
    try:
        scaling = settings.scaling(path, a.shape[0])
    except Misfit as misfit:
        fix = "correct `r` or `rank_pattern` in its adapter_config.json"
        raise OpError(Problem(f"`{path}` of `{name}` {misfit}", fix=fix)) from None
    return LoraFactors(path, pair["A"], pair["B"], a.shape[0], scaling)


def factor_suffixes(*, embedding: bool) -> tuple[str, str]:
    """What PEFT calls A and B after the module's path."""
    return ("lora_embedding_A", "lora_embedding_B") if embedding else ("lora_A.weight", "lora_B.weight")


def factor_names(module: str, *, embedding: bool) -> tuple[str, str]:
    """The full names of A and B of a module."""
    a, b = factor_suffixes(embedding=embedding)
    return f"{PREFIX}{module}.{a}", f"{PREFIX}{module}.{b}"


def is_factor(name: str) -> bool:
    """Whether `name` is a factor's."""
    return _FACTOR.fullmatch(name) is not None


def factor_ranks(nodes: Mapping[str, Node]) -> dict[str, int]:
    """The rank of each module whose factors are among `nodes`."""
    sides, _, _ = _sorted_names(nodes)
    return {path: nodes[pair["A"]].type.shape[0] for path, pair in sides.items()}


def patterned(values: Mapping[str, int]) -> tuple[int, dict[str, int]]:
    """The most common of some numbers by module, and a `rank_pattern` for the modules that differ."""
    common = Counter(values.values()).most_common(1)[0][0]
    return common, {"^" + re.escape(path): value for path, value in values.items() if value != common}
