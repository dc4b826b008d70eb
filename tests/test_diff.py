"""Two checkpoints held against each other: figures against torch's own arithmetic on loaded state dicts."""

import json
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import models
import pytest
import torch
from bitsandbytes.functional import QuantState, dequantize_4bit
from click.testing import CliRunner, Result
from conftest import Convert
from hub import Fault, command, files_of, serving
from safetensors.torch import save_file
from test_memory import APPLY, FOOTPRINT, peak_bytes
from torch import Tensor

import surgery
from surgery.checkpoint.header import encode_header
from surgery.cli import main
from surgery.comparison import TensorDifference
from surgery.comparison.kernel import Difference
from surgery.graph import ERROR_UNIT
from surgery.types import DType, TensorType

MIB = 1 << 20
COMMIT = "c" * 40
NF4 = {"op": "quantize.nf4", "modules": "all-linear"}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return models.llama(tmp_path_factory.mktemp("diff") / "base")


@pytest.fixture(scope="module")
def fine(base: Path) -> Path:
    return models.tuned(base.parent / "fine", base)


def call(*arguments: object) -> Result:
    return CliRunner().invoke(main, ["diff", *map(str, arguments)])


def by_name(a: Path, b: Path, **options: Any) -> dict[str, TensorDifference]:
    return {tensor.name: tensor for tensor in surgery.diff(a, b, **options).tensors}


def pair(home: Path, a: dict[str, Tensor], b: dict[str, Tensor]) -> tuple[Path, Path]:
    home.mkdir(exist_ok=True)
    for name, tensors in (("a", a), ("b", b)):
        save_file({key: value.clone() for key, value in tensors.items()}, home / f"{name}.safetensors")
    return home / "a.safetensors", home / "b.safetensors"


def held_to_torch(found: TensorDifference, a: Tensor, b: Tensor) -> None:
    """The figures against float64 arithmetic on the whole tensors."""
    figures = found.figures
    assert figures is not None
    x, y = a.double().flatten(), b.double().flatten()
    d = y - x
    assert figures.num_elements == a.numel()
    assert figures.num_different == int((x != y).sum())
    assert figures.max_abs == float(d.abs().max())
    assert figures.rms == pytest.approx(float(d.square().mean().sqrt()), rel=1e-12)
    assert figures.relative == pytest.approx(float(d.norm() / x.norm()), rel=1e-12)
    assert figures.cosine == pytest.approx(float(torch.cosine_similarity(x, y, dim=0)), rel=1e-12)
    assert (figures.num_unmatched, found.first_unmatched()) == (0, None)


# Figures


def test_the_figures_are_those_of_torch(base: Path, fine: Path) -> None:
    found = by_name(base, fine)
    before, after = models.read(base), models.read(fine)
    assert list(found) == list(surgery.inspect(base).checkpoint.tensors)
    for name, tensor in found.items():
        assert tensor.action == "change"
        held_to_torch(tensor, before[name], after[name])


def test_a_checkpoint_is_the_same_as_itself_however_it_is_sharded(base: Path, tmp_path: Path) -> None:
    sharded = models.llama(tmp_path / "sharded", max_shard_size="100KB")
    assert len(list(sharded.glob("*.safetensors"))) > 2
    found = surgery.diff(base, sharded)
    assert not found.differs
    assert str(found) == "= 21 tensors the same byte for byte\nDiff: 21 same."
    assert found.summary() == {"change": 0, "add": 0, "drop": 0, "same": 21}


def test_neither_shards_nor_memory_nor_workers_change_a_figure(base: Path, fine: Path, tmp_path: Path) -> None:
    sharded = models.llama(tmp_path / "sharded", max_shard_size="100KB")
    reference = by_name(base, fine)
    for options in ({"workers": 1}, {"memory": "64MiB", "workers": 3}):
        assert by_name(sharded, fine, **options) == reference


@pytest.mark.parametrize("memory", ["64MiB", "2GiB"])
def test_a_tensor_of_many_tiles_is_summed_to_its_end(tmp_path: Path, memory: str) -> None:
    a = models.random_weight(5 * ERROR_UNIT + 77, seed=1)
    b = a.clone()
    b[-1] += 1
    b[3 * ERROR_UNIT] = -7
    found = by_name(*pair(tmp_path, {"w": a}, {"w": b}), memory=memory)["w"]
    held_to_torch(found, a, b)
    assert found.figures and found.figures.num_different == 2


