"""`adapter.fold`."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import ClassVar, cast

from surgery.checkpoint.modules import modules_of
from surgery.errors import OpError, Problem
from surgery.formats.bitsandbytes import is_bitsandbytes, patch_config, quantize_of_dequantize
from surgery.formats.peft import Floats, Tied, read_adapter, refuse_other_base
from surgery.formats.vocabulary import vocabulary_sizes, with_vocabulary
from surgery.graph import Node, Rule
from surgery.numerics.cast import cast_of_cast, transpose_of_cast
from surgery.numerics.transpose import transpose_of_transpose
from surgery.op import SOURCE, Finished, Model, Op, Rewrite, Scene, Selects, doc
from surgery.types import TensorType

NAMES = {"type": "string"}
OPTIONS = {
    "type": "object",
    "properties": {"weight": {"type": "number", "default": 1.0}},
    "additionalProperties": False,
}
SCHEMA = {
    "anyOf": [
        NAMES,
        {"type": "array", "items": NAMES, "minItems": 1, "uniqueItems": True},
        {"type": "object", "additionalProperties": OPTIONS, "minProperties": 1},
    ]
}


@dataclass(frozen=True, slots=True)
class Fold(Op):
    """PEFT adapters folded into the weights, which then need them no more.

    Reads    every weight and bias that an adapter changes  f32|f16|bf16, or bitsandbytes 4-bit
             adapters   LORA (rsLoRA, DoRA, biases, embeddings, convolutions, `target_parameters`), ADALORA, IA3,
                        LN_TUNING, LOHA, LOKR, MISS, OFT, TRAINABLE_TOKENS, VERA, and modules that they store whole
    Writes   the same names, dtypes and shapes; of a tensor that the adapter stores whole, the adapter's shape
             config.json  vocab_size where the adapter brings a larger vocabulary; tie_word_embeddings if `tied: untie`
    Exact    the bits of PEFT's `merge_and_unload()` on one CPU thread: weight + difference in f32, rounded once to the
             weight's dtype (for embeddings, experts and `target_parameters` the difference is rounded first, as PEFT
             does). Several adapters are folded in the order in which they are listed, each with its own rounding.
             OFT, and DoRA on an embedding or a Conv1D, sum in another order than PEFT: the same up to f32 rounding
             What `ensure_weight_tying` trained as one for embedding and head is folded once; PEFT folds it twice
    4-bit    the weight is dequantized, folded in f32 and quantized again in the same format, as PEFT does; with
             `requantize: false` it is written as floats of the dtype it had
    Mind     do not load the adapter on top of the output: it would be applied twice
    Raises   OpError for an adapter that was made for another base (a module or a shape that the base lacks), changes
             one side of a tied pair while `tied` does not say what is meant, works on the input (prompt and prefix
             tuning), or has a weight other than 1 where its method has no factor (DoRA, IA3, OFT, whole tensors)
    Source   PEFT 0.21, `merge_and_unload` and the paper of each method
    """

    selects: ClassVar[Selects] = "checkpoint"
    rules: ClassVar[tuple[Rule, ...]] = (
        quantize_of_dequantize, transpose_of_transpose, transpose_of_cast, cast_of_cast,
    )  # fmt: skip

    models: object = field(
        metadata=doc(
            "The adapters, named under `models` of the spec: one name, a list, or {NAME: {weight: 0.5}}.",
            examples=("math", {"math": {"weight": 0.5}}),
            schema=SCHEMA,
        )
    )
    requantize: bool = field(
        default=True, metadata=doc("Quantize 4-bit weights again after folding, in the format they had.")
    )
    tied: Tied = field(
        default="refuse",
        metadata=doc(
            "Where an adapter changes one side of a tied embedding and head: refuse; change both, as PEFT's merge does;"
            " or untie them, so that only the trained side changes."
        ),
    )
    any_base: bool = field(
        default=False, metadata=doc("Fold an adapter though its manifest names another base than the source.")
    )

    def model_names(self) -> Iterable[str]:
        """The adapters, in order."""
        return (self.models,) if isinstance(self.models, str) else tuple(cast("Iterable[str]", self.models))

    def _weights(self) -> dict[str, float]:
        models = self.models
        if isinstance(models, str):
            return {models: 1.0}
        if isinstance(models, list):
            return dict.fromkeys(cast("list[str]", models), 1.0)
        named = cast("Mapping[str, Mapping[str, float]]", models)
        return {name: float(options.get("weight", 1.0)) for name, options in named.items()}

    def rewrite_all(self, scene: Scene) -> Rewrite:
        """Every tensor that one of the adapters changes."""
        if scene.models[SOURCE].checkpoint.is_adapter:
            fix = "give the base as the source; `adapter.combine` makes one adapter of several"
            raise OpError(Problem("the source is an adapter, not a checkpoint", fix=fix))
        weights = Floats.of(scene)
        nodes = dict(weights.nodes)
        for name, weight in self._weights().items():
            self._fold(scene.models[name], weight, scene, nodes)
        changed = [name for name, node in nodes.items() if weights.nodes.get(name) is not node]
        _refuse_two_vocabularies(scene, nodes)
        return weights.rewrite(changed, nodes, requantize=self.requantize)

    def _fold(self, model: Model, weight: float, scene: Scene, nodes: dict[str, Node]) -> None:
        if not model.checkpoint.is_adapter:
            what = f"`{model.name}` is no adapter directory: it holds no adapter_config.json with its weights"
            raise OpError(Problem(what, str(model.checkpoint.home), "give the directory that `save_pretrained` wrote"))
        if not self.any_base:
            refuse_other_base(model, scene.models[SOURCE])
        types = {name: node.type for name, node in nodes.items()}
        modules = modules_of(types, scene.architecture)
        adapter = read_adapter(model)
        patches = adapter.patches(types, modules, scene.architecture, _config(scene, types), tied=self.tied)
        if not patches:
            raise OpError(Problem(f"adapter `{model.name}` changes nothing", str(model.checkpoint.home)))
        before = dict(nodes)
        for name, patch in patches.items():
            nodes[name] = patch.apply(scene.graph, before[patch.origin or name], weight)

    def config(self, config: Mapping[str, object], finished: Finished) -> Mapping[str, object]:
        """The quantization_config of what is left quantized; the vocabulary's size; whether the head is tied."""
        if is_bitsandbytes(config):
            config = patch_config(config, finished, {})
        if self.tied == "untie" and _is_untied(config, finished):
            config = {**config, "tie_word_embeddings": False}
        return with_vocabulary(config, finished)


def _config(scene: Scene, types: Mapping[str, TensorType]) -> Mapping[str, object]:
    """The config; a head that an adapter before this one untied is a tensor of its own already."""
    untied = any(f"{path}.weight" in types for path in scene.architecture.heads)
    return {**scene.config, "tie_word_embeddings": False} if untied else scene.config


def _is_untied(config: Mapping[str, object], finished: Finished) -> bool:
    heads = [f"{path}.weight" for path in finished.architecture.heads]
    source = finished.models[SOURCE].nodes
    return finished.architecture.is_tied(config) and any(
        head in finished.nodes and head not in source for head in heads
    )


def _refuse_two_vocabularies(scene: Scene, nodes: Mapping[str, Node]) -> None:
    """Raises OpError if an adapter brings a larger vocabulary for the embedding or the head alone."""
    sizes = vocabulary_sizes(scene.config, scene.models[SOURCE], nodes, scene.modules)
    if len(sizes) > 1:
        what = f"the vocabulary would be of {' and of '.join(map(str, sorted(sizes)))} tokens, here and there"
        raise OpError(Problem(what, fix="fold an adapter that stores the embedding and the head"))
