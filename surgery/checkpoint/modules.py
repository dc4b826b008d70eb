"""The module tree of a checkpoint: which tensors belong together, and what their module is."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

from surgery.checkpoint.architecture import Architecture, Kind
from surgery.types import TensorType

__all__ = ["Module", "module_of", "modules_of"]

# A 4-bit weight is one parameter stored in several tensors (bitsandbytes, `QuantState.as_dict`).
QUANTIZED_PARTS = re.compile(
    r"(?P<module>.*)\.weight\.(absmax|quant_map|nested_absmax|nested_quant_map|quant_state\.bitsandbytes__(nf4|fp4))"
)


@dataclass(frozen=True, slots=True)
class Module:
    """A module as it is on disk: its path, its kind, and its tensors by full name."""

    path: str
    kind: Kind
    tensors: Mapping[str, TensorType]

    @property
    def is_linear(self) -> bool:
        """Whether adapters and quantizers treat it as a Linear: Linear, Conv1D, or an expert's matrix."""
        return self.kind in (Kind.LINEAR, Kind.CONV1D, Kind.EXPERT)

    @property
    def is_quantized(self) -> bool:
        """Whether its weight is stored in 4-bit parts."""
        return any(QUANTIZED_PARTS.fullmatch(name) for name in self.tensors)


def module_of(tensor: str) -> str:
    """The path of the module that holds `tensor`; the empty path for a tensor of the root."""
    part = QUANTIZED_PARTS.fullmatch(tensor)
    return part["module"] if part else tensor.rpartition(".")[0]


def modules_of(tensors: Mapping[str, TensorType], architecture: Architecture) -> dict[str, Module]:
    """Every module that holds tensors, by path, in order of its first tensor."""
    grouped: dict[str, dict[str, TensorType]] = {}
    for name, type_ in tensors.items():
        grouped.setdefault(module_of(name), {})[name] = type_
    children = _children(grouped)
    return {
        path: Module(path, _kind(path, held, architecture, children), held)
        for path, held in grouped.items()
    }  # fmt: skip


def _children(paths: Mapping[str, object]) -> dict[str, set[str]]:
    """The modules in each parent of `paths`, with and without tensors of their own."""
    children: dict[str, set[str]] = {path.rpartition(".")[0]: set() for path in paths}
    seen: set[str] = set()
    for node in paths:
        while node and node not in seen:
            if node in children:
                seen.add(node)
            node, _, name = node.rpartition(".")
            if node in children:
                children[node].add(name)
    return children


def _kind(
    path: str, tensors: Mapping[str, TensorType], architecture: Architecture, children: Mapping[str, set[str]]
) -> Kind:
    weight = tensors.get(f"{path}.weight")
    return architecture.kind(path, weight.shape if weight else (), children[path.rpartition(".")[0]])
