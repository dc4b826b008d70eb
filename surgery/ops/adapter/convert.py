"""`adapter.convert`."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import ClassVar, Literal

from surgery.errors import OpError, Problem
from surgery.formats.adapterhub import RESERVED, hub_config_of, peft_config_of, to_hub, to_peft
from surgery.op import SOURCE, Finished, Op, Rewrite, Scene, doc


@dataclass(frozen=True, slots=True)
class ConvertAdapter(Op):
    """A LoRA or (IA)³ between the layouts of PEFT and of AdapterHub's `adapters` library.

    Reads    the source, an adapter directory of the one library
             config.json of `base`, where AdapterHub's layout needs the model: how many layers it has, its type
    Writes   to adapterhub:  adapter.safetensors (load it with use_safetensors=True), adapter_config.json
                             <module>.loras.<name>.lora_A [r, in], lora_B [out, r]; (IA)³: lora_B [out, 1]
             to peft:        adapter_model.safetensors, adapter_config.json
    Error    none: every tensor is copied byte for byte. In GPT-2's c_attn, query, key and value at once,
             zeros, ones or a second and third lora_A are added; an AdapterHub LoRA on n of the three comes to PEFT
             with rank n * r and alpha n * alpha, the same scale
    Mind     AdapterHub adapts the same matrices in every layer but those left out: q, k, v, and of the MLP the
             `intermediate` (Llama, Mistral: down_proj) and the `output` (up_proj). Its (IA)³ scales what a Linear
             gives; PEFT's on what down_proj reads becomes the same scale on what up_proj gives, and comes back so
    Raises   OpError for what only one of them can say: DoRA, rsLoRA, rank_pattern, alpha_pattern, trained heads and
             other modules_to_save, gating, VeRA, bottleneck adapters, modules that AdapterHub does not adapt (o_proj,
             gate_proj, embeddings) or not in all layers; for prefix and prompt tuning, with which the two libraries
             compute different things from the same numbers: PEFT counts the virtual tokens as positions
    Source   adapters 1.3.0, peft 0.21.2
    """

    selects: ClassVar[Literal["modules", "tensors", "checkpoint"]] = "checkpoint"

    to: Literal["adapterhub", "peft"] = field(metadata=doc("The library whose layout is written."))
    base: str = field(
        default="", metadata=doc("To AdapterHub: the model of `models` that the adapter is for.", examples=("base",))
    )
    adapter_name: str = field(
        default="adapter",
        metadata=doc(
            "To AdapterHub: the adapter's name, which is in every tensor's name.",
            key="name",
            schema={"type": "string", "pattern": "^[A-Za-z][A-Za-z0-9_-]*$"},
        ),
    )

    @property
    def stem(self) -> str:  # pyright: ignore[reportIncompatibleVariableOverride]
        """Of the weight file."""
        return "adapter" if self.to == "adapterhub" else "adapter_model"

    def check(self, patterns: tuple[re.Pattern[str], ...]) -> str:
        """`base` and `name` are AdapterHub's alone."""
        if self.to == "adapterhub":
            if self.adapter_name in RESERVED:
                return f"an adapter cannot be called `{self.adapter_name}`: that is a method of torch's modules"
            return "" if self.base else "`to: adapterhub` needs `base`, the model of `models` that the adapter is for"
        return "`to: peft` reads no `base`" if self.base else ""

    def model_names(self) -> Iterable[str]:
        """The base."""
        return (self.base,) if self.base else ()

    def rewrite_all(self, scene: Scene) -> Rewrite:
        """Every tensor under its name in the other library."""
        if not scene.models[SOURCE].checkpoint.is_adapter:
            fix = "name a directory with adapter_config.json and the weights beside it as `source`"
            raise OpError(Problem("the source is no adapter", fix=fix))
        if self.to == "peft":
            return Rewrite(tuple(scene.names), to_peft(scene.names, scene.config, scene.graph))
        base = scene.models[self.base].config
        return Rewrite(tuple(scene.names), to_hub(scene.names, scene.config, base, self.adapter_name, scene.graph))

    def config(self, config: Mapping[str, object], finished: Finished) -> Mapping[str, object]:
        """adapter_config.json of the other library."""
        types = {name: node.type for name, node in finished.nodes.items()}
        if self.to == "peft":
            return peft_config_of(types, config)
        return hub_config_of(types, config, finished.models[self.base].config, self.adapter_name)
