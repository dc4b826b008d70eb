"""`Plan`: output name → node, with layout, cost and digest. What `apply` does, and nothing else."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from surgery.checkpoint import Checkpoint
from surgery.checkpoint.architecture import architecture_of
from surgery.cost import Cost
from surgery.counting import Training, training_of
from surgery.graph import Digests, Node, Source, toposort
from surgery.layout import Layout
from surgery.op import SOURCE
from surgery.spec import Spec
from surgery.types import TensorType, text

__all__ = ["Action", "AdapterPlan", "Plan", "TensorPlan", "sources_of"]

Action = Literal["copy", "rename", "change", "add"]


@dataclass(frozen=True, slots=True)
class TensorPlan:
    """One output tensor: what happens to it, where it will lie, and what it comes from."""

    name: str  # of an adapter's tensor: `adapters/<adapter>/<its name in the file>`
    node: Node
    action: Action
    file: str
    start: int  # in the data, as in the header
    stop: int
    origin: str  # the source tensor that it is, or is made from in the first place
    sources: tuple[str, ...]
    ops: tuple[str, ...]

    @property
    def key(self) -> str:
        """The name in its file."""
        directory = self.file.rpartition("/")[0]
        return self.name.removeprefix(f"{directory}/") if directory else self.name


@dataclass(frozen=True, slots=True)
class AdapterPlan:
    """An adapter to be written: `adapters/<name>/` with its weights in one file, and its config."""

    name: str
    op: str
    stem: str  # of the weight file
    nodes: Mapping[str, Node]  # by name in that file
    config: bytes

    @property
    def directory(self) -> str:
        """Where it lies in the output."""
        return f"adapters/{self.name}"

    @property
    def weights(self) -> str:
        """The weight file."""
        return f"{self.directory}/{self.stem}.safetensors"


@dataclass(frozen=True, slots=True)
class Plan:
    """The outcome of planning; made by `surgery.plan`. Printing it gives what `surgery plan` prints."""

    spec: Spec
    checkpoints: Mapping[str, Checkpoint]  # the source and the further models, by name
    streamed: tuple[str, ...]  # the source, and of the further models those that weights are read of
    tensors: tuple[TensorPlan, ...]
    adapters: tuple[AdapterPlan, ...]
    writes_base: bool  # whether the checkpoint itself is written, or adapters alone
    dropped: Mapping[str, TensorType]  # source tensors that no output is, or is in the first place made from
    config: bytes | None  # None where the source has none
    config_name: str  # config.json, or adapter_config.json
    side_files: tuple[str, ...]  # of the source, copied along
    layout: Layout
    cost: Cost
    sites: tuple[tuple[str, str, int], ...]  # per edit: op, what it selects, how many it matched
    notes: tuple[str, ...]
    _digest: list[str] = field(default_factory=list[str], init=False, repr=False, compare=False)  # once asked for

    def __str__(self) -> str:
        return text(self)

    @property
    def checkpoint(self) -> Checkpoint:
        """The source."""
        return self.checkpoints[SOURCE]

    @property
    def digest(self) -> str:
        """sha256, hex, over everything that decides the output's bytes; no path is part of it."""
        if not self._digest:
            self._digest.append(self._made_digest())
        return self._digest[0]

    def _made_digest(self) -> str:
        digests = Digests()
        identities = [[name, model.identity] for name, model in self.checkpoints.items()]
        content = [
            self.spec.seed,
            identities,
            self.config_name,
            self.layout.index.decode(),
            (self.config or b"").decode(),
        ]
        for file in self.layout.files:
            content.append(hashlib.sha256(file.header).hexdigest())
            content += [f"{item.name} {digests.of(item.node)}" for item in file.tensors]
        content += [[adapter.name, adapter.config.decode()] for adapter in self.adapters]
        return hashlib.sha256(json.dumps(content).encode()).hexdigest()

    def training(self) -> dict[str, Training]:
        """What training each adapter comes to, by its name."""
        written = {tensor.name: tensor.node for tensor in self.tensors if tensor.key == tensor.name}
        base = written if self.writes_base else {name: item.type for name, item in self.checkpoint.tensors.items()}
        source = self.checkpoint.config or {}
        config: dict[str, object] = json.loads(self.config) if self.config else dict(source)
        return {
            adapter.name: training_of(base, adapter.nodes, architecture_of(source), config, json.loads(adapter.config))
            for adapter in self.adapters
        }

    def to_json(self) -> dict[str, object]:
        """Plain data, as `surgery plan --json` prints it; its schema is `schemas/plan.v1.schema.json`."""
        return {
            "version": 1,
            "digest": self.digest,
            "source": self.checkpoint.identity,
            "models": {name: self.checkpoints[name].identity for name in self.spec.models},
            "edits": [
                {"op": op, "selects": kind, "matches": count, "options": options}
                for (op, kind, count), options in zip(self.sites, self.spec.options, strict=True)
            ],
            "tensors": [_tensor_json(tensor) for tensor in self.tensors],
            "dropped": [{"name": name, "type": str(type_)} for name, type_ in self.dropped.items()],
            "files": [
                {"name": file.name, "header_bytes": len(file.header), "bytes": file.num_bytes}
                for file in self.layout.files
            ],
            "side_files": list(self.side_files),
            "adapters": {adapter.name: json.loads(adapter.config) for adapter in self.adapters},
            "training": {name: training.to_json() for name, training in self.training().items()},
            "config": None if self.config is None else json.loads(self.config),
            "summary": self.summary(),
            "cost": {
                "bytes_read": self.cost.bytes_read,
                "bytes_written": self.cost.bytes_written,
                "peak_memory_bytes": self.cost.peak_memory,
                "min_memory_bytes": self.cost.min_memory,
            },
            "notes": list(self.notes),
        }

    def summary(self) -> dict[str, int]:
        """How many tensors are changed, added, dropped, renamed and copied."""
        counts: dict[str, int] = dict.fromkeys(("change", "add", "drop", "rename", "copy"), 0)
        for tensor in self.tensors:
            counts[tensor.action] += 1
        counts["drop"] = len(self.dropped)
        return counts


def _tensor_json(tensor: TensorPlan) -> dict[str, object]:
    return {
        "name": tensor.name,
        "action": tensor.action,
        "dtype": tensor.node.type.dtype.disk_name,
        "shape": list(tensor.node.type.shape),
        "file": tensor.file,
        "data_offsets": [tensor.start, tensor.stop],
        "sources": list(tensor.sources),
        "ops": list(tensor.ops),
        **({} if isinstance(tensor.node.kernel, Source) else {"kernel": repr(tensor.node.kernel)}),
    }


def sources_of(node: Node) -> tuple[str, ...]:
    """The tensors that `node` is computed from, first input first; `model:name` for a further model's."""
    nodes = toposort([node]) if node.inputs else (node,)
    kernels = [item.kernel for item in nodes if isinstance(item.kernel, Source)]
    return tuple(kernel.name if kernel.model == SOURCE else f"{kernel.model}:{kernel.name}" for kernel in kernels)