def test_the_kernel_is_its_tiles_together() -> None:
    a, b = (models.random_weight(2 * ERROR_UNIT + 5, seed=seed).view(-1) for seed in (1, 2))
    kernel = Difference(bits_only=False)
    (whole,) = kernel.run(a, b)
    spans = [(start, min(start + ERROR_UNIT, a.numel())) for start in range(0, a.numel(), ERROR_UNIT)]
    rows = [kernel.tile(None, None, (s, e), a[s:e], b[s:e])[0] for s, e in spans]
    assert models.same_bytes(whole, torch.stack([row for row in rows if row is not None]))
    (inferred,) = kernel.infer(*[TensorType(DType.F32, (a.numel(),))] * 2)
    assert inferred.shape == tuple(whole.shape)


FLOATS = [torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2]


@pytest.mark.parametrize("after", FLOATS, ids=str)
@pytest.mark.parametrize("before", FLOATS, ids=str)
def test_between_dtypes_values_are_compared_exactly(tmp_path: Path, before: torch.dtype, after: torch.dtype) -> None:
    w = models.random_weight(64, 48, seed=3).double()
    a, b = w.to(before), w.to(after)
    b[0, 0] = 1.5
    held_to_torch(by_name(*pair(tmp_path, {"w": a}, {"w": b}))["w"], a, b)


def test_a_cast_that_loses_nothing_is_a_change_without_a_difference(tmp_path: Path) -> None:
    w = models.random_weight(8, 8, dtype=torch.bfloat16)
    paths = pair(tmp_path, {"w": w}, {"w": w.float()})
    found = by_name(*paths)["w"]
    assert found.action == "change" and found.figures and found.figures.num_different == 0
    assert "bf16[8, 8] → f32[8, 8]   0 of 64 differ  max 0" in str(surgery.diff(*paths))


def test_integers_are_compared_exactly(tmp_path: Path) -> None:
    top = (1 << 62) + 1
    columns = {
        "i64": (torch.tensor([top, 5, -top]), torch.tensor([top - 1, 5, top]), 2, 2.0 * top),
        "near": (torch.tensor([top, 5]), torch.tensor([top - 3, 5]), 1, 3.0),
        "u8": (torch.tensor([0, 255], dtype=torch.uint8), torch.tensor([255, 255], dtype=torch.uint8), 1, 255.0),
        "bool": (torch.tensor([True, False]), torch.tensor([True, True]), 1, 1.0),
        "wide": (torch.tensor([7], dtype=torch.int32), torch.tensor([9], dtype=torch.int64), 1, 2.0),
        "u16": (torch.tensor([7, 65535]).to(torch.uint16), torch.tensor([7, 1]).to(torch.uint16), 1, 65534.0),
        "u32": (torch.tensor([7, 1 << 31]).to(torch.uint32), torch.tensor([7, 1]).to(torch.uint32), 1, 2147483647.0),
        "u64": (torch.tensor([-1, 3]).view(torch.uint64), torch.tensor([0, 3]).view(torch.uint64), 1, 2.0**64),
    }
    paths = pair(tmp_path, {k: v[0] for k, v in columns.items()}, {k: v[1] for k, v in columns.items()})
    for name, tensor in by_name(*paths).items():
        assert tensor.figures and (tensor.figures.num_different, tensor.figures.max_abs) == columns[name][2:], name


def test_complex_numbers_are_compared_by_their_bits(tmp_path: Path) -> None:
    a = torch.tensor([1 + 2j, 3 - 1j, 0j])
    b = torch.tensor([1 + 2j, 3 + 1j, 0j])
    paths = pair(tmp_path, {"c": a, "d": a, "e": a}, {"c": a, "d": b, "e": b.real.clone()})
    found = by_name(*paths)
    assert found["c"].action == "same" and found["e"].figures is None
    assert found["d"].to_json()["figures"] == {"elements": 3, "different": 1}
    assert "c64[3]            1 of 3 differ\n" in str(surgery.diff(*paths))


