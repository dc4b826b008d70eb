"""bitsandbytes and transformers open our 4-bit files, and compute what they compute from their own."""

import json
import logging
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import bitsandbytes as bnb
import models
import pytest
import torch
import transformers
from bitsandbytes.functional import QuantState, dequantize_4bit, quantize_4bit
from conftest import Convert
from torch import Tensor, nn
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    BitsAndBytesConfig,
    PreTrainedModel,
)
from transformers.pytorch_utils import Conv1D
from transformers.quantizers.quantizers_utils import should_convert_module

import surgery
from surgery.manifest import read_manifest

Tensors = Mapping[str, Tensor]
BLOCK_SIZES = [32, 64, 128, 256, 512, 1024, 2048, 4096]
RECORD = ".quant_state.bitsandbytes__"
IDS = torch.tensor([[1, 5, 9, 2, 33, 80, 7, 150], [3, 3, 64, 100, 12, 0, 159, 4]])


@dataclass(frozen=True)
class Family:
    """A kind of model: how to make one, what loads it, and which of its Linears transformers quantizes."""

    make: Callable[[Path], Path]
    auto: Any
    num_quantized: int
    conv1d: bool = False


FAMILIES = {
    "llama": Family(models.llama, AutoModelForCausalLM, 14),
    "qwen2": Family(models.qwen2, AutoModelForCausalLM, 14),
    "mistral": Family(models.mistral, AutoModelForCausalLM, 14),
    "gpt2": Family(models.gpt2, AutoModelForCausalLM, 8, conv1d=True),
    "bert": Family(lambda path: models.bert(path, head=False), AutoModel, 13),
    "bert-mlm": Family(models.bert, AutoModelForMaskedLM, 13),
    "minilm": Family(lambda path: models.minilm(), AutoModel, 37),
}

every_family = pytest.mark.parametrize("family", FAMILIES.values(), ids=FAMILIES)
every_quant_type = pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
double_or_not = pytest.mark.parametrize("double_quant", [True, False], ids=["double", "single"])


def quantize(quant_type: str = "nf4", modules: str = "all-linear", **options: Any) -> dict[str, Any]:
    return {"op": f"quantize.{quant_type}", "modules": modules, **options}


def quantized_paths(tensors: Tensors) -> list[str]:
    return [name.partition(f".weight{RECORD}")[0] for name in tensors if RECORD in name]


def config_of(checkpoint: Path) -> dict[str, Any]:
    return json.loads((checkpoint / "config.json").read_bytes())


def bitsandbytes_parts(name: str, w: Tensor, **options: Any) -> dict[str, Tensor]:
    """What bitsandbytes saves for one weight, under the names it gives."""
    packed, state = quantize_4bit(w, **options)
    return {name: packed, **{f"{name}.{key}": part for key, part in state.as_dict(packed=True).items()}}


def assert_same_tensors(ours: Tensors, theirs: Tensors) -> None:
    """Same names, same bytes; of a record, padded or not, the same JSON in the same order."""
    assert sorted(ours) == sorted(theirs)
    for name, tensor in theirs.items():
        if RECORD in name:
            assert list(record(ours[name]).items()) == list(record(tensor).items()), name
        else:
            assert models.same_bytes(ours[name], tensor), name


def record(stored: Tensor) -> dict[str, Any]:
    return json.loads(bytes(stored.tolist()))


def assert_equals_bitsandbytes(
    source: Tensors,
    output: Tensors,
    *,
    quant_type: str = "nf4",
    block_size: int = 64,
    double_quant: bool = True,
    conv1d: bool = False,
) -> None:
    """Each quantized weight is what bitsandbytes makes of it; everything else is the source's bytes."""
    expected = dict(source)
    for path in quantized_paths(output):
        w = expected.pop(f"{path}.weight")
        options = {"blocksize": block_size, "quant_type": quant_type, "compress_statistics": double_quant}
        expected |= bitsandbytes_parts(f"{path}.weight", w.t().contiguous() if conv1d else w, **options)
    assert_same_tensors(output, expected)


# Bytes, as bitsandbytes makes them


@every_family
@every_quant_type
@double_or_not
def test_every_tensor_equals_what_bitsandbytes_makes_of_the_source(
    family: Family, quant_type: str, double_quant: bool, convert: Convert, tmp_path: Path
) -> None:
    source = family.make(tmp_path / "source")
    out = convert(source, [quantize(quant_type, double_quant=double_quant)])
    output = models.read(out)
    assert len(quantized_paths(output)) == family.num_quantized
    assert_equals_bitsandbytes(
        models.read(source), output, quant_type=quant_type, double_quant=double_quant, conv1d=family.conv1d
    )


