"""`attach.prefix_tuning`."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import ClassVar, Literal

from surgery.formats.peft.prefixes import prefix_sizes
from surgery.formats.peft.prompts import PromptAttach, Sizes
from surgery.graph import Kernel, Node
from surgery.numerics.constant import Constant
from surgery.numerics.prompts import NormalRows, PrefixRows
from surgery.op import Attached, Scene, doc


@dataclass(frozen=True, slots=True, kw_only=True)
class PrefixTuning(PromptAttach):
    """A new prefix, ready to be trained: keys and values that every layer attends to before the input's own.

    Reads    nothing but config.json and shapes
    Writes   adapters/<name>/ as PEFT reads it
             prompt_embeddings  f32 [num_virtual_tokens, layers · 2 · heads · width], seen as (token, layer, key or
             value, head, width): the heads of keys and values, fewer than those of the queries where these share them
             of a classifier also its head, base_model.<head>, which PEFT trains with any prompt
    Numbers  `normal`: standard normal; with `reparametrize: mlp` what its two Linears, as they begin, make of
             standard normal rows. Both bit for bit what PEFT draws and computes after torch.manual_seed(seed), on
             the same processor. `zero`: zeros, which are attended to all the same
    Mind     PEFT keeps the MLP's output alone; what is trained from here on is that
             PEFT loads a prefix frozen: to train it, set requires_grad on its prompt_encoder's parameters
             of an encoder-decoder it stands before the decoder's own keys and values
    Raises   OpError for layers of unlike key and value width, for a model that takes no prefix, a task that cannot
             be known, and sizes that config.json does not say
    Source   Li and Liang, arXiv 2101.00190; P-Tuning v2, 2110.07602; PEFT 0.21.2
    """

    peft_type: ClassVar[str] = "PREFIX_TUNING"

    init: Literal["normal", "zero"] = field(default="normal", metadata=doc("How it begins."))
    reparametrize: Literal["mlp"] | None = field(
        default=None, metadata=doc("Draw it through the MLP of Li and Liang (PEFT's prefix_projection).")
    )
    encoder_hidden_size: int | None = field(
        default=None,
        metadata=doc(
            "Width of that MLP. Default: that of all heads together.", schema={"type": "integer", "minimum": 1}
        ),
    )

    def check(self, patterns: tuple[re.Pattern[str], ...]) -> str:
        """A width of what is not there."""
        stray = self.encoder_hidden_size is not None and self.reparametrize is None
        return "`encoder_hidden_size` is of the MLP: say `reparametrize: mlp` too" if stray else ""

    def sizes(self, scene: Scene) -> Sizes:
        """Those of the keys and values."""
        return prefix_sizes(scene)

    def prompt(self, scene: Scene, sizes: Sizes, task: str) -> Node:
        """All layers' keys and values."""
        return scene.graph.apply(self._kernel(scene.seed, sizes))[0]

    def _kernel(self, seed: int, sizes: Sizes) -> Kernel:
        num_rows, width = self.num_virtual_tokens, 2 * sizes.num_layers * sizes.token_dim
        if self.init == "zero":
            return Constant(0.0, (num_rows, width))
        if self.reparametrize is None:
            return NormalRows(num_rows, width, seed)
        return PrefixRows(num_rows, width, seed, self.encoder_hidden_size or sizes.token_dim, sizes.token_dim)

    def own_config(self, sizes: Sizes, attached: Attached) -> Mapping[str, object]:
        """How it began."""
        return {
            "prefix_projection": self.reparametrize is not None,
            "encoder_hidden_size": self.encoder_hidden_size or sizes.token_dim,
            "init_weights": "zero" if self.init == "zero" else None,
        }