@pytest.mark.parametrize("dtype", [DType.F4, DType.F6_E2M3, DType.F8_E8M0], ids=str)
def test_dtypes_that_torch_cannot_compute_with_are_compared(tmp_path: Path, dtype: DType) -> None:
    type_ = TensorType(dtype, (4, 8))
    header = encode_header({"w": (type_, 0)}, {})
    raw = bytes([120] * type_.num_bytes)
    for name, data in (("a", raw), ("b", raw[:-1] + b"\x79")):
        (tmp_path / f"{name}.safetensors").write_bytes(header + data)
    found = by_name(tmp_path / "a.safetensors", tmp_path / "b.safetensors")["w"]
    assert found.figures and found.figures.num_different == 1
    assert not surgery.diff(tmp_path / "a.safetensors", tmp_path / "a.safetensors").differs


# NaN and infinities


def test_what_is_not_finite_in_both_alike_is_no_difference(tmp_path: Path) -> None:
    a = torch.tensor([[math.nan, 1.0], [math.inf, -math.inf], [2.0, 3.0]])
    assert not surgery.diff(*pair(tmp_path, {"w": a}, {"w": a})).differs
    b = a.clone()
    b[2, 1] = 3.5
    found = by_name(*pair(tmp_path, {"w": a}, {"w": b}))["w"]
    assert found.figures and (found.figures.num_different, found.figures.num_unmatched) == (1, 0)
    assert (found.figures.max_abs, found.figures.squares) == (0.5, 0.25)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_what_is_not_finite_in_one_alone_is_named(tmp_path: Path, dtype: torch.dtype) -> None:
    a = torch.ones(3, ERROR_UNIT)
    b = a.to(dtype) * 2
    a[0, 5], b[0, 5] = math.nan, math.nan
    b[2, 7] = math.nan
    a[2, 9], b[2, 9] = math.inf, -math.inf
    paths = pair(tmp_path, {"w": a}, {"w": b})
    found = by_name(*paths)["w"]
    assert found.figures and (found.figures.num_unmatched, found.first_unmatched()) == (2, [2, 7])
    assert found.figures.num_different == a.numel() - 1
    assert (found.figures.max_abs, found.figures.relative) == (1.0, 1.0)
    note = "note: w has 2 elements that are NaN or infinite, and not the same in both, the first at [2, 7]"
    assert note in str(surgery.diff(*paths)).splitlines()
    assert json.loads(call(*paths, "--json").stdout)["tensors"][0]["first_not_finite"] == [2, 7]


def test_many_tensors_with_nan_are_counted(tmp_path: Path) -> None:
    a = {f"w{number:02d}": torch.tensor(math.nan) for number in range(30)}
    shown = str(surgery.diff(*pair(tmp_path, a, {name: torch.tensor(1.0) for name in a})))
    assert "note: w23 has 1 element that is NaN" in shown and "w24 has" not in shown
    assert "note: so have 6 tensors more\n" in shown


def test_another_zero_or_nan_is_a_change_of_bits_alone(tmp_path: Path) -> None:
    a = torch.tensor([0.0, 1.0, math.nan])
    b = torch.tensor([-0.0, 1.0, 0.0])
    b.view(torch.int32)[2] = a.view(torch.int32)[2] + 1
    found = by_name(*pair(tmp_path, {"w": a}, {"w": b}))["w"]
    assert found.action == "change" and found.figures
    assert (found.figures.num_different, found.figures.max_abs, found.figures.num_unmatched) == (2, 0.0, 0)


def test_squares_that_overflow_are_null_in_json(tmp_path: Path) -> None:
    a, b = torch.tensor([1e200, 1.0], dtype=torch.float64), torch.ones(2, dtype=torch.float64)
    paths = pair(tmp_path, {"w": a}, {"w": b})
    (entry,) = json.loads(call(*paths, "--json").stdout)["tensors"]
    assert entry["figures"]["max"] == 1e200 and entry["figures"]["rms"] is None and entry["figures"]["not_finite"] == 0
    assert call(*paths).exit_code == 0


def test_zeros_and_nothing_have_figures_too(tmp_path: Path) -> None:
    zero, one, empty = torch.zeros(4), torch.ones(4), torch.zeros(0, 3)
    paths = pair(
        tmp_path, {"w": zero, "e": empty, "s": torch.tensor(2.0)}, {"w": one, "e": empty, "s": torch.tensor(3.0)}
    )
    found = by_name(*paths)
    assert found["e"].action == "same" and found["s"].first_unmatched() is None
    assert found["w"].figures and (found["w"].figures.relative, found["w"].figures.cosine) == (None, None)
    assert "4 of 4 differ  max 1  RMS 1\n" in str(surgery.diff(*paths))
    nothing = pair(tmp_path / "nothing", {"e": empty}, {"e": empty.half()})
    assert str(surgery.diff(*nothing)).startswith("~ e   ×1   f32[0, 3] → f16[0, 3]")