@every_quant_type
@double_or_not
@pytest.mark.parametrize("block_size", BLOCK_SIZES)
def test_every_block_size_equals_bitsandbytes(
    block_size: int, quant_type: str, double_quant: bool, convert: Convert, tmp_path: Path
) -> None:
    source = models.llama(tmp_path / "source", num_hidden_layers=1)
    out = convert(source, [quantize(quant_type, block_size=block_size, double_quant=double_quant)])
    assert_equals_bitsandbytes(
        models.read(source), models.read(out), quant_type=quant_type, block_size=block_size, double_quant=double_quant
    )


@every_quant_type
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("hidden_size", [80, 96, 128])
def test_every_dtype_and_widths_that_do_not_divide_equal_bitsandbytes(
    hidden_size: int, dtype: torch.dtype, quant_type: str, convert: Convert, tmp_path: Path
) -> None:
    source = models.llama(tmp_path / "source", dtype=dtype, hidden_size=hidden_size, intermediate_size=184)
    output = models.read(convert(source, [quantize(quant_type)]))
    assert_equals_bitsandbytes(models.read(source), output, quant_type=quant_type)


def hostile_weights(dtype: torch.dtype) -> dict[str, Tensor]:
    """Odd counts, a zero block, a block of negative zeros, subnormals, outliers, a weight of zeros."""
    odd = models.random_weight(33, 47, dtype=dtype, seed=1)
    zeros = models.random_weight(40, 64, dtype=dtype, seed=2)
    zeros[3], zeros[4] = 0.0, -0.0
    smallest = torch.finfo(dtype).smallest_normal
    subnormal = (torch.rand(20, 96, generator=torch.Generator().manual_seed(3)) * smallest).to(dtype)
    outliers = models.random_weight(32, 100, dtype=dtype, seed=4)
    outliers[::7, 3] = torch.finfo(dtype).max
    outliers[::5, 4] = torch.finfo(dtype).min
    weights = {"odd": odd, "zeros": zeros, "subnormal": subnormal, "outliers": outliers}
    weights |= {"nothing": torch.zeros(16, 24, dtype=dtype), "single": torch.full((1, 1), -0.25, dtype=dtype)}
    others = {"odd.bias": models.random_weight(33, dtype=dtype), "norm.weight": torch.ones(47, dtype=dtype)}
    return {**{f"layers.{name}.weight": w for name, w in weights.items()}, **others}


@every_quant_type
@double_or_not
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("block_size", [32, 64, 512])
def test_hostile_weights_equal_bitsandbytes(
    block_size: int, dtype: torch.dtype, double_quant: bool, quant_type: str, convert: Convert, tmp_path: Path
) -> None:
    source = models.handwritten(tmp_path / "source.safetensors", hostile_weights(dtype))
    out = convert(source, [quantize(quant_type, block_size=block_size, double_quant=double_quant)])
    output = models.read(out)
    assert len(quantized_paths(output)) == 6
    assert_equals_bitsandbytes(
        models.read(source), output, quant_type=quant_type, block_size=block_size, double_quant=double_quant
    )


@double_or_not
@pytest.mark.parametrize("block_size", [64, 4096])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_weights_of_many_tiles_equal_bitsandbytes(
    dtype: torch.dtype, block_size: int, double_quant: bool, convert: Convert, tmp_path: Path
) -> None:
    weights = {"large.weight": models.random_weight(1501, 1401, dtype=dtype), "small.weight": torch.ones(2, 2)}
    source = models.handwritten(tmp_path / "source.safetensors", weights)
    out = convert(source, [quantize(modules="large", block_size=block_size, double_quant=double_quant)])
    assert_equals_bitsandbytes(weights, models.read(out), block_size=block_size, double_quant=double_quant)


def test_a_transposed_weight_of_many_tiles_equals_bitsandbytes(convert: Convert, tmp_path: Path) -> None:
    source = models.gpt2(tmp_path / "source", n_embd=360, n_layer=1)
    output = models.read(convert(source, [quantize()]))
    assert 2 * output["transformer.h.0.mlp.c_fc.weight"].numel() > 1 << 18
    assert_equals_bitsandbytes(models.read(source), output, conv1d=True)


# Loading, as transformers does it


