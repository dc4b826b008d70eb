"""What tokens a text is, and what an embedding makes of a token's row."""

from __future__ import annotations

from dataclasses import dataclass

from surgery.checkpoint.home import Home
from surgery.errors import OpError, Problem
from surgery.formats.peft.prompts import WIDTHS, count, text_config
from surgery.op import Scene

__all__ = ["Scale", "embedding_scale", "tokens_of"]

TOKENIZER = "tokenizer.json"
EXTRA = "pip install 'model-surgery[text]'"

# Models whose embedding module scales its rows (transformers 5.23, `*ScaledWordEmbedding`); those of the second list
# only if the config says `scale_embedding`.
ALWAYS_SCALED = ("gemma", "gemma2", "gemma3", "gemma3_text", "gemma3n", "gemma3n_text", "vaultgemma")
SCALED_IF_SAID = (
    "bart", "mbart", "plbart", "m2m_100", "nllb-moe", "bigbird_pegasus", "pegasus_x", "blenderbot", "biogpt", "xglm",
)  # fmt: skip
SCALED_UNLESS_DENIED = ("m2m_100", "nllb-moe", "biogpt", "xglm")  # whose config says it by default


@dataclass(frozen=True, slots=True)
class Scale:
    """What a row is multiplied by, and whether that is rounded to the row's dtype first."""

    factor: float = 1.0
    is_rounded: bool = False


def embedding_scale(scene: Scene) -> Scale:
    """The scale of the input embedding."""
    config = text_config(scene)
    model_type, width = config.get("model_type"), count(config, WIDTHS)
    is_said = bool(config.get("scale_embedding", model_type in SCALED_UNLESS_DENIED))
    if width is None:
        return Scale()
    if model_type in ALWAYS_SCALED:
        return Scale(width**0.5, is_rounded=True)
    return Scale(width**0.5) if model_type in SCALED_IF_SAID and is_said else Scale()


def tokens_of(text: str, home: Home) -> tuple[int, ...]:
    """The ids of `text`, special tokens included, by the tokenizer beside a checkpoint. Raises OpError."""
    if not home.has(TOKENIZER):
        what = f"`init_text` needs a {TOKENIZER} beside the weights, and there is none"
        raise OpError(Problem(what, fix="give the ids by `init_tokens`, or put the tokenizer there"))
    try:
        from tokenizers import Tokenizer
    except ImportError:
        what = "`init_text` needs the package `tokenizers`, which is not installed"
        raise OpError(Problem(what, fix=f"{EXTRA}, or give the ids by `init_tokens`")) from None
    content = home.read(TOKENIZER)
    try:
        tokenizer = Tokenizer.from_buffer(content)
        tokenizer.no_truncation()
        tokenizer.no_padding()
        ids = tuple(tokenizer.encode(text).ids)
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:  # a panic of the library's Rust is no Exception
        raise OpError(Problem(f"{TOKENIZER} cannot be used: {error}", fix="give the ids by `init_tokens`")) from None
    if not ids:
        raise OpError(Problem(f"`init_text`: {text!r:.60} has no tokens", fix="give another text"))
    return ids
