"""The `quantization_config` with which transformers loads a 4-bit checkpoint as it was written."""

from __future__ import annotations

import re
from bisect import bisect_left
from collections.abc import Iterable, Mapping
from typing import cast

from surgery.checkpoint.architecture import Architecture, Kind
from surgery.checkpoint.modules import Module
from surgery.errors import OpError, Problem
from surgery.op import Finished

__all__ = ["is_bitsandbytes", "other_method", "patch_config"]

KEY = "quantization_config"
PLAIN = re.compile(r"\^?[\w.\- ]*")  # means itself as a regex too, near enough
# Modules with Linears that a task adds when it loads a model made for another one.
FRESH_HEADS = ("classifier", "qa_outputs", "score", "pooler.dense", "cls", "classification_head")


def _method(config: Mapping[str, object]) -> str:
    entry = config.get(KEY)
    return str(cast(Mapping[str, object], entry).get("quant_method") or "") if isinstance(entry, Mapping) else ""


def is_bitsandbytes(config: Mapping[str, object]) -> bool:
    """Whether the config says that the checkpoint is quantized with bitsandbytes."""
    return _method(config) == "bitsandbytes"


def other_method(config: Mapping[str, object]) -> str:
    """The quantization method in the config, if it is not bitsandbytes' 4-bit; else empty."""
    if not is_bitsandbytes(config):
        return _method(config)
    return "LLM.int8" if cast(Mapping[str, object], config[KEY]).get("load_in_8bit") else ""


def patch_config(
    config: Mapping[str, object], finished: Finished, options: Mapping[str, object]
) -> Mapping[str, object]:
    """`config` with the quantization_config for the finished modules; without one if none is quantized any more.

    `options` are the `bnb_4bit_*` entries; those of an earlier config are kept where they are silent.
    """
    if other_method(config):
        return config
    modules = finished.modules
    quantized = [module.path for module in modules.values() if module.is_quantized]
    if not quantized:
        return {key: value for key, value in config.items() if key != KEY}
    earlier: Mapping[str, object] = cast(Mapping[str, object], config[KEY]) if is_bitsandbytes(config) else {}
    entry = {
        **earlier,
        "quant_method": "bitsandbytes",
        "load_in_4bit": True,
        "load_in_8bit": False,
        "bnb_4bit_quant_storage": "uint8",
        **options,
        "llm_int8_skip_modules": _skip_modules(modules, finished.architecture, quantized),
    }
    return {**config, KEY: entry}


def _skip_modules(modules: Mapping[str, Module], architecture: Architecture, quantized: list[str]) -> list[str]:
    """Every Linear that is not quantized, the head that may be tied away, and heads that a task adds.

    Why all of them: a list that is not null replaces transformers' own, and a plain weight in a
    Linear4bit loads without a word and fails at the first forward.
    """
    plain = [path for module in modules.values() if not module.is_quantized for path in _listed(module)]
    if architecture.prefix:
        prefix = architecture.prefix + "."
        plain += [path.removeprefix(prefix) for path in plain if path.startswith(prefix)]
    listed, paths = dict.fromkeys(plain), _Paths(quantized)
    heads = [path for path in dict.fromkeys([*architecture.heads, *FRESH_HEADS]) if path not in listed]
    harmless = [path for path in heads if not paths.skips(path) and not ("." in path and _skips(path, quantized))]
    return [f"^{path}" if paths.skips(path) else path for path in listed] + harmless


def _listed(module: Module) -> Iterable[str]:
    if module.kind is Kind.EXPERT:  # one entry for all experts of a layer: a path stands for what is below it
        return [re.sub(r"(\bexperts)\..*", r"\1", module.path)]
    return [module.path] if module.is_linear or module.kind is Kind.HEAD else []


def _skips(pattern: str, paths: list[str]) -> bool:
    """Whether transformers would leave one of `paths` unquantized for this entry.

    Source: transformers 5.23, `should_convert_module`.
    """
    start = re.compile(rf"(?:{pattern})(?:(?<=\.)|(?=\.|$))")
    return any(path.endswith(pattern) or start.match(path) for path in paths)


class _Paths:
    """The same question for many entries that are paths, each asked in the time of a look-up.

    A dot means itself here: anchoring an entry changes nothing about what its dots match.
    """

    def __init__(self, paths: Iterable[str]) -> None:
        self._sorted = sorted(paths)
        self._reversed = sorted(path[::-1] for path in self._sorted)

    def skips(self, entry: str) -> bool:
        """Whether the bare `entry` would match the start or the tail of one of the paths. Raises OpError."""
        if not PLAIN.fullmatch(entry):
            what = f"the module path `{entry}` cannot stand in `llm_int8_skip_modules`, whose entries are regexes"
            raise OpError(Problem(what, fix="give its tensors plain names with `tensor.rename`"))
        below = entry if entry.endswith(".") else f"{entry}."
        return _begins(self._reversed, entry[::-1]) or _begins(self._sorted, below)


def _begins(ordered: list[str], start: str) -> bool:
    place = bisect_left(ordered, start)
    return place < len(ordered) and ordered[place].startswith(start)