@contextmanager
def no_warning_of_transformers() -> Iterator[None]:
    records: list[logging.LogRecord] = []
    handler = logging.Handler(logging.WARNING)
    handler.emit = records.append  # type: ignore[method-assign]
    logger = logging.getLogger("transformers")
    logger.addHandler(handler)
    try:
        yield
    finally:
        logger.removeHandler(handler)
    assert [entry.getMessage() for entry in records] == []


def load(auto: Any, path: Path, **options: Any) -> PreTrainedModel:
    """Loaded without a missing, unexpected or mismatched tensor, and without a word about it."""
    with no_warning_of_transformers():
        model, info = auto.from_pretrained(path, dtype="auto", output_loading_info=True, **options)
    assert not any(info.values()), info
    return model.eval()


def load_on_the_fly(auto: Any, source: Path, quant_type: str = "nf4", skip: list[str] | None = None) -> PreTrainedModel:
    """`source` as transformers quantizes it itself."""
    config = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=quant_type,
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
        llm_int8_skip_modules=skip,
    )
    return load(auto, source, quantization_config=config)


@torch.no_grad()
def output_of(model: PreTrainedModel) -> Tensor:
    return model(IDS)[0].float()


def linears_4bit(model: PreTrainedModel) -> dict[str, bnb.nn.Linear4bit]:
    return {path: module for path, module in model.named_modules() if isinstance(module, bnb.nn.Linear4bit)}


def assert_loaded_as_listed(model: PreTrainedModel, out: Path) -> None:
    """What is quantized on disk is a Linear4bit, and every other Linear is skipped by name."""
    skip = config_of(out)["quantization_config"]["llm_int8_skip_modules"]
    linears = {path: module for path, module in model.named_modules() if isinstance(module, nn.Linear | Conv1D)}
    loaded_4bit = set(linears_4bit(model))
    assert loaded_4bit == set(quantized_paths(models.read(out)))
    for path in linears:
        assert should_convert_module(path, skip) == (path in loaded_4bit), path
        assert (path in skip or f"^{path}" in skip) == (path not in loaded_4bit), path


@every_family
@every_quant_type
def test_transformers_computes_the_logits_of_its_own_quantization(
    family: Family, quant_type: str, convert: Convert, tmp_path: Path
) -> None:
    source = family.make(tmp_path / "source")
    out = convert(source, [quantize(quant_type)])
    ours = load(family.auto, out)
    theirs = load_on_the_fly(family.auto, source, quant_type)
    assert torch.equal(output_of(ours), output_of(theirs))
    assert not torch.equal(output_of(ours), output_of(load(family.auto, source)))
    assert_loaded_as_listed(ours, out)


def without_positions(tensors: Tensors) -> dict[str, Tensor]:
    """Without the buffer 0, 1, 2, ... of old BERT checkpoints, which transformers neither reads nor saves."""
    return {name: tensor for name, tensor in tensors.items() if not name.endswith("embeddings.position_ids")}


@every_family
def test_our_files_hold_what_transformers_saves_after_quantizing_itself(
    family: Family, convert: Convert, tmp_path: Path
) -> None:
    source = family.make(tmp_path / "source")
    out = convert(source, [quantize()])
    load_on_the_fly(family.auto, source).save_pretrained(tmp_path / "theirs")
    assert_same_tensors(without_positions(models.read(out)), models.read(tmp_path / "theirs"))
    ours, theirs = (config_of(path)["quantization_config"] for path in (out, tmp_path / "theirs"))
    same = [key for key in theirs if key in ours and key != "llm_int8_skip_modules"]
    assert {key: ours[key] for key in same} == {key: theirs[key] for key in same}


@pytest.mark.parametrize("make", [models.llama, models.qwen2, models.mistral], ids=["llama", "qwen2", "mistral"])
def test_with_two_projections_quantized_every_other_linear_is_skipped_by_name(
    make: Callable[[Path], Path], convert: Convert, tmp_path: Path
) -> None:
    source = make(tmp_path / "source")
    out = convert(source, [quantize(modules=r"model\.layers\.\d+\.self_attn\.(q|v)_proj", expect=4)])
    model = load(AutoModelForCausalLM, out)
    assert_loaded_as_listed(model, out)
    skip = config_of(out)["quantization_config"]["llm_int8_skip_modules"]
    assert torch.equal(output_of(model), output_of(load_on_the_fly(AutoModelForCausalLM, source, skip=skip)))


