"""The other methods of PEFT that can be folded, each by its `peft_type`."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import ClassVar

from surgery.checkpoint.architecture import Kind
from surgery.formats.peft.additive import AddDelta, AddRow
from surgery.formats.peft.base import Misfit, Target
from surgery.formats.peft.delta import AdaLora, Delta, Hadamard, Kronecker, Shards, Vera
from surgery.formats.peft.lora import LoRA, is_turned
from surgery.formats.peft.method import Change, Method, Part, Shared
from surgery.formats.peft.patch import Replacement, Rotated, Step
from surgery.formats.peft.scaling import Rescale, Rotate, Rotation
from surgery.formats.peft.settings import Settings

__all__ = ["METHODS", "PROMPT_METHODS"]

PROMPT_METHODS = (
    "PREFIX_TUNING", "PROMPT_TUNING", "P_TUNING", "MULTITASK_PROMPT_TUNING", "CPT", "CARTRIDGE", "ADAPTION_PROMPT",
)  # fmt: skip


class IA3(Method):
    """Vectors that a module's inputs or outputs are multiplied with."""

    suffixes: ClassVar = {"ia3_l": "vector"}

    def changes(self, part: Part, target: Target, settings: Settings, shared: Shared) -> Iterable[Change]:
        """The weight, and the bias where the outputs are multiplied."""
        (vector,) = part.types("vector")
        weight = target.type(target.weight)
        num = math.prod(vector.shape)
        is_inputs = vector.shape[:1] == (1,) and num > 1 and _is_feedforward(part, target, settings)
        dim = 1 if is_inputs != target.is_turned else 0
        if len(weight.shape) < 2 or weight.shape[dim] != num:
            raise Misfit(f"has a vector {vector} for a weight {weight}")
        yield Change(target.weight, Step(Rescale(weight.shape, dim, vector.shape), part.inputs("vector")))
        if not is_inputs and target.bias in target.module.tensors:
            bias = target.type(target.bias)
            yield Change(target.bias, Step(Rescale(bias.shape, 0, vector.shape), part.inputs("vector")))


def _is_feedforward(part: Part, target: Target, settings: Settings) -> bool:
    """A vector for the inputs is [1, in], one for the outputs [out, 1]; a convolution's are alike."""
    return target.module.kind is not Kind.CONVOLUTION or settings.names_module("feedforward_modules", part.path)


class VeRA(Method):
    """Random projections that all modules share, and two vectors for each."""

    suffixes: ClassVar = {"vera_lambda_b": "lambda_b", "vera_lambda_d": "lambda_d"}
    shared: ClassVar = ("vera_A", "vera_B")

    def check(self, settings: Settings, shared: Shared) -> None:
        """Raises Misfit if the projections were not saved."""
        if not all(name in shared for name in self.shared):
            what = "does not hold the projections `vera_A` and `vera_B`, which PEFT draws anew when it loads it"
            raise Misfit(f"{what}: load it with PEFT and save it with `save_projection: true` in its config")

    def changes(self, part: Part, target: Target, settings: Settings, shared: Shared) -> Iterable[Change]:
        """The weight."""
        lambda_b, lambda_d = part.types("lambda_b", "lambda_d")
        weight, a, b = target.type(target.weight), shared["vera_A"].type, shared["vera_B"].type
        if len(weight.shape) != 2 or len(a.shape) != 2 or len(b.shape) != 2 or len(lambda_b.shape) != 1:
            raise Misfit(f"has projections {a} and {b} for a weight {weight}")
        out_features = lambda_b.shape[0]
        in_features = weight.num_elements // max(1, out_features)
        turned = is_turned(weight, (out_features, in_features), target, settings)
        delta = Vera(out_features, in_features, math.prod(lambda_d.shape), a.shape[1], b.shape[0])
        if a.shape[1] < in_features or b.shape[0] < out_features:
            raise Misfit(f"has projections {a} and {b}, too small for a weight {weight}")
        inputs = (*part.inputs("lambda_b", "lambda_d"), shared["vera_A"], shared["vera_B"])
        yield Change(target.weight, Step(AddDelta(weight.shape, delta, turned), inputs))


class AdaLoRA(Method):
    """Low-rank adaptation whose ranks were weighed against each other."""

    suffixes: ClassVar = {"lora_A": "lora_A", "lora_B": "lora_B", "lora_E": "lora_E"}

    def changes(self, part: Part, target: Target, settings: Settings, shared: Shared) -> Iterable[Change]:
        """The weight."""
        slots = ("lora_A", "lora_B", "lora_E")
        (rank, in_features), (out_features, _), _ = part.matrices(*slots)
        num_ranks = settings.number("init_r", 12)
        alpha = settings.number("lora_alpha", 8)
        delta = AdaLora(out_features, in_features, rank, alpha if alpha > 0 else num_ranks, num_ranks)
        yield _added(part, target, settings, delta, slots)


class LoHa(Method):
    """The elementwise product of two low-rank products."""

    suffixes: ClassVar = {
        name: name for name in ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b", "hada_t1", "hada_t2")
    }

    def changes(self, part: Part, target: Target, settings: Settings, shared: Shared) -> Iterable[Change]:
        """The weight."""
        if "hada_t1" in part.nodes:
            raise Misfit("is decomposed for convolutions (`use_effective_conv2d`), which is not folded here")
        slots = ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b")
        (out_features, rank), (_, in_features), *_ = part.matrices(*slots)
        delta = Hadamard(out_features, in_features, rank, _lycoris_scaling(part, settings))
        yield _added(part, target, settings, delta, slots)


