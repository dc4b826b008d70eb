"""What PEFT's prompt methods have in common: one tensor of virtual tokens, and a config with the model's sizes.

Source: PEFT 0.21.2, `peft_model.py`, `utils/other.py`, `tuners/tuners_utils.py`.
"""

from __future__ import annotations

import re
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import ClassVar, cast

from surgery.checkpoint.layers import stacks_of
from surgery.errors import OpError, Problem
from surgery.formats.lora import PREFIX
from surgery.formats.peft.attaching import Task, task_type
from surgery.formats.peft.saved import saved_modules
from surgery.graph import Node
from surgery.op import SOURCE, Attach, Attached, Rewrite, Scene, Selects, doc

__all__ = [
    "HEAD_COUNTS",
    "LAYER_COUNTS",
    "WIDTHS",
    "Embedding",
    "PromptAttach",
    "Sizes",
    "count",
    "input_embedding",
    "num_layers",
    "num_submodules",
    "prompt_sizes",
    "text_config",
    "token_width",
]

PROMPT = "prompt_embeddings"
PROMPT_PREFIX = "base_model."  # of a head that is trained too: a prompt wraps the model once, a LoRA twice
COUNT_SCHEMA = {"type": "integer", "minimum": 1}

# What configs call these, in the order in which PEFT looks for them; the last ones PEFT does not know.
WIDTHS = ("hidden_size", "n_embd", "n_embed", "d_model", "dim")
LAYER_COUNTS = ("num_hidden_layers", "num_layers", "n_layer", "encoder_layers", "n_layers")
HEAD_COUNTS = ("num_attention_heads", "n_head", "num_heads", "encoder_attention_heads", "n_heads", "attention_heads")

# Models that scale what they embed themselves, outside of the embedding (transformers 5.23): PEFT embeds for them.
SCALED_OUTSIDE = ("pegasus", "marian", "blenderbot-small", "mvp")

_INPUT_EMBEDDINGS = re.compile(r"(.*\.)?(embed_tokens|tok_embeddings|tokens_embed|wte|word_embeddings|embed_in|shared)")


@dataclass(frozen=True, slots=True)
class Sizes:
    """What a prompt's config says of the model; for a prefix, of its keys and values."""

    token_dim: int
    num_layers: int
    num_attention_heads: int


@dataclass(frozen=True, slots=True)
class Embedding:
    """The input embedding: its path on disk, and its weight, float [tokens, width]."""

    path: str
    weight: Node

    @property
    def shape(self) -> tuple[int, int]:
        """Tokens and width."""
        num_tokens, width = self.weight.type.shape
        return num_tokens, width


@dataclass(frozen=True, slots=True, kw_only=True)
class PromptAttach(Attach):
    """Base of the prompt methods: they select nothing, and write `prompt_embeddings`."""

    selects: ClassVar[Selects] = "checkpoint"
    peft_type: ClassVar[str] = ""

    num_virtual_tokens: int = field(metadata=doc("How many virtual tokens there are.", schema=COUNT_SCHEMA))
    task: Task | None = field(
        default=None, metadata=doc("PEFT's task_type. Default: by the class that config.json names.", key="task_type")
    )

    @abstractmethod
    def sizes(self, scene: Scene) -> Sizes:
        """What the config says of the model. Raises OpError."""

    @abstractmethod
    def prompt(self, scene: Scene, sizes: Sizes, task: str) -> Node:
        """The tensor that is written. Raises OpError."""

    @abstractmethod
    def own_config(self, sizes: Sizes, attached: Attached) -> Mapping[str, object]:
        """What the method's own config says besides."""

    def rewrite_all(self, scene: Scene) -> Rewrite:
        """The prompt, and the head that is trained with it."""
        if scene.models[SOURCE].checkpoint.is_adapter:
            raise OpError(Problem("the source is an adapter, to which nothing can be attached"))
        task = self._task(scene)
        prompt = self.prompt(scene, self.sizes(scene), task)
        heads = saved_modules((), scene, task).tensors.items()
        named = {PROMPT_PREFIX + name.removeprefix(PREFIX): node for name, node in heads}
        return Rewrite((), {}, adds={PROMPT: prompt, **named})

    def adapter_config(self, attached: Attached) -> Mapping[str, object]:
        """As PEFT's `save_pretrained` writes it."""
        task = self._task(attached.scene)
        sizes = self.sizes(attached.scene)
        heads = saved_modules((), attached.scene, task).names
        return {
            "peft_type": self.peft_type,
            "task_type": task,
            "base_model_name_or_path": attached.base_name,
            "revision": attached.revision,
            "inference_mode": True,
            "num_virtual_tokens": self.num_virtual_tokens,
            "num_transformer_submodules": num_submodules(task),
            "token_dim": sizes.token_dim,
            "num_layers": sizes.num_layers,
            "num_attention_heads": sizes.num_attention_heads,
            "modules_to_save": list(heads) or None,
            **self.own_config(sizes, attached),
        }

    def _task(self, scene: Scene) -> str:
        """PEFT does nothing with a prompt, and says nothing, where it does not know the task."""
        task = self.task or task_type(scene.config)
        if task is None:
            names = scene.config.get("architectures")
            said = f"names the class {names}" if names else "names no class in `architectures`"
            what = f"what the model is for cannot be known: config.json {said}"
            raise OpError(Problem(what, fix="say it by `task_type`: without it PEFT ignores a prompt"))
        return task