@pytest.mark.parametrize(
    ("make", "modules", "auto"),
    [
        (models.gpt2, r"transformer\.h\.0\.attn\.c_proj", AutoModelForCausalLM),
        (models.gpt2, r".*\.mlp\.c_proj", AutoModelForCausalLM),
        (models.bert, r".*\.attention\.output\.dense", AutoModelForMaskedLM),
        (models.bert, r"bert\.encoder\.layer\.1\.output\.dense", AutoModelForMaskedLM),
        (lambda path: models.bert(path, head=False), r"encoder\.layer\.\d\.output\.dense", AutoModel),
        (models.llama, r"model\.layers\.1\..*", AutoModelForCausalLM),
        (models.llama, "lm_head", AutoModelForCausalLM),
    ],
    ids=["gpt2-attn", "gpt2-mlp", "bert-attention", "bert-output", "bert-base-output", "llama-layer", "llama-head"],
)
def test_a_part_of_the_linears_loads_and_runs_though_names_end_alike(
    make: Callable[[Path], Path], modules: str, auto: Any, convert: Convert, tmp_path: Path
) -> None:
    excepts = {"except": r".*norm"} if "layers" in modules else {}
    out = convert(make(tmp_path / "source"), [quantize(modules=modules, **excepts)])
    model = load(auto, out)
    assert_loaded_as_listed(model, out)
    assert output_of(model).isfinite().all()


def test_two_edits_with_other_types_and_block_sizes_load_and_compute_with_their_weights(
    convert: Convert, tmp_path: Path
) -> None:
    source = models.llama(tmp_path / "source", dtype=torch.float32, intermediate_size=256)
    mlp = {"block_size": 128, "double_quant": False, "compute_dtype": "float32"}
    edits = [
        quantize("nf4", modules=r".*\.self_attn\.\w_proj", compute_dtype="float32"),
        quantize("fp4", modules=r".*\.mlp\.(up|gate)_proj", **mlp),
    ]
    out = convert(source, edits)
    model = load(AutoModelForCausalLM, out)
    assert_loaded_as_listed(model, out)
    for path, module in linears_4bit(model).items():
        state = module.weight.quant_state
        expected = ("fp4", 128, False) if ".mlp." in path else ("nf4", 64, True)
        assert (state.quant_type, state.blocksize, state.nested) == expected, path
    plain = load(AutoModelForCausalLM, convert(out, [dequantize()]))
    exact = model.train()  # bitsandbytes' kernel for inference on a CPU rounds to bf16, whatever the dtype
    assert torch.equal(output_of(exact), output_of(plain))


def test_attention_of_a_mixture_of_experts_loads_and_runs_and_its_experts_are_refused(
    convert: Convert, tmp_path: Path
) -> None:
    source = models.mixtral(tmp_path / "source")
    with pytest.raises(surgery.OpError, match="is an MoE expert"):
        convert(source, [quantize()])
    out = convert(source, [quantize(modules="all-linear", **{"except": r".*\.experts\..*"})])
    model = load(AutoModelForCausalLM, out)
    assert_loaded_as_listed(model, out)
    assert len(linears_4bit(model)) == 4
    skip = config_of(out)["quantization_config"]["llm_int8_skip_modules"]
    assert torch.equal(output_of(model), output_of(load_on_the_fly(AutoModelForCausalLM, source, skip=skip)))


def test_t5_loads_with_its_wo_left_in_full_precision_and_computes_the_same(convert: Convert, tmp_path: Path) -> None:
    source = models.t5(tmp_path / "source")
    out = convert(source, [quantize()])
    skip = config_of(out)["quantization_config"]["llm_int8_skip_modules"]
    ours = load(AutoModelForSeq2SeqLM, out)
    assert_loaded_as_listed(ours, out)
    assert not any(path.endswith(".wo") for path in linears_4bit(ours))
    theirs = load_on_the_fly(AutoModelForSeq2SeqLM, source, skip=skip)
    with torch.no_grad():
        logits = [model(input_ids=IDS, decoder_input_ids=IDS).logits for model in (ours, theirs)]
    assert torch.equal(*logits)


@pytest.mark.parametrize("model_type", [name for name in models.SIZES if name != "falcon"])
def test_every_architecture_loads_and_computes_as_transformers_quantizes_it(
    model_type: str, convert: Convert, tmp_path: Path
) -> None:
    source = models.of_type(model_type, tmp_path / "source")
    auto = getattr(transformers, models.SIZES[model_type][0])
    out = convert(source, [quantize()])
    ours, theirs = load(auto, out), load_on_the_fly(auto, source)
    assert linears_4bit(ours).keys() == linears_4bit(theirs).keys()
    assert set(linears_4bit(ours)) == set(quantized_paths(models.read(out)))
    with torch.no_grad():
        ids = {"input_ids": IDS, **({"decoder_input_ids": IDS} if ours.config.is_encoder_decoder else {})}
        assert torch.equal(ours(**ids)[0], theirs(**ids)[0])


