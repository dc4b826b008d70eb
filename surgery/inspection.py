"""`Inspection`: what a checkpoint is, from its headers: modules, types, sizes, how it is quantized."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from surgery.checkpoint import Checkpoint
from surgery.checkpoint.architecture import architecture_of
from surgery.checkpoint.modules import QUANTIZED_PARTS, Module, modules_of
from surgery.types import TensorType, text

__all__ = ["Inspection", "inspect_checkpoint"]


ADAPTER_KEYS = (
    "peft_type", "r", "lora_alpha", "rank_pattern", "alpha_pattern", "use_rslora", "use_dora", "modules_to_save",
    "base_model_name_or_path",
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Inspection:
    """A checkpoint and its module tree."""

    checkpoint: Checkpoint
    modules: Mapping[str, Module]

    def __str__(self) -> str:
        return text(self)

    @property
    def num_bytes(self) -> int:
        """Bytes of all tensors."""
        return sum(entry.type.num_bytes for entry in self.checkpoint.tensors.values())

    @property
    def model_type(self) -> str:
        """`model_type` of config.json, or empty."""
        return str((self.checkpoint.config or {}).get("model_type", ""))

    def adapter(self) -> dict[str, object]:
        """What adapter_config.json says of method, rank, factor and base; empty for what is no adapter."""
        if not self.checkpoint.is_adapter:
            return {}
        config = self.checkpoint.config or {}
        return {key: config[key] for key in ADAPTER_KEYS if config.get(key) not in (None, "", {}, False)}

    def quantization(self) -> dict[str, int]:
        """How many modules hold a weight in each 4-bit format, and the method that config.json names."""
        counts: dict[str, int] = {}
        for module in self.modules.values():
            for name in module.tensors:
                part = QUANTIZED_PARTS.fullmatch(name)
                if part and ".quant_state." in name:
                    label = f"bitsandbytes {name.rpartition('__')[2]}"
                    counts[label] = counts.get(label, 0) + 1
        return counts

    def to_json(self) -> dict[str, object]:
        """Plain data, as `surgery inspect --json` prints it."""
        return {
            "source": self.checkpoint.identity,
            "model_type": self.model_type,
            "bytes": self.num_bytes,
            "files": [{"name": file.name, "bytes": file.header.file_bytes} for file in self.checkpoint.files],
            "quantization": self.quantization(),
            "adapter": self.adapter(),
            "modules": [
                {"path": module.path, "kind": module.kind.value, "tensors": _types(module.tensors)}
                for module in self.modules.values()
            ],
            "notes": list(self.checkpoint.notes),
        }


def _types(tensors: Mapping[str, TensorType]) -> dict[str, str]:
    return {name: str(type_) for name, type_ in tensors.items()}


def inspect_checkpoint(checkpoint: Checkpoint) -> Inspection:
    """The inspection of an open checkpoint."""
    types = {name: entry.type for name, entry in checkpoint.tensors.items()}
    return Inspection(checkpoint, modules_of(types, architecture_of(checkpoint.config)))