# What is in one alone, or of another shape


def test_added_dropped_and_reshaped_tensors_are_told_apart(tmp_path: Path) -> None:
    w = torch.ones(4, 4)
    paths = pair(
        tmp_path,
        {"kept": w, "layers.0.old": w, "layers.1.old": w, "shape": w},
        {"kept": w, "new": w.half(), "shape": torch.ones(5, 4)},
    )
    assert str(surgery.diff(*paths)).splitlines() == [
        "~ shape               ×1   f32[4, 4] → f32[5, 4]",
        "+ new                 ×1   f16[4, 4]",
        "- layers.{0..1}.old   ×2   f32[4, 4]",
        "= 1 tensor the same byte for byte",
        "Diff: 1 changed, 1 added, 2 dropped, 1 same.",
    ]
    assert json.loads(call(*paths, "--json").stdout) == surgery.diff(*paths).to_json()


def test_checkpoints_without_a_common_name_are_compared(tmp_path: Path) -> None:
    w = torch.ones(2)
    assert surgery.diff(*pair(tmp_path, {"a": w}, {"b": w})).summary() == {"change": 0, "add": 1, "drop": 1, "same": 0}


def test_layers_fold_with_the_figures_of_all(base: Path, fine: Path) -> None:
    line = next(line for line in str(surgery.diff(base, fine)).splitlines() if "q_proj" in line)
    found = [tensor.figures for name, tensor in by_name(base, fine).items() if "q_proj" in name]
    assert "model.layers.{0..1}.self_attn.q_proj.weight" in line and "×2" in line
    largest = max(figures.max_abs for figures in found if figures)
    assert f"max {largest:.3g}" in line
    mean = sum(figures.squares for figures in found if figures) / sum(f.num_elements for f in found if f)
    assert f"RMS {math.sqrt(mean):.3g} " in line


# 4-bit weights


@pytest.mark.parametrize("make", [models.llama, models.gpt2], ids=["llama", "gpt2"])
@pytest.mark.parametrize("op", ["nf4", "fp4"])
def test_a_quantized_weight_is_what_bitsandbytes_makes_of_it(
    tmp_path: Path, convert: Convert, make: Any, op: str
) -> None:
    base = make(tmp_path / "base")
    out = convert(base, [{"op": f"quantize.{op}", "modules": "all-linear"}])
    before, stored = models.read(base), models.read(out)
    found = by_name(base, out)
    assert set(found) == set(before)
    changed = {name: tensor for name, tensor in found.items() if tensor.action != "same"}
    assert changed and all(f"{name}.absmax" in stored for name in changed)
    for name, tensor in changed.items():
        parts = {key: value for key, value in stored.items() if key.startswith(f"{name}.")}
        state = QuantState.from_dict(parts, device=torch.device("cpu"))
        weight = dequantize_4bit(stored[name], state)
        held_to_torch(tensor, before[name], weight.t() if make is models.gpt2 else weight)
        assert tensor.after and tensor.after.format == op


def test_the_error_is_the_one_in_the_manifest(base: Path, convert: Convert) -> None:
    out = convert(base, [NF4])
    noted = json.loads((out / "surgery-manifest.json").read_text())["tensors"]
    for name, tensor in by_name(base, out).items():
        if tensor.action == "change":
            assert tensor.figures and tensor.figures.max_abs == noted[name]["error"]["max"]
            assert tensor.figures.rms == pytest.approx(noted[name]["error"]["rms"], rel=1e-6)


def test_two_quantized_checkpoints_are_the_same_if_their_parts_are(base: Path, convert: Convert) -> None:
    out, coarse = convert(base, [NF4]), convert(base, [{**NF4, "block_size": 128}])
    assert not surgery.diff(out, convert(base, [NF4])).differs
    found = surgery.diff(out, coarse)
    assert found.summary() == {"change": 14, "add": 0, "drop": 0, "same": 7}
    assert "nf4[128, 128] (4.127 bits) → nf4 (4.064 bits)" in str(found)