def test_an_architecture_whose_linears_transformers_leaves_alone_is_refused(convert: Convert, tmp_path: Path) -> None:
    source = models.of_type("falcon", tmp_path / "source")
    config = BitsAndBytesConfig(load_in_4bit=True)
    assert not linears_4bit(AutoModelForCausalLM.from_pretrained(source, quantization_config=config))
    with pytest.raises(surgery.SurgeryError):
        convert(source, [quantize()])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_other_dtypes_compute_the_logits_of_transformers_own_quantization(
    dtype: torch.dtype, convert: Convert, tmp_path: Path
) -> None:
    source = models.llama(tmp_path / "source", dtype=dtype)
    ours = load(AutoModelForCausalLM, convert(source, [quantize()]))
    assert ours.model.norm.weight.dtype == dtype
    assert torch.equal(output_of(ours), output_of(load_on_the_fly(AutoModelForCausalLM, source)))


@every_family
def test_a_fresh_task_head_on_our_output_runs(family: Family, convert: Convert, tmp_path: Path) -> None:
    out = convert(family.make(tmp_path / "source"), [quantize()])
    model = AutoModelForSequenceClassification.from_pretrained(out, num_labels=3, pad_token_id=0, dtype="auto")
    assert linears_4bit(model)
    logits = output_of(model.eval())
    assert logits.shape == (2, 3)
    assert logits.isfinite().all()


def test_a_fresh_language_model_head_on_an_encoder_runs(convert: Convert, tmp_path: Path) -> None:
    out = convert(models.bert(tmp_path / "source", head=False), [quantize()])
    model = AutoModelForMaskedLM.from_pretrained(out, dtype="auto").eval()
    assert output_of(model).isfinite().all()


# Back to floats


def dequantize(**options: Any) -> dict[str, Any]:
    return {"op": "quantize.dequantize", "modules": "all-linear", **options}


def bitsandbytes_dequantized(tensors: Tensors, path: str) -> Tensor:
    """One weight as bitsandbytes gives it back, read from the tensors as its loader reads them."""
    name = f"{path}.weight"
    parts = {key: part for key, part in tensors.items() if key.startswith(f"{name}.")}
    state = QuantState.from_dict(
        {key.removeprefix(f"{name}."): part for key, part in parts.items()}, torch.device("cpu")
    )
    return dequantize_4bit(tensors[name], state)


def assert_dequantized_as_bitsandbytes(quantized: Path, out: Path, *, conv1d: bool = False) -> None:
    before, after = models.read(quantized), models.read(out)
    expected = {name: tensor for name, tensor in before.items() if ".weight." not in name}
    for path in quantized_paths(before):
        w = bitsandbytes_dequantized(before, path)
        expected[f"{path}.weight"] = w.t().contiguous() if conv1d else w
    assert_same_tensors(after, expected)
    assert "quantization_config" not in config_of(out)


@every_family
@every_quant_type
@double_or_not
def test_dequantizing_our_output_gives_what_bitsandbytes_gives(
    family: Family, quant_type: str, double_quant: bool, convert: Convert, tmp_path: Path
) -> None:
    source = family.make(tmp_path / "source")
    quantized = convert(source, [quantize(quant_type, double_quant=double_quant)])
    out = convert(quantized, [dequantize()])
    assert_dequantized_as_bitsandbytes(quantized, out, conv1d=family.conv1d)
    shapes = {name: (w.dtype, w.shape) for name, w in models.read(source).items()}
    assert {name: (w.dtype, w.shape) for name, w in models.read(out).items()} == shapes
    assert not linears_4bit(load(family.auto, out))


@every_family
def test_dequantizing_what_transformers_saved_gives_what_bitsandbytes_gives(
    family: Family, convert: Convert, tmp_path: Path
) -> None:
    source = family.make(tmp_path / "source")
    theirs = tmp_path / "theirs"
    load_on_the_fly(family.auto, source).save_pretrained(theirs)
    out = convert(theirs, [dequantize()])
    assert_dequantized_as_bitsandbytes(theirs, out, conv1d=family.conv1d)
    load(family.auto, out)


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_dequantizing_to_another_dtype_is_the_rounded_weight_cast(dtype: str, convert: Convert, tmp_path: Path) -> None:
    quantized = convert(models.llama(tmp_path / "source"), [quantize()])
    before, after = models.read(quantized), models.read(convert(quantized, [dequantize(dtype=dtype)]))
    for path in quantized_paths(before):
        expected = bitsandbytes_dequantized(before, path).to(getattr(torch, dtype))
        assert models.same_bytes(after[f"{path}.weight"], expected), path


