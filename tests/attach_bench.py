"""What the tests of `attach.*` share: a spec that attaches, and the adapter as the real PEFT loads it."""

import copy
import json
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import models
import peft.peft_model
import pytest
import torch
import transformers
from peft import PeftConfig, PeftModel, get_peft_model, get_peft_model_state_dict
from torch import Tensor, nn
from transformers import AutoConfig, PreTrainedModel, ViTConfig, ViTForImageClassification

import surgery

DEPRECATED = r".*is_gradient_checkpointing.*"  # transformers' own, at every PEFT model
SMALL = {"hidden_size": 32, "intermediate_size": 48}
MIXTURE = {
    "vocab_size": models.VOCABULARY, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 64,
    "num_experts": 4, "num_local_experts": 4, "n_routed_experts": 4, "num_experts_per_tok": 2,
    "moe_intermediate_size": 16, "shared_expert_intermediate_size": 16, "n_group": 1, "topk_group": 1,
    "first_k_dense_replace": 0, "decoder_sparse_step": 1, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
    "q_lora_rank": 8, "kv_lora_rank": 8, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 8,
    "moe_num_experts": 4, "moe_k": 2, "moe_layer_start_index": 0, "moe_topk": 2, "n_shared_experts": 1,
}  # fmt: skip
TEXT = torch.arange(24).view(2, 12) % 150


def mixture(path: Path, model_type: str) -> Path:
    """A decoder of that type with four experts in each of two layers, in float32; each expert on its own on disk."""
    config = AutoConfig.for_model(model_type, **MIXTURE)
    torch.manual_seed(0)
    transformers.AutoModelForCausalLM.from_config(config).float().save_pretrained(path)
    return path


def vit(path: Path) -> Path:
    """ViTForImageClassification, one layer."""
    sizes = {**SMALL, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 16, "patch_size": 8}
    torch.manual_seed(0)
    ViTForImageClassification(ViTConfig(**sizes, num_labels=3)).save_pretrained(path)
    return path


def saved(path: Path, model: PreTrainedModel) -> Path:
    model.save_pretrained(path)
    return path


def spec(source: Path, *edits: dict[str, Any], **fields: Any) -> dict[str, Any]:
    named = [{"name": "new", **edit} if edit["op"].startswith("attach.") else edit for edit in edits]
    return {"version": 1, "source": str(source), "edits": named, **fields}


def attach(source: Path, out: Path, *edits: dict[str, Any], **fields: Any) -> Path:
    """Applies a spec, and gives the output's directory."""
    surgery.apply(surgery.plan(spec(source, *edits, **fields)), out)
    return out


def refusal(source: Path, *edits: dict[str, Any], **fields: Any) -> str:
    """What the error says of a spec that cannot be planned."""
    with pytest.raises(surgery.SurgeryError) as caught:
        surgery.plan(spec(source, *edits, **fields))
    return str(caught.value)


def adapter_of(out: Path, name: str = "new") -> Path:
    return out / "adapters" / name


def config_of(out: Path, name: str = "new") -> dict[str, Any]:
    return json.loads((adapter_of(out, name) / "adapter_config.json").read_text())


@contextmanager
def no_warnings(*but: str) -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for message in (DEPRECATED, *but):
            warnings.filterwarnings("ignore", message)
        yield


def base_model(source: Path, **options: Any) -> Any:
    """The class that config.json names, in float32."""
    config = json.loads((source / "config.json").read_text())
    torch.manual_seed(1)  # what a checkpoint without its head lacks
    options = {"dtype": torch.float32, **options}
    return getattr(transformers, config["architectures"][0]).from_pretrained(source, **options).eval()


def load(base: Any, adapter: Path, *warned: str) -> PeftModel:
    """`adapter` on `base`, ready to be trained; nothing is missing or unexpected, no warning but those in `warned`."""
    results: list[Any] = []
    load_state = peft.peft_model.set_peft_model_state_dict

    def recorded(*args: Any, **options: Any) -> Any:
        results.append(load_state(*args, **options))
        return results[-1]

    with pytest.MonkeyPatch.context() as patch, no_warnings(*warned):
        patch.setattr(peft.peft_model, "set_peft_model_state_dict", recorded)
        model = PeftModel.from_pretrained(base, adapter, is_trainable=True)
    (result,) = results
    assert result.unexpected_keys == []
    missing = {name for name in result.missing_keys if name in dict(model.named_parameters())}
    trainable = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert not missing & trainable
    return model.eval()


def inputs_of(model: Any) -> dict[str, Tensor]:
    config = model.config
    if config.model_type == "vit":
        pixels = torch.randn(2, 3, config.image_size, config.image_size, generator=torch.Generator().manual_seed(0))
        return {"pixel_values": pixels}
    decoder = {"decoder_input_ids": TEXT[:, :5]} if config.is_encoder_decoder else {}
    return {"input_ids": TEXT, **decoder}


@torch.no_grad()
def outputs(model: Any) -> Tensor:
    """Logits, or the last hidden states of a model without a head."""
    return scores(model.eval()(**inputs_of(model)))


def scores(made: Any) -> Tensor:
    """The first of an output's tensors that it has."""
    return next(made[key] for key in ("logits", "start_logits", "last_hidden_state") if key in made)


def train(model: Any, num_steps: int = 4) -> tuple[list[float], set[str]]:
    """The loss of each step, and the names of all parameters that changed."""
    before = copy.deepcopy(dict(model.named_parameters()))
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.Adam(trained, lr=1e-2)
    losses: list[float] = []
    for _ in range(num_steps):
        optimizer.zero_grad()
        made = scores(model(**inputs_of(model))).flatten(0, -2)
        loss = nn.functional.cross_entropy(made, torch.ones(len(made), dtype=torch.long))
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        losses.append(loss.item())
    return losses, {name for name, x in model.named_parameters() if not torch.equal(x, before[name])}


def drawn_by_peft(source: Path, config: PeftConfig, seed: int = 0) -> dict[str, Tensor]:
    """The adapter that PEFT makes anew after `torch.manual_seed`, as it saves it."""
    base = base_model(source, dtype="auto")
    torch.manual_seed(seed)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = get_peft_model(base, config)
        return get_peft_model_state_dict(model, save_embedding_layers=False)


def assert_same(ours: dict[str, Tensor], theirs: dict[str, Tensor], close: Sequence[str] = ()) -> None:
    """Bit for bit, but for the names that end with one of `close`."""
    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():
        if name.endswith(tuple(close)) and close:
            torch.testing.assert_close(ours[name], tensor, rtol=1e-6, atol=1e-6)
        else:
            assert models.same_bytes(ours[name], tensor.detach()), name


def noisy(adapter: Path) -> None:
    """Every tensor of the adapter gets values that are not those of a beginning."""
    from safetensors.torch import save_file

    generator = torch.Generator().manual_seed(5)
    tensors = models.read(adapter)
    changed = {
        name: (x.float() + 0.1 * torch.randn(x.shape, generator=generator)).to(x.dtype) for name, x in tensors.items()
    }
    save_file(changed, adapter / "adapter_model.safetensors")
