"""`attach.prompt_tuning`."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import ClassVar, Literal

from surgery.errors import OpError, Problem
from surgery.formats.peft.embedding import embedding_scale, tokens_of
from surgery.formats.peft.prompts import (
    Embedding,
    PromptAttach,
    Sizes,
    input_embedding,
    num_submodules,
    prompt_sizes,
)
from surgery.graph import Node
from surgery.numerics.prompts import EmbeddingRows, NormalRows, Sample, Tokens
from surgery.op import SOURCE, Attached, Scene, doc

TOKENS_SCHEMA = {"type": "array", "items": {"type": "integer", "minimum": 0}, "minItems": 1}
TEXT_SCHEMA = {"type": "string", "minLength": 1}


@dataclass(frozen=True, slots=True, kw_only=True)
class PromptTuning(PromptAttach):
    """A new soft prompt, ready to be trained: vectors that stand before the embeddings of every input.

    Reads    the input embedding [tokens, width], for its width; its rows only with `init_tokens`, `init_text` or
             `init: sample_vocab`, as the edits before leave them
    Writes   adapters/<name>/ as PEFT reads it
             prompt_embeddings  f32 [num_virtual_tokens, width]; of an encoder-decoder twice as many rows, as PEFT
             counts them, though only the first half is used
             of a classifier also its head, base_model.<head>, which PEFT trains with any prompt
    Numbers  `random`: standard normal, bit for bit what PEFT draws after torch.manual_seed(seed); `sample_vocab`:
             rows of tokens drawn likewise; tokens: their rows, from the first one on until there are enough, as the
             embedding gives them (Gemma and some of BART's kin scale them), so that the model computes what it would
             with these tokens before the input
    Mind     PEFT loads a prompt frozen: to train it, set requires_grad on its prompt_encoder's parameters
             `init_text` is read by tokenizer.json beside the weights, special tokens and all
    Raises   OpError without an input embedding, for tokens that it does not have, a text without a tokenizer, a
             task that cannot be known, and a model that PEFT would feed embeddings of another scale
    Source   arXiv 2104.08691; PEFT 0.21.2
    """

    peft_type: ClassVar[str] = "PROMPT_TUNING"

    init: Literal["random", "sample_vocab"] = field(
        default="random", metadata=doc("How it begins, where neither `init_tokens` nor `init_text` says it.")
    )
    init_tokens: tuple[int, ...] = field(
        default=(), metadata=doc("Ids of the tokens it begins as.", schema=TOKENS_SCHEMA, examples=([464, 3280],))
    )
    init_text: str | None = field(
        default=None, metadata=doc("A text it begins as; needs the extra `text`.", schema=TEXT_SCHEMA)
    )

    def check(self, patterns: tuple[re.Pattern[str], ...]) -> str:
        """Ways to begin exclude each other."""
        given = [bool(self.init_tokens), self.init_text is not None, self.init != "random"]
        return "`init`, `init_tokens` and `init_text` exclude each other" if sum(given) > 1 else ""

    def sizes(self, scene: Scene) -> Sizes:
        """Those of the model."""
        return prompt_sizes(scene)

    def prompt(self, scene: Scene, sizes: Sizes, task: str) -> Node:
        """Drawn rows, or rows of the embedding. Raises OpError."""
        num_rows = self.num_virtual_tokens * num_submodules(task)
        if self.init == "random" and not self.init_tokens and self.init_text is None:
            return scene.graph.apply(NormalRows(num_rows, sizes.token_dim, scene.seed))[0]
        embedding = input_embedding(scene)
        scale = embedding_scale(scene)
        rows = EmbeddingRows(
            self._chosen(scene, embedding, num_rows), embedding.shape, scale.factor, rounds_scale=scale.is_rounded
        )
        try:
            return scene.graph.apply(rows, embedding.weight)[0]
        except ValueError as error:
            raise OpError(Problem(f"`{embedding.path}` gives no rows: {error}", fix="dequantize it first")) from None

    def _chosen(self, scene: Scene, embedding: Embedding, num_rows: int) -> Tokens | Sample:
        num_tokens, width = embedding.shape
        if self.init == "sample_vocab":
            return Sample(scene.seed, num_rows, width, num_tokens)
        option = "init_tokens" if self.init_tokens else "init_text"
        home = scene.models[SOURCE].checkpoint.home
        ids = tuple(self.init_tokens) or tokens_of(self.init_text or "", home)
        beyond = [token for token in ids if token >= num_tokens]
        if beyond:
            what = f"`{option}`: `{embedding.path}` has {num_tokens} tokens, and none with the id {beyond[0]}"
            raise OpError(Problem(what, fix=f"give ids from 0 to {num_tokens - 1}"))
        return Tokens(ids[:num_rows], num_rows)

    def own_config(self, sizes: Sizes, attached: Attached) -> Mapping[str, object]:
        """PEFT asks for the name of a tokenizer with every text, and knows no tokens."""
        init = "SAMPLE_VOCAB" if self.init == "sample_vocab" else "RANDOM"
        tokenizer = attached.base_name if self.init_text is not None else None
        return {
            "prompt_tuning_init": "TEXT" if tokenizer else init,
            "prompt_tuning_init_text": self.init_text if tokenizer else None,
            "tokenizer_name_or_path": tokenizer,
            "tokenizer_kwargs": None,
        }
