"""Adapters for live models, written by hand, and tiny models with random weights to put them on."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import save_file
from torch import Tensor, nn

from surgery.formats.bottleneck.layout import ModulesConfig, modules_config

IDS = torch.tensor([[3, 4, 5, 6, 7, 8], [9, 8, 7, 6, 5, 4]])
SMALL = {"hidden_size": 32, "intermediate_size": 48, "vocab_size": 64, "pad_token_id": 0, "num_hidden_layers": 2}
ENCODER = {**SMALL, "num_attention_heads": 4}
GROUPED = {**ENCODER, "num_key_value_heads": 2}
T5 = {"vocab_size": 64, "d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4}
DISTILBERT = {"vocab_size": 64, "dim": 32, "hidden_dim": 48, "n_layers": 2, "n_heads": 4}
MODELS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "llama": ("llama", "LlamaForCausalLM", GROUPED),
    "mistral": ("mistral", "MistralForCausalLM", GROUPED),
    "qwen2": ("qwen2", "Qwen2ForCausalLM", GROUPED),
    "qwen3": ("qwen3", "Qwen3ForCausalLM", {**GROUPED, "head_dim": 8}),
    "gpt2": ("gpt2", "GPT2LMHeadModel", {"vocab_size": 64, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 32}),
    "bert": ("bert", "BertForMaskedLM", ENCODER),
    "roberta": ("roberta", "RobertaForMaskedLM", ENCODER),
    "xlm-roberta": ("xlm-roberta", "XLMRobertaForMaskedLM", ENCODER),
    "electra": ("electra", "ElectraForMaskedLM", ENCODER),
    "deberta-v2": ("deberta-v2", "DebertaV2ForMaskedLM", ENCODER),
    "distilbert": ("distilbert", "DistilBertForMaskedLM", DISTILBERT),
    "t5": ("t5", "T5ForConditionalGeneration", {**T5, "num_decoder_layers": 1}),
    "mt5": ("mt5", "MT5ForConditionalGeneration", T5),
}
GATE, DOWN = "model.layers.0.mlp.gate_proj", "model.layers.1.mlp.down_proj"


def random_model(name: str) -> nn.Module:
    model_type, class_name, sizes = MODELS[name]
    torch.manual_seed(0)
    model = getattr(transformers, class_name)(transformers.AutoConfig.for_model(model_type, **sizes))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn_like(parameter) * 0.3 + float(parameter.dim() == 1))
    return model.eval()


@torch.no_grad()
def logits(model: nn.Module) -> Tensor:
    inputs = {"input_ids": IDS, "attention_mask": torch.ones_like(IDS)}
    if model.config.is_encoder_decoder:
        inputs["decoder_input_ids"] = IDS[:, :4]
    return model(**inputs).logits


def of_hub(
    directory: Path, *, model_type: str = "llama", prefix: str = "model.", seed: int = 0, **options: Any
) -> Path:
    """A `seq_bn` in AdapterHub's layout, written by hand, for two layers of 32 features."""
    generator = torch.Generator().manual_seed(seed)
    config = {"mh_adapter": False, "output_adapter": True, "reduction_factor": 4, "non_linearity": "relu"}
    slots = [f"{prefix}layers.{layer}.output_adapters.adapters.hand" for layer in range(2)]
    shapes = {"adapter_down.0.weight": (8, 32), "adapter_down.0.bias": (8,)}
    shapes |= {"adapter_up.weight": (32, 8), "adapter_up.bias": (32,)}
    tensors = {
        f"{slot}.{part}": 0.1 * torch.randn(shape, generator=generator)
        for slot in slots
        for part, shape in shapes.items()
    }
    write(
        directory, {"config": {**config, **options}, "model_type": model_type, "name": "hand", "version": "x"}, tensors
    )
    (directory / "adapter_model.safetensors").rename(directory / "adapter.safetensors")
    return directory


def of_modules(directory: Path, sizes: Mapping[str, tuple[int, int]], *, seed: int = 0, **options: Any) -> Path:
    """An adapter in surgery's own layout: `sizes` are features in and out, by module."""
    generator = torch.Generator().manual_seed(seed)
    settings = {"placement": "parallel", "width": 4, "activation": "tanh", "scaling": 1.5, "bias": False, **options}
    config = ModulesConfig(modules=tuple(sizes), **settings)
    tensors: dict[str, Tensor] = {}
    for path, (inputs, outputs) in sizes.items():
        tensors[f"{path}.adapter_down.weight"] = torch.randn(config.width, inputs, generator=generator)
        tensors[f"{path}.adapter_up.weight"] = torch.randn(outputs, config.width, generator=generator)
        if config.bias:
            tensors[f"{path}.adapter_down.bias"] = torch.randn(config.width, generator=generator)
            tensors[f"{path}.adapter_up.bias"] = torch.randn(outputs, generator=generator)
    write(directory, modules_config(config, "own", {}), tensors)
    return directory


def write(directory: Path, config: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
    directory.mkdir(parents=True)
    save_file(dict(tensors), directory / "adapter_model.safetensors")
    (directory / "adapter_config.json").write_text(json.dumps(config))


def trace(model: nn.Module) -> tuple[Any, ...]:
    hooks = [
        (name, len(module._forward_hooks), len(module._forward_pre_hooks)) for name, module in model.named_modules()
    ]
    return list(model.state_dict()), hooks, [(name, p.requires_grad) for name, p in model.named_parameters()]