def test_a_part_with_other_bytes_is_a_change_though_a_loader_sees_none(base: Path, convert: Convert) -> None:
    out = convert(base, [{**NF4, "double_quant": False}])
    other = out.parent / "other"
    other.mkdir()
    tensors = models.read(out)
    name = next(name for name in tensors if name.endswith(".quant_state.bitsandbytes__nf4"))
    record = json.loads(bytes(tensors[name].tolist()))
    text = json.dumps(dict(reversed(record.items()))).encode().ljust(tensors[name].numel())
    tensors[name] = torch.tensor(list(text), dtype=torch.uint8)
    save_file(tensors, other / "model.safetensors")
    (changed,) = (tensor for tensor in surgery.diff(out, other).tensors if tensor.action != "same")
    assert name.startswith(changed.name) and changed.figures and changed.figures.num_different == 0


def test_a_4_bit_weight_that_is_incomplete_is_refused_with_its_place(base: Path, convert: Convert) -> None:
    out = convert(base, [NF4])
    tensors = models.read(out)
    name = next(name for name in tensors if name.endswith(".absmax"))
    path = out.parent / "torn.safetensors"
    save_file({key: value for key, value in tensors.items() if key != name}, path)
    run = call(base, path)
    assert run.exit_code == 1 and f"lacks `{name}`" in run.stderr and "  at   sha256:" in run.stderr


# Configs