class LoKr(Method):
    """A Kronecker product."""

    suffixes: ClassVar = {
        name: name
        for name in ("lokr_w1", "lokr_w1_a", "lokr_w1_b", "lokr_w2", "lokr_w2_a", "lokr_w2_b", "lokr_t2")
    }  # fmt: skip

    def changes(self, part: Part, target: Target, settings: Settings, shared: Shared) -> Iterable[Change]:
        """The weight."""
        if "lokr_t2" in part.nodes:
            raise Misfit("is decomposed for convolutions (`use_effective_conv2d`), which is not folded here")
        first, second = _factors(part, "lokr_w1"), _factors(part, "lokr_w2")
        w1, w2 = tuple(part.matrices(*first)), tuple(part.matrices(*second))
        rows, cols = w1[0][0] * w2[0][0], w1[-1][1] * w2[-1][1]
        delta = Kronecker(rows, cols, w1, w2, _lycoris_scaling(part, settings))
        yield _added(part, target, settings, delta, (*first, *second))


def _factors(part: Part, name: str) -> tuple[str, ...]:
    return (name,) if name in part.nodes else (f"{name}_a", f"{name}_b")


def _lycoris_scaling(part: Part, settings: Settings) -> float:
    return settings.alpha(part.path, "alpha") / settings.rank(part.path)


class OFT(Method):
    """Orthogonal rotations of blocks of the inputs."""

    suffixes: ClassVar = {"oft_R.weight": "triangles", "oft_embedding_R.weight": "embedding"}

    def check(self, settings: Settings, shared: Shared) -> None:
        """Raises Misfit for the constrained variant."""
        if settings.flag("coft"):
            raise Misfit("is a constrained OFT (`coft`), which is not folded here: merge it with PEFT")

    def changes(self, part: Part, target: Target, settings: Settings, shared: Shared) -> Iterable[Change]:
        """The weight."""
        slot = "embedding" if "embedding" in part.nodes else "triangles"
        ((num_stored, elements),) = part.matrices(slot)
        weight = target.type(target.weight)
        size = (1 + math.isqrt(1 + 8 * elements)) // 2
        if len(weight.shape) != 2 or target.is_turned:
            raise Misfit(f"rotates a weight {weight}, which PEFT does for Linears and embeddings only")
        num_blocks = 1 if settings.flag("block_share") else weight.shape[1] // size
        if weight.shape[1] % size or num_stored != num_blocks:
            raise Misfit(f"has {num_stored} blocks of {size} for a weight {weight}")
        exact = settings.config.get("use_cayley_neumann") is False
        terms = 0 if exact else int(settings.number("num_cayley_neumann_terms", 5))
        rotate = Rotate(weight.shape, size, num_stored, forward=slot == "embedding")
        yield Change(target.weight, Rotated(rotate, Rotation(size, terms), part.nodes[slot]))


class MiSS(Method):
    """A block that is added to every shard of the inputs."""

    suffixes: ClassVar = {"miss_block": "block"}

    def check(self, settings: Settings, shared: Shared) -> None:
        """Raises Misfit for the variant that multiplies too."""
        if settings.config.get("init_weights") == "bat":
            raise Misfit('is a MiSS with `init_weights: "bat"`, which is not folded here: merge it with PEFT')

    def changes(self, part: Part, target: Target, settings: Settings, shared: Shared) -> Iterable[Change]:
        """The weight."""
        ((rank, mini),) = part.matrices("block")
        weight = target.type(target.weight)
        if len(weight.shape) != 2 or target.is_turned or weight.shape[0] % mini:
            raise Misfit(f"has a block [{rank}, {mini}] for a weight {weight}")
        yield _added(part, target, settings, Shards(*weight.shape, rank, mini), ("block",))


class LNTuning(Method):
    """Norms stored whole."""

    suffixes: ClassVar = {"ln_tuning_layers.weight": "weight", "ln_tuning_layers.bias": "bias"}

    def changes(self, part: Part, target: Target, settings: Settings, shared: Shared) -> Iterable[Change]:
        """What is stored replaces the base's."""
        for slot, node in part.nodes.items():
            name = f"{target.path}.{slot}"
            if target.type(name).shape != node.type.shape:
                raise Misfit(f"has a `{slot}` of {node.type}; the base's is {target.type(name)}")
            yield Change(name, Replacement(node))


class BEFT(Method):
    """Vectors that are added to the biases of Linears."""

    suffixes: ClassVar = {"beft_bias": "vector"}

    def changes(self, part: Part, target: Target, settings: Settings, shared: Shared) -> Iterable[Change]:
        """The bias."""
        bias = target.type(target.bias)
        yield Change(target.bias, Step(AddRow(bias.shape, 1.0), part.inputs("vector")))


class TrainableTokens(Method):
    """Rows of an embedding stored whole."""

    suffixes: ClassVar[Mapping[str, str]] = {}

    def changes(self, part: Part, target: Target, settings: Settings, shared: Shared) -> Iterable[Change]:
        """Nothing but the rows, which every method may have."""
        return ()


def _added(part: Part, target: Target, settings: Settings, delta: Delta, slots: tuple[str, ...]) -> Change:
    weight = target.type(target.weight)
    turned = is_turned(weight, (delta.rows, delta.cols), target, settings)
    return Change(target.weight, Step(AddDelta(weight.shape, delta, turned), part.inputs(*slots)))


METHODS: Mapping[str, Method] = {
    "LORA": LoRA(),
    "ADALORA": AdaLoRA(),
    "BEFT": BEFT(),
    "IA3": IA3(),
    "LN_TUNING": LNTuning(),
    "LOHA": LoHa(),
    "LOKR": LoKr(),
    "MISS": MiSS(),
    "OFT": OFT(),
    "TRAINABLE_TOKENS": TrainableTokens(),
    "VERA": VeRA(),
}
