"""What a module is, from names, shapes and config.json: a table of data, never model code.

Why: a Linear, a Conv1D and an embedding are all two-dimensional weights on disk, yet loaders
quantize the first two only, the second transposed. Which is which depends on the architecture;
the table says where it departs from the general rule, and an architecture that it does not
know is judged by names and shapes alone.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Set
from dataclasses import dataclass
from enum import Enum
from typing import cast

__all__ = ["Architecture", "Kind", "architecture_of"]


class Kind(Enum):
    """What a module computes."""

    LINEAR = "Linear"
    CONV1D = "Conv1D"  # GPT-2's Linear, its weight stored [in, out]
    EMBEDDING = "embedding"
    NORM = "norm"
    CONVOLUTION = "convolution"
    EXPERT = "MoE expert"
    ROUTER = "MoE router"
    HEAD = "output head"
    OTHER = "other"


EMBEDDINGS = re.compile(
    r"(.*\.)?(embed_tokens|tokens_embed|positions_embed|tok_embeddings|embed_positions|embed_in|wte|wpe|shared|word_embeddings|embeddings?"
    r"|position_embeddings?|token_embeddings?|token_type_embeddings|relative_attention_bias|rel_embeddings|embed_tokens_per_layer|embed_tokens_extend)"
)
HEADS = re.compile(
    r"(.*\.)?(lm_head|embed_out|output_projection)|cls\.predictions\.decoder|output|generator_lm_head"
    r"|classifier(\..*)?|score|qa_outputs"  # of a task, at the top of the model
)
EXPERTS = re.compile(r"(.*\.)?(experts|local_experts|expert_mlps)(\..*)?")
ROUTERS = re.compile(r"(.*\.)?(gate|router|router\.classifier|shared_expert_gate)")


@dataclass(frozen=True, slots=True)
class Architecture:
    """Where one family of `model_type`s departs from the general rule. Regexes match in full."""

    model_types: tuple[str, ...] = ()
    conv1d: str = ""  # modules whose weight is stored [in, out]
    heads: tuple[str, ...] = ()  # the output head's path at run time, whether on disk or tied away
    tied: bool = False  # whether the head shares the embedding when the config does not say
    full_precision: str = ""  # Linears that transformers keeps in float32 when it quantizes
    own_linear: bool = False  # its Linears are a subclass of nn.Linear, which transformers does not quantize
    prefix: str = ""  # the base model inside a model with a head

    def kind(self, path: str, weight_shape: tuple[int, ...], siblings: Set[str]) -> Kind:
        """What the module at `path` with a weight of this shape is; `siblings` are the modules beside it."""
        rank = len(weight_shape)
        if EXPERTS.fullmatch(path):
            return Kind.EXPERT
        if rank == 1:
            return Kind.NORM
        if rank > 2:
            return Kind.CONVOLUTION
        if rank != 2:
            return Kind.OTHER
        return self._matrix_kind(path, siblings)

    def _matrix_kind(self, path: str, siblings: Set[str]) -> Kind:
        if path in self.heads or HEADS.fullmatch(path):
            return Kind.HEAD
        if EMBEDDINGS.fullmatch(path):
            return Kind.EMBEDDING
        if ROUTERS.fullmatch(path) and "experts" in siblings:
            return Kind.ROUTER
        if self.conv1d and re.fullmatch(self.conv1d, path):
            return Kind.CONV1D
        return Kind.LINEAR

    def keeps_full_precision(self, path: str) -> bool:
        """Whether transformers leaves this Linear in float32 when it quantizes."""
        return bool(self.full_precision and re.fullmatch(self.full_precision, path))

    def is_tied(self, config: Mapping[str, object]) -> bool:
        """Whether head and embedding share one tensor."""
        nested = config.get("text_config")
        inner: Mapping[str, object] = cast(Mapping[str, object], nested) if isinstance(nested, Mapping) else {}
        value = config.get("tie_word_embeddings", inner.get("tie_word_embeddings", self.tied))
        return bool(value)


TABLE = (
    Architecture(
        ("llama", "mistral", "ministral", "mixtral", "qwen2_moe", "qwen3_moe", "phi", "phi3", "olmo", "olmo2", "olmoe",
         "stablelm", "starcoder2", "deepseek_v2", "deepseek_v3", "granitemoe", "internlm2", "yi", "smollm3", "glm4"),
        heads=("lm_head",), prefix="model",
    ),
    Architecture(("qwen2", "qwen3", "granite"), heads=("lm_head",), prefix="model"),
    Architecture(
        ("gemma", "gemma2", "gemma3_text", "cohere", "cohere2"), heads=("lm_head",), tied=True, prefix="model"
    ),
    Architecture(("opt",), heads=("lm_head",), tied=True, prefix="model"),
    Architecture(("falcon",), heads=("lm_head",), tied=True, prefix="transformer", own_linear=True),
    Architecture(("bloom", "mpt", "gpt_bigcode"), heads=("lm_head",), tied=True, prefix="transformer"),
    Architecture(("gptj", "codegen"), heads=("lm_head",), prefix="transformer"),
    Architecture(("gpt_neo",), heads=("lm_head",), tied=True, prefix="transformer"),
    Architecture(("gpt_neox",), heads=("embed_out", "lm_head"), prefix="gpt_neox"),
    Architecture(
        ("gpt2", "openai-gpt", "imagegpt", "decision_transformer"),
        conv1d=r"(.*\.)?(c_attn|q_attn|c_proj|c_fc)", heads=("lm_head",), tied=True, prefix="transformer",
    ),
    Architecture(("bert", "mobilebert"), heads=("cls.predictions.decoder",), tied=True, prefix="bert"),
    Architecture(("roberta", "xlm-roberta", "camembert"), heads=("lm_head.decoder",), tied=True, prefix="roberta"),
    Architecture(("albert",), heads=("predictions.decoder",), tied=True, prefix="albert"),
    Architecture(("distilbert",), heads=("vocab_projector",), tied=True, prefix="distilbert"),
    Architecture(("electra",), heads=("generator_lm_head",), tied=True, prefix="electra"),
    Architecture(("deberta", "deberta-v2"), heads=("cls.predictions.decoder",), tied=True, prefix="deberta"),
    Architecture(("mpnet",), heads=("lm_head.decoder",), tied=True, prefix="mpnet"),
    Architecture(
        ("t5", "mt5", "umt5", "pop2piano", "udop"), heads=("lm_head",), tied=True, full_precision=r"(.*\.)?wo"
    ),
    Architecture(("bart", "mbart", "pegasus", "marian", "m2m_100"), heads=("lm_head",), tied=True, prefix="model"),
    Architecture(("whisper",), heads=("proj_out",), tied=True, prefix="model"),
    Architecture(("vit",), prefix="vit"),
    Architecture(("dinov2",), prefix="dinov2"),
    Architecture(("deit",), prefix="deit"),
    Architecture(("clip", "siglip")),
)  # fmt: skip

UNKNOWN = Architecture(heads=("lm_head",))


def architecture_of(config: Mapping[str, object] | None) -> Architecture:
    """The table's row for this config's `model_type`; one without `model_types` if there is none."""
    model_type = (config or {}).get("model_type")
    return next((row for row in TABLE if model_type in row.model_types), UNKNOWN)
