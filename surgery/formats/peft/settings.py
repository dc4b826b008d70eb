"""What adapter_config.json says of a module."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import cast

from surgery.errors import OpError, Problem
from surgery.formats.peft.base import Inconsistent
from surgery.formats.peft.patterns import Patterns, ending_in
from surgery.regexes import Limit, Regex

__all__ = ["Settings"]

OF_CONFIG = " in the adapter's config"
LARGEST = 1e30  # a rank or factor beyond it is damage


@dataclass(frozen=True, slots=True)
class Settings:
    """An adapter's config. Entries that are missing have PEFT's defaults."""

    config: Mapping[str, object]
    _regexes: dict[str, Regex] = field(default_factory=dict[str, Regex], init=False, repr=False, compare=False)
    _patterns: dict[str, Patterns] = field(default_factory=dict[str, Patterns], init=False, repr=False, compare=False)
    _limit: Limit = field(default_factory=lambda: Limit(OF_CONFIG), init=False, repr=False, compare=False)

    @property
    def peft_type(self) -> str:
        """`LORA`, `IA3`, ...; empty if the config does not say."""
        return str(self.config.get("peft_type") or "").upper()

    def flag(self, key: str) -> bool:
        """Whether `key` is set, to anything but null, false, or an empty list."""
        return bool(self.config.get(key))

    def number(self, key: str, default: float) -> float:
        """The number under `key`. Raises OpError if it is none."""
        value = self.config.get(key)
        value = default if value is None else value
        return _checked(key, value)

    def names(self, key: str) -> tuple[str, ...]:
        """The names listed under `key`; a lone one counts as a list of one."""
        value = self.config.get(key)
        if isinstance(value, str):
            return (value,)
        return tuple(map(str, cast("list[object]", value))) if isinstance(value, list) else ()

    def names_module(self, key: str, path: str) -> bool:
        """Whether `key` names the module `path`: a lone name is a regex, those of a list are paths or their ends."""
        value = self.config.get(key)
        if isinstance(value, str):
            return self._matches(ending_in(value), path)
        return any(path == name or path.endswith(f".{name}") for name in self.names(key))

    def targets(self, path: str) -> bool:
        """Whether PEFT would put an adapter on the module `path`, as far as the config alone tells.

        Source: PEFT 0.21, `check_target_module_exists`; without `target_modules` it goes by the model's type.
        """
        value = self.config.get("target_modules")
        if isinstance(value, str):
            return value == "all-linear" or self._matches(value, path)
        named = path in (names := self.names("target_modules")) or any(path.endswith(f".{name}") for name in names)
        return named or not names or self.targets_parameter(f"{path}.weight")

    def targets_parameter(self, tensor: str) -> bool:
        """Whether `target_parameters` names the tensor itself rather than its module."""
        return any(tensor == name or tensor.endswith(f".{name}") for name in self.names("target_parameters"))

    def rank(self, path: str, key: str = "r", default: float = 8) -> int:
        """The rank at the module `path`."""
        rank = int(self._patterned("rank_pattern", path, key, default))
        if rank < 1:
            raise OpError(
                Problem(f"the rank of `{path}` is {rank} in the adapter's config", fix="there is none below 1")
            )
        return rank

    def alpha(self, path: str, key: str = "lora_alpha", default: float = 8) -> float:
        """alpha at the module `path`."""
        return self._patterned("alpha_pattern", path, key, default)

    def scaling(self, path: str, rank: int) -> float:
        """What a LoRA's product is multiplied with at the module `path`: alpha / r, with rsLoRA alpha / √r.

        Raises Inconsistent if the config states another rank than the tensors have.
        """
        stated = self.rank(path)
        if stated != rank:
            raise Inconsistent(f"has rank {rank}, and the adapter's config says {stated}")
        return self.alpha(path) / (math.sqrt(rank) if self.flag("use_rslora") else rank)

    def _patterned(self, patterns_key: str, path: str, key: str, default: float) -> float:
        """As PEFT looks it up: the first pattern that matches the path or its end, else the general value.

        Source: PEFT 0.21, `get_pattern_key`.
        """
        patterns = self.config.get(patterns_key)
        if isinstance(patterns, Mapping):
            if patterns_key not in self._patterns:
                self._patterns[patterns_key] = Patterns(cast("Mapping[str, object]", patterns), self._limit)
            found = self._patterns[patterns_key].value(path)
            if found:
                return _checked(patterns_key, found[0])
        return self.number(key, default)

    def _matches(self, pattern: str, path: str) -> bool:
        if pattern not in self._regexes:
            self._regexes[pattern] = Regex(pattern, self._limit)
        return self._regexes[pattern].fullmatch(path) is not None


def _checked(key: str, value: object) -> float:
    if isinstance(value, int | float) and not isinstance(value, bool) and -LARGEST <= value <= LARGEST:  # so no NaN
        return value
    raise OpError(Problem(f"`{key}` of the adapter's config is {value!r:.40}, which is no number that can be meant"))
