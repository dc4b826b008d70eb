"""LORA, with rsLoRA, DoRA, biases, embeddings, convolutions and fused experts."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import ClassVar

from surgery.checkpoint.architecture import Kind
from surgery.formats.peft.additive import AddDelta, AddVector
from surgery.formats.peft.base import Base, Inconsistent, Misfit, Target
from surgery.formats.peft.delta import LowRank
from surgery.formats.peft.dora import Decomposed
from surgery.formats.peft.experts import expert_changes
from surgery.formats.peft.method import Change, Method, Part, Shared
from surgery.formats.peft.patch import Step
from surgery.formats.peft.settings import Settings
from surgery.types import TensorType

__all__ = ["LoRA", "is_turned"]

# Variants that PEFT merges otherwise, or not at all.
OTHER_VARIANTS = (
    "arrow_config", "use_bdlora", "alora_invocation_tokens", "velora_config", "monteclora_config", "kasa_config",
)  # fmt: skip

CHANGE_THE_BASE = ("pissa", "corda", "olora", "loftq", "lora_ga")  # values of init_lora_weights


class LoRA(Method):
    """Low-rank adaptation, arXiv 2106.09685."""

    suffixes: ClassVar = {
        "lora_A.weight": "lora_A",
        "lora_B.weight": "lora_B",
        "lora_B.bias": "bias",
        "lora_embedding_A": "lora_embedding_A",
        "lora_embedding_B": "lora_embedding_B",
        "lora_magnitude_vector": "magnitude",
        "lora_magnitude_vector.weight": "magnitude",
    }

    def check(self, settings: Settings, shared: Shared) -> None:
        """Raises Misfit for the variants that are more than a low-rank difference."""
        init = settings.config.get("init_lora_weights")
        if isinstance(init, str) and init.startswith(CHANGE_THE_BASE):
            what = f"is a LoRA initialised with `{init}`, which belongs to a base that its initialisation has changed"
            raise Misfit(
                f"{what}: convert it first, with `path_initial_model_for_weight_conversion` of `save_pretrained`"
            )
        used = [key for key in OTHER_VARIANTS if settings.flag(key)]
        if used:
            raise Misfit(f"is a LoRA with `{used[0]}`, which no fold into the weights stands for")

    def changes(self, part: Part, target: Target, settings: Settings, shared: Shared) -> Iterable[Change]:
        """The weight, and the bias where the adapter has one for it."""
        _refuse_half(part, "magnitude", "use_dora", settings)
        step = _embedding if any(slot.startswith("lora_embedding") for slot in part.nodes) else _matrix
        yield Change(target.weight, step(part, target, settings))
        if "bias" in part.nodes:
            yield Change(target.bias, _bias(part, target, settings))
        if "lora_B" in part.nodes:
            _refuse_half(part, "bias", "lora_bias", settings)

    def gathered(self, path: str, parts: Sequence[Part], base: Base, settings: Settings) -> Iterable[Change] | None:
        """Fused experts: one part for each weight that `target_parameters` names."""
        return expert_changes(path, parts, base, settings)


def _refuse_half(part: Part, slot: str, flag: str, settings: Settings) -> None:
    """Raises Inconsistent if the config and the tensors do not agree on whether there is a `slot`."""
    if settings.flag(flag) != (slot in part.nodes):
        has = f"has no {slot}" if settings.flag(flag) else f"has a {slot}"
        raise Inconsistent(f"{has}, but `{flag}` of the adapter's config is {str(settings.flag(flag)).lower()}")


def _matrix(part: Part, target: Target, settings: Settings) -> Step:
    a, b = part.types("lora_A", "lora_B")
    if len(a.shape) < 2 or len(a.shape) != len(b.shape):
        raise Misfit(f"has factors {a} and {b}, which are no matrices")
    rank, in_features, *window = a.shape
    weight = target.type(target.weight)
    delta = LowRank(b.shape[0], in_features * math.prod(window), rank, settings.scaling(part.path, rank), tuple(window))
    turned = is_turned(weight, (b.shape[0], *a.shape[1:]), target, settings)
    # PEFT rounds the difference of what it takes for a parameter, as it does the experts that transformers 5 fuses.
    is_parameter = target.module.kind is Kind.EXPERT or settings.targets_parameter(f"{part.path}.weight")
    kernel = AddDelta(weight.shape, delta, turned, rounds_delta=is_parameter)
    return _step(part, ("lora_A", "lora_B"), kernel)


def _embedding(part: Part, target: Target, settings: Settings) -> Step:
    (rank, num_rows), (width, _) = part.matrices("lora_embedding_A", "lora_embedding_B")
    delta = LowRank(width, num_rows, rank, settings.scaling(part.path, rank))
    kernel = AddDelta(target.type(target.weight).shape, delta, transposed=True, rounds_delta=True)
    return _step(part, ("lora_embedding_A", "lora_embedding_B"), kernel)


def _step(part: Part, slots: tuple[str, str], kernel: AddDelta) -> Step:
    if "magnitude" not in part.nodes:
        return Step(kernel, part.inputs(*slots))
    decomposed = Decomposed(kernel.shape, kernel.delta, kernel.transposed)
    return Step(decomposed, part.inputs(*slots, "magnitude"))


def _bias(part: Part, target: Target, settings: Settings) -> Step:
    (a,) = part.types("lora_A")
    kernel = AddVector(target.type(target.bias).shape, settings.scaling(part.path, a.shape[0]))
    return Step(kernel, part.inputs("bias"))


def is_turned(weight: TensorType, expected: tuple[int, ...], target: Target, settings: Settings) -> bool:
    """Whether the weight is stored [in, out]. Raises Misfit if it is not of the shape `expected`, [out, in]."""
    turned = target.is_turned or (
        settings.flag("fan_in_fan_out") and weight.shape != expected and target.module.kind is not Kind.EMBEDDING
    )
    if weight.shape != (expected[::-1] if turned else expected):
        raise Misfit(f"was made for a weight of {list(expected)}; the base's is {weight}")
    return turned
