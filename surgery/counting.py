"""What training an adapter comes to: parameters as PEFT counts them, and memory.

Parameters are counted as by PEFT's `print_trainable_parameters`: tied ones once, a 4-bit weight by its
elements, buffers not at all; what an adapter saves whole counts twice, frozen and as the adapter's copy. The
base is what the checkpoint holds. Of P-tuning the prompt counts, which is saved, not the encoder that makes it.

Memory is weights, gradients and AdamW's states; activations are not counted. Bytes for each parameter:

    full    bf16 weight 2, bf16 gradient 2, f32 master copy 4, two f32 states 8   (arXiv 1910.02054, 3.1)
    LoRA    frozen weights as on disk; of the adapter f32 weight 4, gradient 4, two states 8
    QLoRA   as LoRA, with the Linears in NF4, doubly quantized (arXiv 2305.14314, 3): 4.127 bits
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import cast

from surgery.checkpoint.architecture import Architecture, Kind
from surgery.checkpoint.modules import QUANTIZED_PARTS, Module, modules_of
from surgery.graph import Node
from surgery.types import TensorType

__all__ = ["Training", "training_of"]

FULL_BYTES = 2 + 2 + 4 + 8
ADAPTER_BYTES = 4 + 4 + 8
BLOCK, OUTER_BLOCK = 64, 256  # a u8 scale for each block, an f32 scale for each block of those
NF4_BITS = 4 + 8 / BLOCK + 32 / (BLOCK * OUTER_BLOCK)

# Tensors that checkpoints hold and no model trains: masks, positions, and copies of a tied embedding.
BUFFERS = re.compile(r"(.*\.)?(masked_bias|inv_freq|position_ids|final_logits_bias)")
MASKS = re.compile(r"(.*\.)?(attn|attention)\.bias")
COPIES = re.compile(r"(.*\.)?(en|de)coder\.embed_tokens\.weight")
SHARED = re.compile(r"(.*\.)?shared\.weight")
FROZEN = re.compile(r"base_model\.vera_[AB]")  # VeRA's projections are buffers


@dataclass(frozen=True, slots=True)
class Training:
    """Parameters of one adapter and of the model with it; bytes to train all of the base, or the adapter alone."""

    trainable: int
    total: int
    full_bytes: int
    lora_bytes: int
    qlora_bytes: int

    @property
    def percent(self) -> float:
        """The share of the parameters that is trained."""
        return 100 * self.trainable / self.total if self.total else 0.0

    def to_json(self) -> dict[str, object]:
        """Plain data, as in `surgery plan --json`."""
        return {
            "trainable_params": self.trainable,
            "all_params": self.total,
            "trainable_percent": self.percent,
            "memory_bytes": {"full": self.full_bytes, "lora": self.lora_bytes, "qlora": self.qlora_bytes},
        }


def training_of(
    base: Mapping[str, Node | TensorType],
    adapter: Mapping[str, Node],
    architecture: Architecture,
    config: Mapping[str, object],
    settings: Mapping[str, object],
) -> Training:
    """The counts of `adapter` on the checkpoint `base`, both by the names of tensors on disk.

    `config` is the checkpoint's, `settings` the adapter's.
    """
    types = {name: value.type if isinstance(value, Node) else value for name, value in base.items()}
    parameters = {name: _elements(name, value, types) for name, value in base.items()}
    left_out = _not_parameters(types, architecture, config)
    held = sum(count for name, count in parameters.items() if name not in left_out)
    trained = sum(node.type.num_elements for name, node in adapter.items() if not FROZEN.fullmatch(name))
    own = sum(adapter[name].type.num_elements for name in _own_biases(adapter, settings))
    modules = modules_of(types, architecture)
    weights = {f"{path}.weight" for path, module in modules.items() if _is_quantizable(module, architecture)}
    frozen = sum(type_.num_bytes for name, type_ in types.items() if name not in left_out or _is_part(name))
    saved = sum(types[name].num_bytes - round(parameters[name] * NF4_BITS / 8) for name in weights)
    return Training(
        trainable=trained,
        total=held + trained - own,
        full_bytes=FULL_BYTES * held,
        lora_bytes=frozen + ADAPTER_BYTES * trained,
        qlora_bytes=frozen - saved + ADAPTER_BYTES * trained,
    )


def _own_biases(adapter: Iterable[str], settings: Mapping[str, object]) -> Iterator[str]:
    """Biases in the adapter that are the model's own, trained where they are, not beside it."""
    saved = cast("list[str]", settings.get("modules_to_save") or [])
    for name in adapter if settings.get("bias") == "all" else ():
        if name.endswith(".bias") and not any(f".{module}." in name for module in saved):
            yield name


def _is_part(name: str) -> bool:
    return QUANTIZED_PARTS.fullmatch(name) is not None


def _elements(name: str, value: Node | TensorType, names: Collection[str]) -> int:
    """The elements of a tensor; of a 4-bit weight, those that its bytes stand for."""
    if isinstance(value, Node):
        if value.kernel.label and not _is_part(name):
            return value.inputs[0].type.num_elements
        value = value.type
    return value.num_elements * (2 if f"{name}.absmax" in names else 1)


def _not_parameters(
    types: Mapping[str, TensorType], architecture: Architecture, config: Mapping[str, object]
) -> set[str]:
    """Parts of others, buffers, and what the model ties to another tensor that is there."""
    tied = _tied_names(architecture) if architecture.is_tied(config) else set[str]()
    has_shared = any(SHARED.fullmatch(name) for name in types)
    return {
        name
        for name, type_ in types.items()
        if _is_part(name)
        or BUFFERS.fullmatch(name)
        or (MASKS.fullmatch(name) and len(type_.shape) > 1)
        or (has_shared and COPIES.fullmatch(name))
        or name in tied
    }


def _tied_names(architecture: Architecture) -> set[str]:
    """The head's weight; of a head that is a `decoder` within a larger one, the bias too, which that one holds."""
    biased = [head for head in architecture.heads if head.endswith(".decoder")]
    return {f"{head}.weight" for head in architecture.heads} | {f"{head}.bias" for head in biased}


def _is_quantizable(module: Module, architecture: Architecture) -> bool:
    """Whether `quantize.nf4` takes it with `all-linear`, and has not yet."""
    is_own = architecture.own_linear or module.is_quantized
    is_linear = module.kind in (Kind.LINEAR, Kind.CONV1D) and f"{module.path}.weight" in module.tensors
    return is_linear and not is_own and not architecture.keeps_full_precision(module.path)
