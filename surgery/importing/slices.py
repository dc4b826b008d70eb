"""Slices that share one order of layers: their parameters as values by layer.

Why by name: in our spec one edit merges the whole model, so what mergekit says of a slice becomes a regex of the
layers in it. What lies outside of the layers takes the first value of the first slice (embeddings) or of the last
(norm and head), as in mergekit.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from surgery.importing.config import Config, Input, Level, Piece
from surgery.importing.methods import Parameter
from surgery.importing.settings import Number, Rule, at_depth, regex_of, rules_of, value_of

__all__ = ["Part", "check_aligned", "depth_in", "outer_factors", "scale_of", "value_by_layer"]

EMBEDDINGS = ".*(embed|wte|wpe).*"
BEFORE = ("model.embed_tokens.weight", "transformer.wte.weight", "transformer.wpe.weight")
BEHIND = ("model.norm.weight", "lm_head.weight", "transformer.ln_f.weight", "transformer.ln_f.bias")


@dataclass(frozen=True, slots=True)
class Part:
    """The levels of one slice for a parameter, and its layers."""

    levels: tuple[Level, ...]
    layers: range


def check_aligned(config: Config) -> None:
    """Report slices that are not the layers of all models in their order, each with its own counterpart."""
    fix = "select the layers first, into a checkpoint of their own (`layers.select`), and merge those"
    stop = 0
    for piece in config.pieces:
        ranges = {item.layers for item in piece.inputs}
        if len(ranges) > 1:
            config.report("layers of different index are merged", piece.keys, fix)
            return
        first, last = next(iter(ranges)) or (0, 0)
        if first != stop:
            config.report(f"the layers of this slice begin at {first}, not at {stop}", piece.keys, fix)
            return
        if [item.model for item in piece.inputs] != [item.model for item in config.pieces[0].inputs]:
            config.report("this slice merges other models than the first one", piece.keys, fix)
            return
        stop = last
    config.note(f"layers 0 to {stop - 1} are taken to be all the layers of the models")


def depth_in(layers: range, layer: int) -> float:
    """mergekit's depth of `layer` within its slice."""
    return (layer - layers.start) / (len(layers) - 1) if len(layers) > 1 else 1.0


def value_by_layer(config: Config, parameter: Parameter, parts: Sequence[Part]) -> object:
    """The parameter for all slices together; None to leave it out."""
    if parameter.kind != "number":
        values = [value_of(config, parameter, part.levels) for part in parts]
        if any(value != values[0] for value in values):
            config.report(f"`{parameter.name}` differs from slice to slice", parts[0].levels[0].keys, "make it one")
        return values[0]
    if not any(rules_of(config, parameter, part.levels, default=False) for part in parts):
        return value_of(config, parameter, parts[0].levels)
    rules = [rules_of(config, parameter, part.levels) for part in parts]
    if all(item == rules[0] for item in rules) and not any(isinstance(rule.value, list) for rule in rules[0]):
        return value_of(config, parameter, parts[0].levels)
    found: dict[str, Number] = {}
    for part, given in zip(parts, rules, strict=True):
        if not given or given[-1].filter is not None:
            config.report(f"`{parameter.name}` is missing for some tensors", part.levels[0].keys, "add it for the rest")
        found |= {regex: value for regex, value in _of_layers(given, part.layers).items() if regex not in found}
    return {**found, **_outside(rules[0], rules[-1])}


def _of_layers(rules: Sequence[Rule], layers: range) -> dict[str, Number]:
    found: dict[str, Number] = {}
    for rule in rules:
        if isinstance(rule.value, list):
            found |= {regex_of(rule, [layer]): at_depth(rule.value, depth_in(layers, layer)) for layer in layers}
        else:
            found[regex_of(rule, layers)] = rule.value
    return found


def _outside(first: Sequence[Rule], last: Sequence[Rule]) -> dict[str, Number]:
    before, behind = ({regex_of(rule): (rule, at_depth(rule.value, 0)) for rule in rules} for rules in (first, last))
    if [value for _, value in before.values()] == [value for _, value in behind.values()] and [*before] == [*behind]:
        return {regex: value for regex, (_, value) in behind.items()}
    found: dict[str, Number] = {}
    for regex, (rule, value) in before.items():
        if rule.filter is None or re.search("embed|wte|wpe", rule.filter):
            found[EMBEDDINGS if rule.filter is None else regex] = value
    for regex, (rule, value) in behind.items():
        if rule.filter is None or re.search("norm|head|ln_f", rule.filter):
            found[regex] = value
    return found


def scale_of(config: Config, parameter: Parameter, piece: Piece, item: Input) -> dict[str, float]:
    """The factors of one slice of a passthrough, by regex; without those that end the list and are 1."""
    rules = rules_of(config, parameter, (item.own, piece.own, *config.outer), default=False)
    factors: dict[str, float] = {}
    for rule in rules:
        layers = range(*(item.layers or (0, 0)))
        if isinstance(rule.value, list):
            factors |= {regex_of(rule, [layer]): at_depth(rule.value, depth_in(layers, layer)) for layer in layers}
        else:
            factors[regex_of(rule)] = rule.value
    while factors and next(reversed(factors.values())) == 1:
        factors.popitem()
    return factors


def outer_factors(config: Config, parameter: Parameter, piece: Piece, item: Input, *, last: bool) -> None:
    """Report a factor that mergekit applies to embeddings, norm or head beside the slice's layers."""
    rules = rules_of(config, parameter, (item.own, piece.own, *config.outer), default=False)
    for name in BEHIND if last else BEFORE:
        rule = next((rule for rule in rules if rule.filter is None or rule.filter in name), None)
        if rule and at_depth(rule.value, 0) != 1:
            what = f"`{parameter.name}` is for tensors such as `{name}` too, outside of the layers of this slice"
            config.report(what, item.keys, "narrow it with filters that only layers' tensors contain")
            return
