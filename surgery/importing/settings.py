"""Parameter settings: mergekit's scalars, gradients and filters at several levels, as one value of a spec.

A filter of mergekit is text that a tensor's name contains; ours are regexes that match in full, so that `self_attn`
becomes `.*self_attn.*`. Levels are tried from the innermost outwards, and a list of filters that has none for a
tensor leaves it to the next level; written out, these are one list of regexes, of which the first counts.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import cast

from surgery.importing.config import Config, Level
from surgery.importing.methods import Parameter
from surgery.spec.document import Keys

__all__ = ["Number", "Rule", "at_depth", "regex_of", "rules_of", "value_of"]

Number = float | list[float]


@dataclass(frozen=True, slots=True)
class Rule:
    """A value for the tensors whose names contain `filter`; None: for all."""

    filter: str | None
    value: Number | bool


def rules_of(config: Config, parameter: Parameter, levels: Iterable[Level], default: bool = True) -> list[Rule]:
    """What `levels` say of `parameter`, the first that applies to a tensor counts; closed by its default."""
    rules: list[Rule] = []
    for level in levels:
        for rule in _rules_at(config, parameter, level):
            if not any(earlier.filter is None or earlier.filter in (rule.filter or "") for earlier in rules):
                rules.append(rule)
    if default and parameter.default is not None and not (rules and rules[-1].filter is None):
        rules.append(Rule(None, parameter.default))
    return rules


def _rules_at(config: Config, parameter: Parameter, level: Level) -> Iterator[Rule]:
    setting = level.settings.get(parameter.name)
    is_list = isinstance(setting, list)
    keys = (*level.keys, parameter.name)
    conditions = cast("list[object]", setting if is_list else [setting])
    if not any(isinstance(item, dict) for item in conditions):
        if conditions not in ([], [None]):
            yield Rule(None, _value(config, parameter, conditions if is_list else conditions[0], keys))
        return
    for index, item in enumerate(conditions):
        place = (*keys, index) if is_list else keys
        fields = cast("dict[str, object]", item) if isinstance(item, dict) else {}
        unknown = [key for key in fields if key not in ("filter", "value")]
        if unknown or fields.get("value") in (None, []):
            what = f"unknown key `{unknown[0]}`" if unknown else "a condition has no `value`"
            config.report(what, place, "a condition is {filter: TEXT, value: NUMBER}")
            continue
        text = fields.get("filter")
        yield Rule(None if text in (None, "", "*") else str(text), _value(config, parameter, fields["value"], place))


def _value(config: Config, parameter: Parameter, value: object, keys: Keys) -> Number | bool:
    if isinstance(value, list):
        items = cast("list[object]", value)
        numbers = [_scalar(config, parameter, item, keys) for item in items]
        return numbers if len(numbers) > 1 else numbers[0]
    return _scalar(config, parameter, value, keys)


def _scalar(config: Config, parameter: Parameter, value: object, keys: Keys) -> float | bool:
    try:
        if isinstance(value, bool) or parameter.kind == "flag":
            return _flag(value) if parameter.kind == "flag" else float(cast(bool, value))
        number = float(cast("float | str", value))
        if not math.isfinite(number):
            raise ValueError(number)
        return int(number) if number.is_integer() else number
    except (TypeError, ValueError, OverflowError):
        kind = "true or false" if parameter.kind == "flag" else "a number"
        config.report(f"`{parameter.name}` is {value!r:.60}, not {kind}", keys)
        return 0.0


def _flag(value: object) -> bool:
    words = {"true": True, "yes": True, "on": True, "1": True, "false": False, "no": False, "off": False, "0": False}
    if str(value).lower() not in words:
        raise ValueError(value)
    return words[str(value).lower()]


def value_of(config: Config, parameter: Parameter, levels: Sequence[Level]) -> object:
    """The parameter as our op takes it; None to leave it out. Reports what is missing or cannot be said."""
    given = rules_of(config, parameter, levels, default=False)
    keys = levels[0].keys
    if not given:
        if parameter.default is None:
            config.report(f"`{parameter.name}` is missing", keys, f"add `{parameter.name}:` to these `parameters`")
        return None
    rules = rules_of(config, parameter, levels)
    if parameter.kind != "number":
        if len(rules) > 1 or isinstance(rules[0].value, list):
            what = f"`{parameter.name}` differs from tensor to tensor, which our op cannot do"
            config.report(what, keys, "write an edit for each choice, with `tensors`")
        return rules[0].value
    if len(rules) == 1 and rules[0].filter is None:
        return rules[0].value
    return {regex_of(rule): rule.value for rule in rules}


def regex_of(rule: Rule, layers: Sequence[int] = ()) -> str:
    """The regex of names that contain the filter; in one of `layers`, the first number of the name, if given."""
    inner = re.escape(rule.filter).replace(r"\-", "-") if rule.filter else ""
    if not layers:
        return f".*{inner}.*" if inner else ".*"
    ahead = f"(?=.*{inner})" if inner else ""
    numbers = str(layers[0]) if len(layers) == 1 else f"({'|'.join(map(str, layers))})"
    return rf"{ahead}\D*\.{numbers}\..*"


def at_depth(value: Number | bool, t: float) -> float:
    """A gradient's value at depth `t`, as mergekit interpolates it."""
    if not isinstance(value, list):
        return value
    scaled = t * (len(value) - 1)
    first = int(scaled)
    second = min(len(value) - 1, first + 1)
    share = scaled - first
    number = (1 - share) * value[first] + share * value[second]
    return int(number) if number == int(number) else number
