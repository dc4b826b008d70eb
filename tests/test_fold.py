"""`adapter.fold` against PEFT's own `merge_and_unload`, which is the reference bit for bit."""

import json
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from peft import (
    AdaLoraConfig,
    IA3Config,
    LNTuningConfig,
    LoHaConfig,
    LoKrConfig,
    LoraConfig,
    MissConfig,
    OFTConfig,
    PeftConfig,
    PromptTuningConfig,
    TrainableTokensConfig,
    VeraConfig,
)
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoModelForSeq2SeqLM,
    GptOssConfig,
    GptOssForCausalLM,
    ViTConfig,
    ViTModel,
)

import surgery
from surgery.formats.peft.additive import AddDelta, AddVector
from surgery.formats.peft.delta import AdaLora, Delta, Hadamard, Kronecker, LowRank, Shards, Vera
from surgery.formats.peft.dora import Decomposed
from surgery.formats.peft.experts import FusedLowRank
from surgery.formats.peft.fold import FoldKernel
from surgery.formats.peft.scaling import Rescale, Rotate, SetRows
from tests import models

pytestmark = [
    pytest.mark.filterwarnings("ignore::UserWarning"),
    pytest.mark.filterwarnings("ignore::RuntimeWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
]

LOADERS: dict[str, Any] = {
    "llama": AutoModelForCausalLM,
    "qwen2": AutoModelForCausalLM,
    "gpt2": AutoModelForCausalLM,
    "mixtral": AutoModelForCausalLM,
    "gpt_oss": AutoModelForCausalLM,
    "bert": AutoModelForMaskedLM,
    "t5": AutoModelForSeq2SeqLM,
    "vit": AutoModel,
}
TRAINED = (
    "lora_", "ia3_l", "vera_lambda", "hada_", "lokr_", "oft_", "miss_", "tokens_delta", "modules_to_save", "ln_tuning",
)  # fmt: skip
WIDE = {"hidden_size": 512, "intermediate_size": 1500, "num_hidden_layers": 1, "vocab_size": 1501}
CAUSAL = {"task_type": "CAUSAL_LM"}


def gpt_oss(path: Path, *, dtype: torch.dtype, intermediate_size: int = 96) -> Path:
    """Fused experts stored [E, in, out]."""
    config = GptOssConfig(
        vocab_size=160, hidden_size=64, intermediate_size=intermediate_size, num_hidden_layers=1,
        num_attention_heads=4, num_key_value_heads=2, head_dim=16, num_local_experts=4, max_position_embeddings=64,
    )  # fmt: skip
    model = GptOssForCausalLM(config)
    _spread(model)
    model.to(dtype).save_pretrained(path)
    return path


def vit(path: Path, *, dtype: torch.dtype) -> Path:
    """Patches are embedded by a convolution."""
    config = ViTConfig(
        hidden_size=64, num_hidden_layers=1, num_attention_heads=4, intermediate_size=128, image_size=32, patch_size=8
    )
    model = ViTModel(config)
    _spread(model)
    model.to(dtype).save_pretrained(path)
    return path


def _spread(model: nn.Module) -> None:
    with torch.no_grad():
        for seed, parameter in enumerate(model.parameters()):
            parameter.copy_(models.random_weight(*parameter.shape, seed=seed))


class Bench:
    """Bases and adapters of one test session, made once."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def path(self, *parts: object) -> Path:
        return self.root / "-".join(str(part).replace("torch.", "") for part in parts)

    def base(self, kind: str, dtype: torch.dtype = torch.bfloat16, **overrides: Any) -> Path:
        path = self.path(kind, dtype, *overrides.items())
        if not path.exists():
            make: Callable[..., Path] = {"gpt_oss": gpt_oss, "vit": vit}.get(kind) or getattr(models, kind)
            make(path, dtype=dtype, **overrides)
        return path

    def model(self, kind: str, base: Path, dtype: torch.dtype) -> Any:
        return LOADERS[kind].from_pretrained(base, dtype=dtype)

    def adapter(self, kind: str, base: Path, config: PeftConfig, dtype: torch.dtype = torch.bfloat16) -> Path:
        """An adapter whose every weight is random, saved by PEFT."""
        path = self.fresh("adapter")
        torch.manual_seed(0)
        model = peft.get_peft_model(self.model(kind, base, dtype), config)
        generator = torch.Generator().manual_seed(1)
        has_biases = getattr(config, "bias", "none") != "none"
        with torch.no_grad():
            for name, weight in model.named_parameters():
                noise = 0.1 * torch.randn(weight.shape, generator=generator)
                if "magnitude" in name or "ia3_l" in name:
                    weight.mul_(1 + noise)
                elif any(part in name for part in TRAINED) or (has_biases and name.endswith(".bias")):
                    weight.add_(noise)
        model.save_pretrained(path)
        return path

    def fresh(self, name: str) -> Path:
        path = self.path(name, len(list(self.root.iterdir())))
        path.mkdir()
        return path

    def merged(
        self, kind: str, base: Path, adapters: Sequence[Path], dtype: torch.dtype, scale: float | None = None
    ) -> dict[str, Tensor]:
        """What PEFT makes of it."""
        model = self.model(kind, base, dtype)
        for adapter in adapters:
            wrapped = peft.PeftModel.from_pretrained(model, adapter)
            for module in wrapped.modules() if scale is not None else ():
                if hasattr(module, "set_scale"):
                    module.set_scale("default", scale)  # pyright: ignore
            model = wrapped.merge_and_unload()
        out = self.fresh("merged")
        model.save_pretrained(out)
        return models.read(out)

    def folded(self, base: Path, *adapters: Path, **options: Any) -> tuple[dict[str, Tensor], Path]:
        """What surgery makes of it, and where."""
        out = self.fresh("folded")
        shutil.rmtree(out)
        surgery.apply(surgery.plan(spec(base, *adapters, **options)), out)
        return models.read(out), out


def spec(base: Path, *adapters: Path, **options: Any) -> dict[str, Any]:
    named = {f"a{index}": str(adapter) for index, adapter in enumerate(adapters)}
    edit = {"op": "adapter.fold", "models": list(named), **options}
    return {"version": 1, "source": str(base), "models": named, "edits": [edit]}


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Bench:
    return Bench(tmp_path_factory.mktemp("fold"))


def differing(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> list[str]:
    assert set(ours) == set(theirs)
    return [name for name in ours if not models.same_bytes(ours[name], theirs[name])]


CASES: dict[str, tuple[str, Callable[[], PeftConfig], dict[str, Any]]] = {
    "lora": ("llama", lambda: LoraConfig(r=4, lora_alpha=7, target_modules="all-linear", **CAUSAL), {}),
    "patterns and rslora": (
        "llama",
        lambda: LoraConfig(
            r=4, lora_alpha=7, target_modules=["q_proj", "k_proj", "down_proj"], use_rslora=True,
            rank_pattern={"k_proj": 6, r"layers.1.mlp.down_proj": 3}, alpha_pattern={"q_proj": 5}, **CAUSAL,
        ),
        {},
    ),
    "conv1d": (
        "gpt2",
        lambda: LoraConfig(r=4, target_modules=["c_attn", "c_proj"], fan_in_fan_out=True, lora_bias=True, **CAUSAL),
        {},
    ),
    "embedding and head": ("llama", lambda: LoraConfig(r=4, target_modules=["embed_tokens", "lm_head"], **CAUSAL), {}),
    "dora": ("llama", lambda: LoraConfig(r=4, target_modules=["q_proj", "down_proj"], use_dora=True, **CAUSAL), {}),
    "all biases": ("qwen2", lambda: LoraConfig(r=4, target_modules=["q_proj"], bias="all", **CAUSAL), {}),
    "lora's biases": ("qwen2", lambda: LoraConfig(r=4, target_modules=["q_proj"], bias="lora_only", **CAUSAL), {}),
    "tokens and a whole head": (
        "llama",
        lambda: LoraConfig(
            r=4, target_modules=["q_proj"], trainable_token_indices=[1, 7], modules_to_save=["lm_head"], **CAUSAL
        ),
        {},
    ),
    "tokens of a tied model": ("qwen2", lambda: TrainableTokensConfig(token_indices=[1, 2], **CAUSAL), {}),
    "norms": ("llama", lambda: LNTuningConfig(**CAUSAL), {}),
    "ia3": ("qwen2", lambda: IA3Config(**CAUSAL), {}),
    "ia3 on conv1d": ("gpt2", lambda: IA3Config(fan_in_fan_out=True, **CAUSAL), {}),
    "vera": ("llama", lambda: VeraConfig(r=8, target_modules=["q_proj", "k_proj", "down_proj"], **CAUSAL), {}),
    "loha": ("llama", lambda: LoHaConfig(r=4, alpha=3, target_modules=["q_proj", "down_proj"], **CAUSAL), {}),
    "lokr": ("llama", lambda: LoKrConfig(r=4, alpha=3, target_modules=["q_proj", "down_proj"], **CAUSAL), {}),
    "lokr of four": (
        "llama",
        lambda: LoKrConfig(r=2, alpha=3, decompose_both=True, decompose_factor=8, target_modules=["q_proj"], **CAUSAL),
        {},
    ),
    "oft": ("llama", lambda: OFTConfig(oft_block_size=16, target_modules=["q_proj", "down_proj"], **CAUSAL), {}),
    "oft by cayley": (
        "llama",
        lambda: OFTConfig(r=2, oft_block_size=0, use_cayley_neumann=False, target_modules=["q_proj"], **CAUSAL),
        {},
    ),
    "oft with a shared block": (
        "llama",
        lambda: OFTConfig(
            oft_block_size=32, block_share=True, num_cayley_neumann_terms=7,
            target_modules=["q_proj", "embed_tokens"], **CAUSAL,
        ),
        {},
    ),
    "adalora": (
        "llama",
        lambda: AdaLoraConfig(init_r=6, target_r=4, lora_alpha=5, total_step=10, target_modules=["q_proj"], **CAUSAL),
        {},
    ),
    "miss": ("llama", lambda: MissConfig(r=6, target_modules=["q_proj", "down_proj"], **CAUSAL), {}),
    "mini miss": ("llama", lambda: MissConfig(r=8, mini_r=4, init_weights="mini", target_modules=["q_proj"]), {}),
    "bert": ("bert", lambda: LoraConfig(r=4, target_modules=["query", "dense"]), {}),
    "t5": ("t5", lambda: LoraConfig(r=4, target_modules=["q", "wo"], task_type="SEQ_2_SEQ_LM"), {}),
    "experts, each on disk": (
        "mixtral",
        lambda: LoraConfig(
            r=4, target_modules=["q_proj"], target_parameters=["experts.gate_up_proj", "experts.down_proj"], **CAUSAL
        ),
        {},
    ),
    "experts, fused on disk": (
        "gpt_oss",
        lambda: LoraConfig(
            r=4, target_modules=[], target_parameters=["experts.gate_up_proj", "experts.down_proj"], **CAUSAL
        ),
        {},
    ),
    "a parameter": ("llama", lambda: LoraConfig(r=4, target_modules=[], target_parameters=["q_proj.weight"]), {}),
    "a convolution": ("vit", lambda: LoraConfig(r=4, target_modules=["projection", "query"]), {}),
    "ia3 on a convolution": (
        "vit",
        lambda: IA3Config(target_modules=["projection"], feedforward_modules=["projection"]),
        {},
    ),
    "both sides of a tied pair": (
        "qwen2",
        lambda: LoraConfig(r=4, target_modules=["embed_tokens"], **CAUSAL),
        {"tied": "both"},
    ),
    "a tied head": ("qwen2", lambda: LoraConfig(r=4, target_modules=["lm_head"], **CAUSAL), {"tied": "both"}),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_a_fold_has_the_bits_of_pefts_merge(bench: Bench, case: str) -> None:
    kind, make_config, options = CASES[case]
    base = bench.base(kind)
    adapter = bench.adapter(kind, base, make_config())
    ours, _ = bench.folded(base, adapter, **options)
    assert differing(ours, bench.merged(kind, base, [adapter], torch.bfloat16)) == []
    assert differing(ours, models.read(base)) != []


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_a_fold_into_other_dtypes_has_pefts_bits(bench: Bench, dtype: torch.dtype) -> None:
    base = bench.base("llama", dtype)
    config = LoraConfig(r=4, target_modules=["q_proj", "embed_tokens", "down_proj"], use_rslora=True, **CAUSAL)
    adapter = bench.adapter("llama", base, config, dtype)
    assert differing(bench.folded(base, adapter)[0], bench.merged("llama", base, [adapter], dtype)) == []


WIDE_TARGETS = {"target_modules": ["down_proj", "up_proj"], **CAUSAL}
WIDE_CASES: dict[str, Callable[[], PeftConfig]] = {
    "lora": lambda: LoraConfig(r=5, target_modules=["down_proj", "up_proj", "embed_tokens"], **CAUSAL),
    "dora": lambda: LoraConfig(r=16, use_dora=True, **WIDE_TARGETS),
    "loha": lambda: LoHaConfig(r=16, **WIDE_TARGETS),
    "lokr": lambda: LoKrConfig(r=16, **WIDE_TARGETS),
    "vera": lambda: VeraConfig(r=64, **WIDE_TARGETS),
    "adalora": lambda: AdaLoraConfig(total_step=10, **WIDE_TARGETS),
}


@pytest.mark.parametrize("case", WIDE_CASES)
def test_weights_of_many_bands_have_pefts_bits_in_f32(bench: Bench, case: str) -> None:
    base = bench.base("llama", torch.float32, **WIDE)
    adapter = bench.adapter("llama", base, WIDE_CASES[case](), torch.float32)
    assert differing(bench.folded(base, adapter)[0], bench.merged("llama", base, [adapter], torch.float32)) == []


@pytest.mark.parametrize(
    ("kind", "make_config"),
    [
        ("gpt2", lambda: LoraConfig(r=4, use_dora=True, target_modules=["c_attn"], fan_in_fan_out=True, **CAUSAL)),
        ("llama", lambda: LoraConfig(r=4, use_dora=True, target_modules=["embed_tokens"], **CAUSAL)),
        ("llama", lambda: OFTConfig(oft_block_size=64, target_modules=["q_proj", "down_proj"], **CAUSAL)),
    ],
)
def test_what_sums_in_another_order_is_equal_up_to_f32(
    bench: Bench, kind: str, make_config: Callable[[], PeftConfig]
) -> None:
    base = bench.base(kind, torch.float32)
    adapter = bench.adapter(kind, base, make_config(), torch.float32)
    ours, theirs = bench.folded(base, adapter)[0], bench.merged(kind, base, [adapter], torch.float32)
    for name in ours:
        torch.testing.assert_close(ours[name], theirs[name], rtol=2e-6, atol=1e-6 * float(theirs[name].abs().max()))


def test_several_adapters_are_folded_in_order(bench: Bench) -> None:
    base = bench.base("llama")
    adapters = [
        bench.adapter("llama", base, LoraConfig(r=4, target_modules=["q_proj"], **CAUSAL)),
        bench.adapter("llama", base, IA3Config(target_modules=["q_proj"], feedforward_modules=[], **CAUSAL)),
    ]
    ours, _ = bench.folded(base, *adapters)
    assert differing(ours, bench.merged("llama", base, adapters, torch.bfloat16)) == []
    assert differing(ours, bench.folded(base, *adapters[::-1])[0]) != []


@pytest.mark.parametrize(
    "make_config",
    [
        lambda: LoraConfig(r=3, lora_alpha=5, use_rslora=True, target_modules=["q_proj"], **CAUSAL),
        lambda: LoHaConfig(r=3, alpha=5, target_modules=["q_proj"], **CAUSAL),
        lambda: LoKrConfig(r=3, alpha=5, target_modules=["q_proj"], **CAUSAL),
    ],
)
def test_a_weight_is_pefts_scale(bench: Bench, make_config: Callable[[], PeftConfig]) -> None:
    base = bench.base("llama")
    adapter = bench.adapter("llama", base, make_config())
    ours, _ = bench.folded(base, adapter, models={"a0": {"weight": 0.7}})
    assert differing(ours, bench.merged("llama", base, [adapter], torch.bfloat16, scale=0.7)) == []


def test_an_adapter_with_the_names_of_single_experts_is_folded(bench: Bench) -> None:
    base = bench.base("mixtral")
    generator = torch.Generator().manual_seed(3)
    tensors: dict[str, Tensor] = {}
    for name, weight in models.read(base).items():
        if ".experts." in name:
            prefix = f"base_model.model.{name.removesuffix('.weight')}"
            tensors[f"{prefix}.lora_A.weight"] = 0.1 * torch.randn(4, weight.shape[1], generator=generator)
            tensors[f"{prefix}.lora_B.weight"] = 0.1 * torch.randn(weight.shape[0], 4, generator=generator)
    config = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "target_modules": ["w1", "w2", "w3"], **CAUSAL}
    adapter = handwritten(bench, tensors, config)
    assert differing(bench.folded(base, adapter)[0], bench.merged("mixtral", base, [adapter], torch.bfloat16)) == []


def test_a_base_without_its_head_takes_an_adapter_that_was_made_with_one(bench: Bench) -> None:
    base, bare = bench.base("bert"), bench.base("bert", head=False)
    adapter = bench.adapter("bert", base, LoraConfig(r=4, target_modules=["query"]))
    ours, whole = bench.folded(bare, adapter)[0], bench.folded(base, adapter)[0]
    assert all(models.same_bytes(ours[name], whole[f"bert.{name}"]) for name in ours if f"bert.{name}" in whole)
    assert differing(ours, models.read(bare)) != []


def test_untying_changes_the_trained_side_only(bench: Bench) -> None:
    base = bench.base("qwen2")
    before = models.read(base)["model.embed_tokens.weight"]
    adapter = bench.adapter("qwen2", base, LoraConfig(r=4, target_modules=["lm_head"], **CAUSAL))
    ours, out = bench.folded(base, adapter, tied="untie")
    assert models.same_bytes(ours["model.embed_tokens.weight"], before)
    assert not torch.equal(ours["lm_head.weight"], before)
    assert json.loads((out / "config.json").read_text())["tie_word_embeddings"] is False
    loaded = AutoModelForCausalLM.from_pretrained(out, dtype=torch.bfloat16)
    assert torch.equal(loaded.lm_head.weight, ours["lm_head.weight"])


def test_what_was_trained_as_one_for_a_tied_pair_is_folded_once(bench: Bench) -> None:
    base = bench.base("qwen2")
    config = LoraConfig(r=4, target_modules=["embed_tokens"], ensure_weight_tying=True, **CAUSAL)
    adapter = bench.adapter("qwen2", base, config)
    before = models.read(base)["model.embed_tokens.weight"]
    tensors = load_file(adapter / "adapter_model.safetensors")
    a, b = (tensors[f"base_model.model.model.embed_tokens.lora_embedding_{side}"] for side in "AB")
    expected = before + ((b @ a).T * 2.0).to(before.dtype)
    ours, _ = bench.folded(base, adapter)
    assert models.same_bytes(ours["model.embed_tokens.weight"], expected)


def test_a_larger_vocabulary_is_followed_by_the_config(bench: Bench) -> None:
    base = bench.base("llama")
    model = bench.model("llama", base, torch.bfloat16)
    model.resize_token_embeddings(170)
    config = LoraConfig(r=4, target_modules=["q_proj"], modules_to_save=["embed_tokens", "lm_head"], **CAUSAL)
    adapter = bench.fresh("adapter")
    peft.get_peft_model(model, config).save_pretrained(adapter)
    _, out = bench.folded(base, adapter)
    loaded = AutoModelForCausalLM.from_pretrained(out, dtype=torch.bfloat16)
    assert loaded.config.vocab_size == 170
    assert torch.equal(loaded.lm_head.weight, model.lm_head.weight)


@pytest.mark.parametrize("double_quant", [True, False])
def test_a_4bit_base_is_quantized_again_as_peft_does(bench: Bench, double_quant: bool) -> None:
    base = bench.base("llama")
    edit = {"op": "quantize.nf4", "modules": "all-linear", "double_quant": double_quant}
    quantized = bench.path("nf4", double_quant)
    surgery.apply(surgery.plan({"version": 1, "source": str(base), "edits": [edit]}), quantized)
    adapter = bench.adapter("llama", base, LoraConfig(r=4, target_modules=["q_proj", "down_proj"], **CAUSAL))
    model = AutoModelForCausalLM.from_pretrained(quantized)
    theirs = dict(peft.PeftModel.from_pretrained(model, adapter).merge_and_unload().state_dict())
    ours, _ = bench.folded(quantized, adapter)
    assert set(ours) == set(theirs)
    for name in ours:
        if ".quant_state." in name:
            assert json.loads(bytes(ours[name].tolist())) == json.loads(bytes(theirs[name].tolist()))
        else:
            assert models.same_bytes(ours[name], theirs[name]), name
    plain, out = bench.folded(quantized, adapter, requantize=False)
    assert plain["model.layers.0.self_attn.q_proj.weight"].dtype == torch.bfloat16
    skipped = json.loads((out / "config.json").read_text())["quantization_config"]["llm_int8_skip_modules"]
    assert "model.layers.0.self_attn.q_proj" in skipped


def handwritten(bench: Bench, tensors: dict[str, Tensor], config: dict[str, Any]) -> Path:
    path = bench.fresh("adapter")
    save_file(tensors, path / "adapter_model.safetensors")
    (path / "adapter_config.json").write_text(json.dumps(config))
    return path


def lora_of(bench: Bench, path: str, out_features: int = 128, in_features: int = 128, **config: Any) -> Path:
    """A handwritten LoRA on one module."""
    tensors = {
        f"base_model.model.{path}.lora_A.weight": torch.ones(4, in_features),
        f"base_model.model.{path}.lora_B.weight": torch.ones(out_features, 4),
    }
    return handwritten(bench, tensors, {"peft_type": "LORA", "r": 4, "lora_alpha": 8, **config})


Q_PROJ = "model.layers.0.self_attn.q_proj"


def refusal(base: Path, adapter: Path, **options: Any) -> str:
    with pytest.raises(surgery.OpError) as caught:
        surgery.plan(spec(base, adapter, **options))
    return str(caught.value)


def test_a_module_that_the_base_lacks_is_named_with_the_nearest(bench: Bench) -> None:
    message = refusal(bench.base("llama"), lora_of(bench, "model.layers.7.self_attn.q_proj"))
    assert "`model.layers.7.self_attn.q_proj`" in message
    assert "nearest" in message and "`model.layers.1.self_attn.q_proj`" in message


def test_another_shape_is_named_with_both_shapes(bench: Bench) -> None:
    message = refusal(bench.base("llama"), lora_of(bench, Q_PROJ, in_features=64))
    assert f"`{Q_PROJ}`" in message and "[128, 64]" in message and "bf16[128, 128]" in message


def test_a_rank_that_the_config_contradicts_is_refused(bench: Bench) -> None:
    assert "has rank 4, and the adapter's config says 16" in refusal(bench.base("llama"), lora_of(bench, Q_PROJ, r=16))


def test_a_factor_without_its_partner_is_refused(bench: Bench) -> None:
    adapter = lora_of(bench, Q_PROJ)
    tensors = load_file(adapter / "adapter_model.safetensors")
    tensors.pop(f"base_model.model.{Q_PROJ}.lora_B.weight")
    save_file(tensors, adapter / "adapter_model.safetensors")
    assert "lacks `lora_B`" in refusal(bench.base("llama"), adapter)


@pytest.mark.parametrize(
    ("config", "what"),
    [
        ({"use_dora": True}, "has no magnitude, but `use_dora`"),
        ({"lora_bias": True}, "has no bias, but `lora_bias`"),
        ({"target_modules": ["k_proj"]}, "is not among the `target_modules`"),
        ({"target_modules": "(q|k)_proj"}, "is not among the `target_modules`"),
        ({"rank_pattern": {"(": 3}}, "is no regex"),
        ({"lora_alpha": "high"}, "is no number"),
        ({"alora_invocation_tokens": [1]}, "alora_invocation_tokens"),
    ],
)
def test_a_config_that_says_other_than_the_tensors_is_refused(bench: Bench, config: dict[str, Any], what: str) -> None:
    assert what in refusal(bench.base("llama"), lora_of(bench, Q_PROJ, **config))


def test_keys_that_peft_would_ignore_are_refused(bench: Bench) -> None:
    adapter = handwritten(bench, {f"{Q_PROJ}.lora_A.weight": torch.ones(4, 128)}, {"peft_type": "LORA", "r": 4})
    message = refusal(bench.base("llama"), adapter)
    assert f"`{Q_PROJ}.lora_A.weight`" in message and "base_model." in message


def test_a_prompt_cannot_be_folded(bench: Bench) -> None:
    adapter = bench.fresh("adapter")
    model = bench.model("llama", bench.base("llama"), torch.bfloat16)
    peft.get_peft_model(model, PromptTuningConfig(num_virtual_tokens=4, **CAUSAL)).save_pretrained(adapter)
    assert "PROMPT_TUNING" in refusal(bench.base("llama"), adapter)


@pytest.mark.parametrize("config", [{}, {"peft_type": "BOFT"}])
def test_a_type_that_is_not_known_is_refused(bench: Bench, config: dict[str, Any]) -> None:
    adapter = handwritten(bench, {"base_model.model.x.lora_A.weight": torch.ones(4, 128)}, config)
    assert "peft_type" in refusal(bench.base("llama"), adapter) or "BOFT" in refusal(bench.base("llama"), adapter)


def test_a_checkpoint_is_no_adapter(bench: Bench) -> None:
    assert "is no adapter" in refusal(bench.base("llama"), bench.base("llama"))


def test_projections_that_were_not_saved_are_refused(bench: Bench) -> None:
    base = bench.base("llama")
    adapter = bench.adapter("llama", base, VeraConfig(r=8, target_modules=["q_proj"], save_projection=False, **CAUSAL))
    assert "save_projection" in refusal(base, adapter)


def test_a_tied_pair_is_refused_until_the_spec_says_what_is_meant(bench: Bench) -> None:
    base = bench.base("qwen2")
    adapter = bench.adapter("qwen2", base, LoraConfig(r=4, target_modules=["embed_tokens"], **CAUSAL))
    message = refusal(base, adapter)
    assert "tied: both" in message and "tied: untie" in message


@pytest.mark.parametrize(
    "make_config",
    [
        lambda: IA3Config(**CAUSAL),
        lambda: LoraConfig(r=4, target_modules=["q_proj"], use_dora=True, **CAUSAL),
        lambda: OFTConfig(oft_block_size=16, target_modules=["q_proj"], **CAUSAL),
        lambda: LNTuningConfig(**CAUSAL),
        lambda: TrainableTokensConfig(token_indices=[1], **CAUSAL),
    ],
)
def test_a_weight_that_has_no_meaning_is_refused(bench: Bench, make_config: Callable[[], PeftConfig]) -> None:
    base = bench.base("llama")
    adapter = bench.adapter("llama", base, make_config())
    assert "give a weight of 1" in refusal(base, adapter, models={"a0": {"weight": 0.5}})


def test_a_manifest_that_names_another_base_is_heeded(bench: Bench) -> None:
    base, adapter = bench.base("llama"), lora_of(bench, Q_PROJ)
    (adapter / "surgery-manifest.json").write_text(json.dumps({"base": {"identity": "sha256:other"}}))
    assert "sha256:other" in refusal(base, adapter)
    surgery.plan(spec(base, adapter, any_base=True))


def test_neither_memory_nor_workers_show_in_a_fold(bench: Bench) -> None:
    base = bench.base("llama", **WIDE)
    config = LoraConfig(r=5, use_dora=True, target_modules=["down_proj", "up_proj", "embed_tokens"], **CAUSAL)
    plan = surgery.plan(spec(base, bench.adapter("llama", base, config)))
    surgery.apply(plan, bench.path("small"), memory="130MiB", workers=1)
    surgery.apply(plan, bench.path("large"), memory="2GiB", workers=2)
    assert differing(models.read(bench.path("small")), models.read(bench.path("large"))) == []


def test_planning_a_fold_imports_no_torch(bench: Bench) -> None:
    content = json.dumps(spec(bench.base("llama"), lora_of(bench, Q_PROJ)))
    code = f"import json, sys, surgery; surgery.plan(json.loads({content!r})); sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


def _delta_cases() -> dict[str, tuple[FoldKernel, tuple[int, ...]]]:
    """Kernels on weights of several bands and odd sizes."""
    rows, cols = 613, 1031
    deltas: dict[str, Delta] = {
        "lora": LowRank(rows, cols, 3, 0.7),
        "vera": Vera(rows, cols, 5, cols + 3, rows + 7),
        "adalora": AdaLora(rows, cols, 6, 3.0, 12.0),
        "loha": Hadamard(rows, cols, 4, 0.3),
        "miss": Shards(rows, cols, 7, rows),
    }
    kernels: dict[str, FoldKernel] = {name: AddDelta((rows, cols), delta) for name, delta in deltas.items()}
    kernels |= {f"{name}, turned": AddDelta((cols, rows), delta, True, True) for name, delta in deltas.items()}
    lokr = Kronecker(31 * 20, 17 * 60, ((31, 17),), ((20, 2), (2, 60)), 0.5)
    fused = FusedLowRank(rows, cols, 3, rows, 4, 0.5, num_held=3)
    kernels["lokr"] = AddDelta((620, 1020), lokr)
    kernels["experts"] = AddDelta((3, rows, cols), fused)
    kernels["turned experts"] = AddDelta((3, cols, rows), fused, True)
    kernels["dora"] = Decomposed((rows, cols), deltas["lora"])
    kernels["dora, turned"] = Decomposed((cols, rows), deltas["lora"], True)
    kernels["bias"] = AddVector((700_001,), 0.5)
    kernels["ia3, inputs"] = Rescale((rows, cols), 1, (1, cols))
    kernels["ia3, outputs"] = Rescale((rows, cols), 0, (rows, 1))
    kernels["ia3, convolution"] = Rescale((300, 70, 5, 5), 1, (1, 70, 1, 1))
    kernels["tokens"] = SetRows((rows, cols), (0, 300, 612))
    kernels["oft"] = Rotate((rows, 1050), 30, 35)
    return {name: (kernel, kernel.shape) for name, kernel in kernels.items()}


DELTA_CASES = _delta_cases()


@pytest.mark.parametrize("case", DELTA_CASES)
def test_the_bits_of_a_kernel_do_not_depend_on_its_tiles(case: str) -> None:
    kernel, shape = DELTA_CASES[case]
    weight = models.random_weight(*shape, dtype=torch.bfloat16)
    tensors = [models.random_weight(*size, seed=seed) for seed, size in enumerate(kernel.shapes())]
    flat, whole = weight.reshape(-1), [tensor.reshape(-1) for tensor in tensors]
    num = flat.numel()
    unit = kernel.unit() or num
    state: object = None
    if kernel.reductions:
        parts = [kernel.partial(None, span, flat[slice(*span)], *whole) for span in _spans(num, unit)]
        state = kernel.combine(None, parts)
    cuts = [num, 1 << 18, (1 << 18) + 12345, 70_001]
    results: list[Tensor] = []
    for cut in cuts:
        spans = _spans(num, max(1, cut // kernel.align) * kernel.align)
        tiles = [kernel.tile(state, None, span, flat[slice(*span)], *whole)[0] for span in spans]
        results.append(torch.cat([tile for tile in tiles if tile is not None]))
    assert all(models.same_bytes(result, results[0]) for result in results[1:])
    assert not torch.equal(results[0], flat)


def _spans(num: int, step: int) -> list[tuple[int, int]]:
    return [(start, min(start + step, num)) for start in range(0, num, step)]
