"""`tensor.cast`, `tensor.rename` and `tensor.drop`: their values are torch's, and nothing else changes."""

import json
from pathlib import Path
from typing import Any

import models
import pytest
import torch
from conftest import Convert
from torch import Tensor
from transformers import AutoModelForCausalLM

import surgery
from surgery.manifest import read_manifest

FLOATS = ["float32", "float16", "bfloat16", "float64", "float8_e4m3fn", "float8_e5m2"]


def cast(dtype: str, tensors: str = ".*", **fields: Any) -> dict[str, Any]:
    return {"op": "tensor.cast", "tensors": tensors, "dtype": dtype, **fields}


def rename(tensors: str, to: str) -> dict[str, Any]:
    return {"op": "tensor.rename", "tensors": tensors, "to": to}


def drop(tensors: str) -> dict[str, Any]:
    return {"op": "tensor.drop", "tensors": tensors}


def config_of(checkpoint: Path) -> dict[str, Any]:
    return json.loads((checkpoint / "config.json").read_bytes())


def assert_same_tensors(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> None:
    assert sorted(ours) == sorted(theirs)
    for name, tensor in theirs.items():
        assert models.same_bytes(ours[name], tensor), name


# Cast


@pytest.mark.parametrize("source_dtype", ["float32", "float16", "bfloat16", "float64"])
@pytest.mark.parametrize("dtype", FLOATS)
def test_a_cast_gives_the_values_of_torch(source_dtype: str, dtype: str, convert: Convert, tmp_path: Path) -> None:
    tiny = torch.tensor([0.0, -0.0, 1e-30, -3e-8, 2**-24, 2**-25, 1.0, 1 + 2**-9, 1 + 2**-8, 1 + 3 * 2**-9, 240.0])
    tensors = {
        "matrix.weight": models.random_weight(37, 41).to(getattr(torch, source_dtype)),
        "edges": tiny.to(getattr(torch, source_dtype)),
        "scalar": torch.tensor(0.1, dtype=getattr(torch, source_dtype)),
        "empty": torch.zeros(0, 3, dtype=getattr(torch, source_dtype)),
        "cube": models.random_weight(3, 5, 7).to(getattr(torch, source_dtype)),
    }
    source = models.handwritten(tmp_path / "source.safetensors", tensors)
    expected = {name: tensor.to(getattr(torch, dtype)) for name, tensor in tensors.items()}
    assert_same_tensors(models.read(convert(source, [cast(dtype)])), expected)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float8_e4m3fn"])
def test_a_cast_of_many_tiles_gives_the_values_of_torch(dtype: str, convert: Convert, tmp_path: Path) -> None:
    w = models.random_weight(1501, 701)
    source = models.handwritten(tmp_path / "source.safetensors", {"w": w, "other": torch.ones(3)})
    after = models.read(convert(source, [cast(dtype, "w")]))
    assert_same_tensors(after, {"w": w.to(getattr(torch, dtype)), "other": torch.ones(3)})


def test_the_error_of_a_cast_is_in_the_manifest_and_an_exact_one_has_none(convert: Convert, tmp_path: Path) -> None:
    w = models.random_weight(700, 701)
    source = models.handwritten(tmp_path / "source.safetensors", {"w": w, "exact": w.bfloat16()})
    out = convert(source, [cast("bfloat16", "w"), cast("float32", "exact")])
    entries = read_manifest(out).tensors
    error = (w.double() - w.bfloat16().double()).abs()
    assert entries["w"]["error"]["max"] == float(error.max())
    assert entries["w"]["error"]["rms"] == pytest.approx(float(error.square().mean().sqrt()), rel=1e-5)
    assert "error" not in entries["exact"]


def test_non_finite_values_stay_what_they_are(convert: Convert, tmp_path: Path) -> None:
    w = torch.tensor([torch.inf, -torch.inf, torch.nan, 1.0])
    source = models.handwritten(tmp_path / "source.safetensors", {"w": w})
    after = models.read(convert(source, [cast("bfloat16")]))["w"]
    torch.testing.assert_close(after, w.bfloat16(), equal_nan=True, rtol=0, atol=0)


@pytest.mark.parametrize(
    ("dtype", "value"),
    [("float16", 65520.0), ("float16", -1e5), ("bfloat16", 3.4e38), ("float8_e4m3fn", 500.0), ("float8_e5m2", 1e5)],
)
def test_a_value_too_large_for_the_dtype_is_named_and_nothing_is_written(
    dtype: str, value: float, tmp_path: Path
) -> None:
    w = models.random_weight(600, 700)
    w[511, 3] = value
    source = models.handwritten(tmp_path / "source.safetensors", {"norm": torch.ones(4), "layer.weight": w})
    plan = surgery.plan({"version": 1, "source": str(source), "edits": [cast(dtype)]})
    with pytest.raises(surgery.OpError, match=rf"`layer\.weight` holds a value at \[511, 3\].*too large for {dtype}"):
        surgery.apply(plan, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16", "float8_e4m3fn", "float8_e5m2"])
def test_a_float64_value_that_no_float32_holds_is_too_large_too(dtype: str, convert: Convert, tmp_path: Path) -> None:
    w = torch.tensor([[1.0, 1e300]], dtype=torch.float64)
    source = models.handwritten(tmp_path / "source.safetensors", {"w": w})
    with pytest.raises(surgery.OpError, match=rf"`w` holds a value at \[0, 1\].*too large for {dtype}"):
        convert(source, [cast(dtype)])


def test_an_infinity_does_not_become_a_number_in_a_dtype_that_has_none(convert: Convert, tmp_path: Path) -> None:
    source = models.handwritten(tmp_path / "source.safetensors", {"w": torch.tensor([1.0, torch.inf])})
    with pytest.raises(surgery.OpError, match=r"`w` holds a value at \[1\]"):
        convert(source, [cast("float8_e4m3fn")])


@pytest.mark.parametrize("dtype", [torch.int64, torch.uint8, torch.bool], ids=str)
def test_a_tensor_that_is_no_float_is_refused_and_left_by_except(
    dtype: torch.dtype, convert: Convert, tmp_path: Path
) -> None:
    tensors = {"w": models.random_weight(3, 4), "ids": torch.arange(6).to(dtype)}
    source = models.handwritten(tmp_path / "source.safetensors", tensors)
    with pytest.raises(surgery.OpError, match="`ids` cannot be cast"):
        convert(source, [cast("bfloat16")])
    after = models.read(convert(source, [cast("bfloat16", **{"except": "ids"})]))
    assert_same_tensors(after, {"w": tensors["w"].bfloat16(), "ids": tensors["ids"]})


def test_a_part_of_a_quantized_weight_is_refused(convert: Convert, tmp_path: Path) -> None:
    nf4 = {"op": "quantize.nf4", "modules": "all-linear", "double_quant": False}
    out = convert(models.llama(tmp_path / "source"), [nf4])
    with pytest.raises(surgery.OpError, match="is a part of a quantized weight"):
        convert(out, [cast("bfloat16", r".*\.q_proj\.weight\.absmax")])


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_the_config_names_the_dtype_and_transformers_loads_it(dtype: str, convert: Convert, tmp_path: Path) -> None:
    source = models.qwen2(tmp_path / "source")
    out = convert(source, [cast(dtype)])
    assert config_of(out)["dtype"] == dtype
    assert {**config_of(out), "dtype": 0} == {**config_of(source), "dtype": 0}
    model, info = AutoModelForCausalLM.from_pretrained(out, dtype="auto", output_loading_info=True)
    assert not any(info.values())
    assert {str(parameter.dtype) for parameter in model.parameters()} == {f"torch.{dtype}"}
    reference = AutoModelForCausalLM.from_pretrained(source, dtype=getattr(torch, dtype))
    ids = torch.tensor([[1, 2, 3]])
    with torch.no_grad():
        assert torch.equal(model(ids).logits, reference(ids).logits)


def test_an_old_config_gets_both_names_of_the_dtype(convert: Convert, tmp_path: Path) -> None:
    source = models.llama(tmp_path / "source")
    config = config_of(source)
    config["torch_dtype"] = config.pop("dtype")
    (source / "config.json").write_text(json.dumps(config))
    out = config_of(convert(source, [cast("float16")]))
    assert (out["dtype"], out["torch_dtype"]) == ("float16", "float16")


def test_casting_a_few_norms_leaves_the_dtype_of_the_config(convert: Convert, tmp_path: Path) -> None:
    source = models.llama(tmp_path / "source")
    out = convert(source, [cast("float32", r".*norm\.weight")])
    assert config_of(out)["dtype"] == "bfloat16"
    assert models.read(out)["model.norm.weight"].dtype == torch.float32


# Copies


def test_every_other_dtype_passes_byte_for_byte(convert: Convert, tmp_path: Path) -> None:
    noise = torch.randint(0, 256, (8, 33), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    dtypes = [torch.uint8, torch.int8, torch.float8_e4m3fn, torch.float8_e5m2, torch.float8_e8m0fnu]
    wide = [torch.int16, torch.int32, torch.int64, torch.float64, torch.float32, torch.bfloat16, torch.float16]
    tensors = {str(dtype): noise.view(dtype).clone() for dtype in dtypes}
    tensors |= {str(dtype): noise[:, :32].contiguous().view(dtype).clone() for dtype in wide}
    tensors |= {"flags": noise % 2 == 0, "scalar": torch.tensor(7), "empty": torch.zeros(0), "w": torch.ones(3, 5)}
    source = models.handwritten(tmp_path / "source.safetensors", tensors)
    after = models.read(convert(source, [cast("bfloat16", "w"), rename(r"torch\.(.*)", r"renamed.\1")]))
    expected = {name.replace("torch.", "renamed."): tensor for name, tensor in tensors.items()}
    assert_same_tensors(after, {**expected, "w": torch.ones(3, 5).bfloat16()})


# Rename


def test_a_rename_puts_the_groups_of_the_regex_in_place(convert: Convert, tmp_path: Path) -> None:
    source = models.llama(tmp_path / "source")
    edits = [
        rename(r"model\.layers\.(\d+)\.self_attn\.(?P<which>[qkv])_proj\.(.*)", r"h.\1.attn.\g<which>.\3"),
        rename(r"lm_head\.weight", "head.weight"),
    ]
    before, after = models.read(source), models.read(convert(source, edits))
    expected: dict[str, Tensor] = {}
    for name, tensor in before.items():
        parts = name.split(".")
        if parts[-2] in ("q_proj", "k_proj", "v_proj"):
            name = f"h.{parts[2]}.attn.{parts[-2][0]}.weight"
        expected["head.weight" if name == "lm_head.weight" else name] = tensor
    assert_same_tensors(after, expected)
    assert "h.1.attn.q.weight" in after


def test_a_base_model_renamed_into_its_model_with_a_head_loads(convert: Convert, tmp_path: Path) -> None:
    source = models.bert(tmp_path / "source", head=False)
    out = convert(source, [rename("(.*)", r"bert.\1")])
    assert_same_tensors(models.read(out), {f"bert.{name}": tensor for name, tensor in models.read(source).items()})


def test_names_can_be_swapped_in_one_edit(convert: Convert, tmp_path: Path) -> None:
    tensors = {"a.x": torch.zeros(2), "a.y": torch.ones(3), "b": torch.ones(1)}
    source = models.handwritten(tmp_path / "source.safetensors", tensors)
    after = models.read(convert(source, [rename(r"a\.(.)", r"\1.a")]))
    assert_same_tensors(after, {"x.a": torch.zeros(2), "y.a": torch.ones(3), "b": torch.ones(1)})


def test_two_tensors_cannot_get_one_name(convert: Convert, tmp_path: Path) -> None:
    source = models.handwritten(tmp_path / "source.safetensors", {"a": torch.zeros(2), "b": torch.ones(3)})
    with pytest.raises(surgery.OpError, match="a name that another tensor has"):
        convert(source, [rename("a", "b")])
    with pytest.raises(surgery.OpError, match="a name that another tensor has"):
        convert(source, [rename("(.)", "c")])
    after = models.read(convert(source, [drop("b"), rename("a", "b")]))
    assert_same_tensors(after, {"b": torch.zeros(2)})


def test_a_group_that_the_regex_lacks_is_an_error_of_the_spec(convert: Convert, tmp_path: Path) -> None:
    source = models.handwritten(tmp_path / "source.safetensors", {"a": torch.zeros(2)})
    with pytest.raises(surgery.SpecError, match="group"):
        convert(source, [rename("(a)", r"\2")])


def test_quantized_weights_renamed_whole_keep_their_bytes_and_are_skipped_by_their_new_names(
    convert: Convert, tmp_path: Path
) -> None:
    nf4 = {"op": "quantize.nf4", "modules": r"model\.layers\.\d+\.mlp\..*"}
    out = convert(models.llama(tmp_path / "source"), [nf4])
    renamed = convert(out, [rename(r"model\.layers\.(.*)", r"model.blocks.\1")])
    expected = {name.replace("model.layers.", "model.blocks."): tensor for name, tensor in models.read(out).items()}
    assert_same_tensors(models.read(renamed), expected)
    skip = config_of(renamed)["quantization_config"]["llm_int8_skip_modules"]
    assert "model.blocks.0.self_attn.q_proj" in skip
    assert not any("model.layers" in entry for entry in skip)


def test_a_quantized_weight_is_not_torn_from_its_parts(convert: Convert, tmp_path: Path) -> None:
    out = convert(models.llama(tmp_path / "source"), [{"op": "quantize.nf4", "modules": "all-linear"}])
    name = r"model\.layers\.0\.self_attn\.q_proj\.weight"
    for edit in (rename(name, "elsewhere.weight"), drop(rf"{name}\.absmax"), drop(name)):
        with pytest.raises(surgery.OpError, match="would be torn apart"):
            convert(out, [edit])


# Drop and order


def test_a_drop_leaves_everything_else_byte_for_byte(convert: Convert, tmp_path: Path) -> None:
    source = models.llama(tmp_path / "source")
    out = convert(source, [drop(r"model\.layers\.1\..*")])
    kept = {name: tensor for name, tensor in models.read(source).items() if ".layers.1." not in name}
    assert_same_tensors(models.read(out), kept)
    manifest = json.loads((out / "surgery-manifest.json").read_bytes())
    assert manifest["dropped"].keys() == models.read(source).keys() - kept.keys()


def test_dropping_everything_is_refused(convert: Convert, tmp_path: Path) -> None:
    source = models.handwritten(tmp_path / "source.safetensors", {"a": torch.zeros(2)})
    with pytest.raises(surgery.OpError, match="leave no tensor"):
        convert(source, [drop(".*")])


def test_edits_see_the_result_of_those_before_them(convert: Convert, tmp_path: Path) -> None:
    w = models.random_weight(30, 40)
    source = models.handwritten(tmp_path / "source.safetensors", {"a.weight": w, "b.weight": w + 1})
    edits = [
        rename(r"a\.(.*)", r"c.\1"),
        cast("float16", r"c\.weight"),
        cast("bfloat16", r"c\.weight"),
        drop(r"b\.weight"),
        rename(r"c\.weight", "b.weight"),
    ]
    after = models.read(convert(source, edits))
    assert_same_tensors(after, {"b.weight": w.half().bfloat16()})


def test_a_cast_before_quantizing_is_rounded_first(convert: Convert, tmp_path: Path) -> None:
    w = models.random_weight(130, 140)
    wide = models.handwritten(tmp_path / "wide.safetensors", {"a.weight": w})
    narrow = models.handwritten(tmp_path / "narrow.safetensors", {"a.weight": w.bfloat16()})
    nf4 = {"op": "quantize.nf4", "modules": "a"}
    ours, theirs = convert(wide, [cast("bfloat16"), nf4]), convert(narrow, [nf4])
    assert_same_tensors(models.read(ours), models.read(theirs))


def test_an_edit_for_a_name_that_is_gone_is_an_error(convert: Convert, tmp_path: Path) -> None:
    source = models.handwritten(tmp_path / "source.safetensors", {"a": torch.zeros(2), "b": torch.ones(3)})
    with pytest.raises(surgery.SpecError, match="`a` matches none of 2 tensors"):
        convert(source, [rename("a", "c"), cast("bfloat16", "a")])