def test_configs_are_compared_key_by_key(base: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    other.mkdir()
    (other / "model.safetensors").write_bytes((base / "model.safetensors").read_bytes())
    config = json.loads((base / "config.json").read_text())
    changed = {**config, "use_cache": not config["use_cache"], "zz\x1b[2J": "\x1b[2J\u202e" + "x" * 99}
    del changed["vocab_size"]
    (other / "config.json").write_text(json.dumps(changed))
    found = surgery.diff(base, other)
    assert found.differs and found.summary()["same"] == 21
    lines = str(found).splitlines()
    assert f"- config.json: vocab_size  {config['vocab_size']}" in lines
    assert "~ config.json: use_cache  true → false" in lines or "~ config.json: use_cache  false → true" in lines
    assert '+ config.json: zz\\x1b[2J  "\\u001b[2J\\u202exxx' in "\n".join(lines)
    assert "\x1b" not in str(found) and "\u202e" not in str(found)
    assert lines[-1] == "Diff: 21 same, 3 in config.json."
    assert {entry["key"] for entry in json.loads(call(base, other, "--json").stdout)["config"]} == {
        "vocab_size",
        "use_cache",
        "zz\x1b[2J",
    }


def test_nested_keys_are_dotted_and_many_are_counted(base: Path, tmp_path: Path) -> None:
    for name, value in (("a", 1), ("b", 2)):
        models.handwritten(tmp_path / name / "model.safetensors", {"w": torch.ones(2)})
        content = {"rope": {"inner": {"theta": value}}, **{f"key{n}": value for n in range(30)}}
        (tmp_path / name / "config.json").write_text(json.dumps(content))
    shown = str(surgery.diff(tmp_path / "a", tmp_path / "b"))
    assert "~ config.json: rope.inner.theta  1 → 2\n" in shown and "~ config.json: 7 keys more\n" in shown


def test_a_lone_file_has_no_config_to_be_compared(base: Path) -> None:
    found = surgery.diff(base, base / "model.safetensors")
    assert not found.differs and "note: B has no config: configs are not compared" in str(found)


# Adapters


def test_adapters_are_compared_with_their_configs(base: Path, tmp_path: Path) -> None:
    a = models.lora(tmp_path / "a", base)
    b = models.lora(tmp_path / "b", base, seed=1)
    config = json.loads((b / "adapter_config.json").read_text())
    (b / "adapter_config.json").write_text(json.dumps({**config, "lora_alpha": 99}))
    found = surgery.diff(a, b)
    assert found.summary()["change"] == len(models.read(a))
    assert "~ adapter_config.json: lora_alpha  8 → 99" in str(found)
    before, after = models.read(a), models.read(b)
    for tensor in found.tensors:
        held_to_torch(tensor, before[tensor.name], after[tensor.name])


def test_an_adapter_beside_a_checkpoint_shares_nothing_with_it(base: Path, tmp_path: Path) -> None:
    found = surgery.diff(base, models.lora(tmp_path / "a", base))
    assert found.summary()["same"] == found.summary()["change"] == 0
    assert "note: B is an adapter, the other is none" in str(found)


# The command


def test_it_exits_with_0_unless_asked_otherwise(base: Path, fine: Path) -> None:
    assert call(base, fine).exit_code == 0
    assert call(base, fine, "--exit-code").exit_code == 1
    assert call(base, base, "--exit-code").exit_code == 0
    run = call(base, fine.parent / "absent")
    assert run.exit_code == 1 and run.stdout == "" and "absent" in run.stderr


def test_the_command_prints_what_python_prints(base: Path, fine: Path) -> None:
    assert call(base, fine).stdout == f"{surgery.diff(base, fine)}\n"


def test_progress_counts_every_byte_that_is_compared(base: Path, fine: Path) -> None:
    seen: list[tuple[int, int]] = []
    surgery.diff(base, fine, report=lambda done, total: seen.append((done, total)))
    done, total = seen[-1]
    assert done == total == sum(tensor.numel() * 2 for tensor in models.read(base).values()) * 2
    assert [entry[0] for entry in seen] == sorted(entry[0] for entry in seen)


def test_no_name_in_a_file_reaches_a_terminal_as_it_is(tmp_path: Path) -> None:
    header = json.dumps({"w\x1b[2J": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}).encode()
    path = tmp_path / "hostile.safetensors"
    path.write_bytes(len(header).to_bytes(8, "little") + header + bytes(4))
    run = call(path, path)
    assert run.exit_code == 1 and "\x1b" not in run.stdout + run.stderr


# The Hub


def test_two_repositories_are_read_range_by_range(base: Path, fine: Path, tmp_path: Path) -> None:
    with serving("org/base", {"main": COMMIT}, {COMMIT: files_of(base)}) as hub:
        hub.more = {"org/fine": {"d" * 40: files_of(fine)}}
        run = command(tmp_path, hub, "diff", "org/base", "org/fine", "--json")
        assert run.returncode == 0, run.stderr
        reference = surgery.diff(base, fine).to_json()
        names = {"a": f"org/base@{COMMIT}", "b": f"org/fine@{'d' * 40}"}
        assert json.loads(run.stdout) == {**reference, **names}
        weights = sum((path / "model.safetensors").stat().st_size for path in (base, fine))
        sent = sum(stop - start for spans in hub.served.by_path.values() for start, stop in spans)
        assert weights <= sent < 1.5 * weights
    assert not list((tmp_path / "cache").rglob("*.safetensors"))


def test_a_quantized_repository_is_held_against_the_local_one(base: Path, tmp_path: Path, convert: Convert) -> None:
    out = convert(base, [NF4])
    with serving("org/small", {"main": COMMIT}, {COMMIT: files_of(out)}) as hub:
        for other, summary in ((base, {"change": 14, "same": 7}), (out, {"change": 0, "same": 21})):
            run = command(tmp_path, hub, "diff", str(other), "org/small", "--json")
            assert json.loads(run.stdout)["summary"] == {"add": 0, "drop": 0, **summary}, run.stderr


def test_a_hub_that_fails_is_named(base: Path, tmp_path: Path) -> None:
    with serving("org/base", {"main": COMMIT}, {COMMIT: files_of(base)}) as hub:
        hub.faults = [Fault("no_ranges", r"safetensors", times=-1)]
        run = command(tmp_path, hub, "diff", str(base), "org/base")
        assert run.returncode == 1 and "Traceback" not in run.stderr and "  fix  " in run.stderr


# Bounds


def test_two_tensors_of_512_mebibytes_are_compared_in_64(tmp_path: Path) -> None:
    type_ = TensorType(DType.BF16, (16384, 16384))
    header = encode_header({"w": (type_, 0)}, {"format": "pt"})
    for name in ("a", "b"):
        with (tmp_path / f"{name}.safetensors").open("wb") as file:
            file.write(header + b"".join(os.urandom(1) + b"\x3c" for _ in range(4096)) * 1024)
            file.truncate(len(header) + type_.num_bytes)
    paths = [str(tmp_path / f"{name}.safetensors") for name in ("a", "b")]
    peak = peak_bytes(APPLY, "diff", *paths, "--memory", "64MiB", "--workers", "2")
    assert peak < peak_bytes(FOOTPRINT) + 64 * MIB


def test_too_little_memory_is_refused_with_what_would_do(base: Path, fine: Path) -> None:
    run = call(base, fine, "--memory", "1MiB")
    assert run.exit_code == 1 and "give --memory" in run.stderr


def test_to_import_surgery_is_still_to_import_no_torch() -> None:
    code = "import sys, surgery, surgery.comparison; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
