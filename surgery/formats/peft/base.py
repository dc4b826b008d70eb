"""The base of an adapter: where the modules that an adapter names are on disk."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import cast

from surgery.checkpoint.architecture import Architecture, Kind
from surgery.checkpoint.modules import Module
from surgery.formats.peft.live_names import live_name
from surgery.types import TensorType

__all__ = ["Base", "Inconsistent", "Misfit", "Target"]


class Misfit(ValueError):
    """Why a part of an adapter cannot be folded into a module of the base."""

    fix = "give the base that the adapter was made for: its config names it as `base_model_name_or_path`"


class Inconsistent(Misfit):
    """Why the tensors of an adapter and its config cannot both be meant."""

    fix = "its tensors and its adapter_config.json do not belong together: save it again with PEFT"


@dataclass(frozen=True, slots=True)
class Target:
    """A module of the base that an adapter changes."""

    module: Module

    @property
    def path(self) -> str:
        """Its path on disk."""
        return self.module.path

    @property
    def is_turned(self) -> bool:
        """Whether its weight is stored [in, out]."""
        return self.module.kind is Kind.CONV1D

    @property
    def weight(self) -> str:
        """The name of its weight."""
        return f"{self.path}.weight"

    @property
    def bias(self) -> str:
        """The name of its bias."""
        return f"{self.path}.bias"

    def type(self, name: str) -> TensorType:
        """The type of its tensor `name`. Raises Misfit if it has none."""
        if name not in self.module.tensors:
            held = ", ".join(f"`{held.removeprefix(f'{self.path}.')}`" for held in self.module.tensors)
            raise Misfit(f"has no `{name}` in the base, which holds {held} there")
        return self.module.tensors[name]


@dataclass(frozen=True, slots=True)
class Base:
    """Names, types and modules of the checkpoint that an adapter is folded into."""

    types: Mapping[str, TensorType]
    modules: Mapping[str, Module]
    architecture: Architecture
    config: Mapping[str, object]

    def target(self, path: str) -> Target | None:
        """The module on disk that an adapter calls `path`."""
        spelled = list(self._spelled(path))
        renamed = (name for name in self.modules if live_name(name, self.config) in spelled)
        found = next((name for name in spelled if name in self.modules), None) or next(renamed, None)
        return None if found is None else Target(self.modules[found])

    def placed(self, path: str) -> tuple[Target | None, bool]:
        """The module that an adapter calls `path`; and whether it is a head that shares the embedding's tensor."""
        target, pair = self.target(path), self.tied_pair()
        if target is None and pair is not None and f"{path}.weight" == pair[1]:
            return Target(self.modules[pair[0].removesuffix(".weight")]), True
        return target, False

    def tensor(self, name: str) -> str | None:
        """The tensor on disk that an adapter calls `name`."""
        return next((spelled for spelled in self._spelled(name) if spelled in self.types), None)

    def _spelled(self, path: str) -> Iterator[str]:
        """`path`, and how a base without a head, or one with a head, calls the same."""
        yield path
        prefix = self.architecture.prefix
        if prefix:
            yield path.removeprefix(f"{prefix}.") if path.startswith(f"{prefix}.") else f"{prefix}.{path}"

    def tied_pair(self) -> tuple[str, str] | None:
        """The shared tensor on disk and the head's that is tied away; None if nothing is."""
        heads = [f"{path}.weight" for path in self.architecture.heads]
        if not heads or any(head in self.types for head in heads) or not self.architecture.is_tied(self.config):
            return None
        shared = next((name for name in self._embeddings()), None)
        return (shared, heads[0]) if shared else None

    def _embeddings(self) -> Iterator[str]:
        """The weights of the input embeddings: as many rows as the vocabulary has tokens."""
        inner = self.config.get("text_config")
        nested: Mapping[str, object] = cast("Mapping[str, object]", inner) if isinstance(inner, Mapping) else {}
        size = self.config.get("vocab_size", nested.get("vocab_size"))
        for module in self.modules.values():
            weight = self.types.get(f"{module.path}.weight")
            if module.kind is Kind.EMBEDDING and weight and (size is None or weight.shape[:1] == (size,)):
                yield f"{module.path}.weight"