def num_submodules(task: str) -> int:
    """As PEFT counts them: an encoder and a decoder, or one of them."""
    return 2 if task == "SEQ_2_SEQ_LM" else 1


def text_config(scene: Scene) -> Mapping[str, object]:
    """The part of config.json that is about the language model."""
    nested = scene.config.get("text_config")
    return cast("Mapping[str, object]", nested) if isinstance(nested, Mapping) else scene.config


def count(config: Mapping[str, object], keys: Sequence[str]) -> int | None:
    """The first of these entries that is a positive number."""
    values = (config.get(key) for key in keys)
    return next((value for value in values if isinstance(value, int) and value is not True and value > 0), None)


def prompt_sizes(scene: Scene) -> Sizes:
    """Width of a token, layers and heads. Raises OpError for what neither config.json nor a tensor says, and for a
    model that PEFT would feed embeddings of another scale.

    The width is that of the input embedding, which is the model's but in a few models (ALBERT, ELECTRA, OPT-350m).
    """
    _check_scale(text_config(scene))
    width = token_width(scene) or count(text_config(scene), WIDTHS)
    if width is None:
        what = f"the width of a token is not known: config.json has none of {', '.join(WIDTHS)}, and none of the "
        raise OpError(Problem(f"{what}{len(scene.modules)} modules is an input embedding", fix="complete config.json"))
    heads = count(text_config(scene), HEAD_COUNTS)
    if heads is None:
        what = f"config.json says by none of {', '.join(HEAD_COUNTS)} how many heads there are, as PEFT asks"
        raise OpError(Problem(what, fix="complete config.json"))
    return Sizes(width, num_layers(scene, LAYER_COUNTS), heads)


def _check_scale(config: Mapping[str, object]) -> None:
    model_type = config.get("model_type")
    if model_type in SCALED_OUTSIDE and config.get("scale_embedding"):
        what = f"a {model_type} scales embeddings outside of the module that PEFT takes them from: every input behind "
        what += "a prompt would be too small"
        raise OpError(Problem(what, fix="use `attach.prefix_tuning` or `attach.lora`"))


def num_layers(scene: Scene, keys: Sequence[str]) -> int:
    """How many layers there are after the edits before. Raises OpError if neither config.json nor a tensor says it."""
    said = count(text_config(scene), keys)
    before, now = stacks_of(scene.models[SOURCE].nodes), stacks_of(scene.names)
    stacks = [stack for stack in now.values() if stack.is_of_layers]
    if said is None and len(stacks) == 1:
        return len(stacks[0].layers)
    if said is None:
        what = f"config.json says by none of {', '.join(keys)} how many layers there are, nor do the tensors' names"
        raise OpError(Problem(what, fix="complete config.json"))
    changed = [
        len(stack.layers)
        for stack in stacks
        if stack.path in before and len(before[stack.path].layers) == said != len(stack.layers)
    ]
    return changed[0] if changed else said


def token_width(scene: Scene) -> int | None:
    """The width of the input embedding, if there is one."""
    embedding = _embedding(scene)
    return embedding.shape[1] if embedding else None


def _embedding(scene: Scene) -> Embedding | None:
    found = [path for path in scene.modules if _INPUT_EMBEDDINGS.fullmatch(path) and f"{path}.weight" in scene.names]
    found = [path for path in found if not scene.modules[path].is_quantized]
    paths = [path for path in found if len(scene.names[f"{path}.weight"].type.shape) == 2]
    path = min(paths, key=lambda path: path.count("."), default="")
    return Embedding(path, scene.names[f"{path}.weight"]) if path else None


def input_embedding(scene: Scene) -> Embedding:
    """The input embedding. Raises OpError if there is none whose rows can be taken."""
    embedding = _embedding(scene)
    if embedding is None:
        what = f"none of the {len(scene.modules)} modules is an input embedding whose rows could be taken"
        raise OpError(
            Problem(what, fix="`surgery inspect` lists the modules; attach before the embedding is quantized")
        )
    return embedding
