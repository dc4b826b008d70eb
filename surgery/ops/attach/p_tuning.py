"""`attach.p_tuning`."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import ClassVar, Literal

from surgery.formats.peft.prompts import PromptAttach, Sizes, num_submodules, prompt_sizes
from surgery.graph import Kernel, Node
from surgery.numerics.prompts import LstmRows, MlpRows
from surgery.op import Attached, Scene, doc

COUNT_SCHEMA = {"type": "integer", "minimum": 1}
LAYERS_SCHEMA = {"type": "integer", "minimum": 1, "maximum": 64}  # drawing them all takes time
ENCODER_LAYERS = 2


@dataclass(frozen=True, slots=True, kw_only=True)
class PTuning(PromptAttach):
    """A new soft prompt that comes of a prompt encoder: an MLP, or an LSTM in both directions.

    Reads    the input embedding [tokens, width], for its width
    Writes   adapters/<name>/ as PEFT reads it
             prompt_embeddings  f32 [num_virtual_tokens, width], the encoder's output; of an encoder-decoder twice as
             many rows, as PEFT counts them, though only the first half is used
             of a classifier also its head, base_model.<head>, which PEFT trains with any prompt
    Numbers  bit for bit what PEFT's encoder, as it begins after torch.manual_seed(seed), makes of its standard normal
             rows, on the same processor; without dropout
    Mind     PEFT keeps the encoder's output alone; what is trained from here on is that
             PEFT loads a prompt frozen: to train it, set requires_grad on its prompt_encoder's parameters
    Raises   OpError for a task that cannot be known, sizes that config.json does not say, and a model that PEFT
             would feed embeddings of another scale
    Source   Liu et al., arXiv 2103.10385; PEFT 0.21.2
    """

    peft_type: ClassVar[str] = "P_TUNING"

    encoder: Literal["mlp", "lstm"] = field(default="mlp", metadata=doc("What the prompt comes of."))
    encoder_hidden_size: int | None = field(
        default=None, metadata=doc("Width of the encoder. Default: that of a token.", schema=COUNT_SCHEMA)
    )
    num_layers: int = field(
        default=ENCODER_LAYERS,
        metadata=doc("Layers of the LSTM; an MLP has 3 Linears.", schema=LAYERS_SCHEMA, key="encoder_num_layers"),
    )
    dropout: float = field(
        default=0.0,
        metadata=doc(
            "PEFT's encoder_dropout, between the layers of the LSTM in training; noted in the config.",
            schema={"type": "number", "minimum": 0, "exclusiveMaximum": 1},
            key="encoder_dropout",
        ),
    )

    def check(self, patterns: tuple[re.Pattern[str], ...]) -> str:
        """Options of the LSTM alone."""
        stray = self.encoder == "mlp" and (self.num_layers != ENCODER_LAYERS or self.dropout)
        return "`encoder_num_layers` and `encoder_dropout` are of the LSTM: say `encoder: lstm` too" if stray else ""

    def sizes(self, scene: Scene) -> Sizes:
        """Those of the model."""
        return prompt_sizes(scene)

    def prompt(self, scene: Scene, sizes: Sizes, task: str) -> Node:
        """The encoder's output."""
        num_rows = self.num_virtual_tokens * num_submodules(task)
        return scene.graph.apply(self._kernel(num_rows, sizes.token_dim, scene.seed))[0]

    def _kernel(self, num_rows: int, width: int, seed: int) -> Kernel:
        hidden = self.encoder_hidden_size or width
        if self.encoder == "lstm":
            return LstmRows(num_rows, width, seed, hidden, self.num_layers)
        return MlpRows(num_rows, width, seed, hidden)

    def own_config(self, sizes: Sizes, attached: Attached) -> Mapping[str, object]:
        """The encoder."""
        return {
            "encoder_reparameterization_type": self.encoder.upper(),
            "encoder_hidden_size": self.encoder_hidden_size or sizes.token_dim,
            "encoder_num_layers": self.num_layers,
            "encoder_dropout": self.dropout,
        }