def test_dequantizing_a_part_keeps_the_rest_quantized_and_loads(convert: Convert, tmp_path: Path) -> None:
    quantized = convert(models.llama(tmp_path / "source"), [quantize()])
    out = convert(quantized, [dequantize(modules=r".*\.mlp\..*")])
    model = load(AutoModelForCausalLM, out)
    assert_loaded_as_listed(model, out)
    assert len(quantized_paths(models.read(out))) == 8
    assert output_of(model).isfinite().all()


@every_quant_type
def test_quantizing_what_was_dequantized_in_one_spec_copies_the_bytes(
    quant_type: str, convert: Convert, tmp_path: Path
) -> None:
    quantized = convert(models.gpt2(tmp_path / "source"), [quantize(quant_type)])
    again = convert(quantized, [dequantize(), quantize(quant_type)])
    assert_same_tensors(models.read(again), models.read(quantized))


@every_quant_type
@double_or_not
@pytest.mark.parametrize("make", [models.llama, models.gpt2], ids=["llama", "gpt2"])
def test_dequantizing_in_the_spec_that_quantizes_gives_what_two_specs_give(
    make: Callable[[Path], Path], quant_type: str, double_quant: bool, convert: Convert, tmp_path: Path
) -> None:
    source = make(tmp_path / "source")
    first = quantize(quant_type, double_quant=double_quant)
    at_once = convert(source, [first, dequantize(dtype="float32")])
    in_turn = convert(convert(source, [first]), [dequantize(dtype="float32")])
    assert_same_tensors(models.read(at_once), models.read(in_turn))
    assert config_of(at_once) == config_of(in_turn)


# MiniLM, the one trained model


SENTENCES = [
    [101, 1996, 4937, 2938, 2006, 1996, 13523, 102],
    [101, 2019, 5055, 4937, 2003, 4062, 2006, 1996, 6411, 102],
    [101, 4518, 6597, 3062, 13438, 7483, 102],
    [101, 2129, 2079, 1045, 25141, 2026, 20786, 1029, 102],
]


@torch.no_grad()
def sentence_embeddings(model: PreTrainedModel) -> Tensor:
    """The mean over tokens, normalised, as sentence-transformers pools them; [sentences, 384]."""
    pooled = [model(torch.tensor([ids]))[0].float().mean(dim=1) for ids in SENTENCES]
    return nn.functional.normalize(torch.cat(pooled), dim=1)


def test_nf4_minilm_gives_nearly_the_same_sentence_embeddings(convert: Convert) -> None:
    source = models.minilm()
    out = convert(source, [quantize()])
    ours = sentence_embeddings(load(AutoModel, out))
    original = sentence_embeddings(load(AutoModel, source))
    assert ((ours * original).sum(dim=1) > 0.95).all()
    assert torch.equal(ours, sentence_embeddings(load_on_the_fly(AutoModel, source)))


# Evidence


@every_quant_type
@double_or_not
@pytest.mark.parametrize("name", ["llama", "gpt2", "minilm"])
def test_errors_in_the_manifest_are_those_of_what_bitsandbytes_gives_back(
    name: str, quant_type: str, double_quant: bool, convert: Convert, tmp_path: Path
) -> None:
    family = FAMILIES[name]
    source = family.make(tmp_path / "source")
    out = convert(source, [quantize(quant_type, double_quant=double_quant)])
    before, after = models.read(source), models.read(out)
    entries = read_manifest(out).tensors
    assert {name for name, entry in entries.items() if "error" in entry} == {
        f"{path}.weight" for path in quantized_paths(after)
    }
    for path in quantized_paths(after):
        w = before[f"{path}.weight"].t() if family.conv1d else before[f"{path}.weight"]
        error = (w.double() - bitsandbytes_dequantized(after, path).double()).abs()
        stated = entries[f"{path}.weight"]["error"]
        assert stated["max"] == pytest.approx(float(error.max()), rel=1e-5), path
        assert stated["rms"] == pytest.approx(float(error.square().mean().sqrt()), rel=1e-5), path
