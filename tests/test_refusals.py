"""What would be computed wrong, or never end, is refused with a reason: numbers, adapters and tensors that mislead."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import surgery

WEIGHT = {"weight": 1.0}


def checkpoint(path: Path, tensors: dict[str, Tensor], **config: Any) -> str:
    path.mkdir()
    save_file(tensors, path / "model.safetensors")
    (path / "config.json").write_text(json.dumps({"model_type": "llama", **config}))
    return str(path)


def adapter(path: Path, tensors: dict[str, Tensor], **config: Any) -> str:
    path.mkdir()
    named = {f"base_model.model.{name}": tensor for name, tensor in tensors.items()}
    save_file(named, path / "adapter_model.safetensors")
    fields = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["q_proj"], **config}
    (path / "adapter_config.json").write_text(json.dumps(fields))
    return str(path)


def lora(rank: int = 2) -> dict[str, Tensor]:
    return {
        "layers.0.q_proj.lora_A.weight": torch.randn(rank, 8),
        "layers.0.q_proj.lora_B.weight": torch.randn(8, rank),
    }


def plan(source: str, edit: dict[str, Any], **models: str) -> Any:
    return surgery.plan({"version": 1, "source": source, "models": models, "edits": [edit]})


@pytest.fixture
def base(tmp_path: Path) -> str:
    return checkpoint(tmp_path / "base", {"layers.0.q_proj.weight": torch.randn(8, 8)})


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 10**400], ids=["nan", "inf", "huge"])
@pytest.mark.parametrize(
    "edit",
    [
        {"op": "merge.linear", "models": {"m": {"weight": None}}},
        {"op": "merge.slerp", "models": "m", "t": [0, None]},
        {"op": "adapter.fold", "models": {"m": {"weight": None}}},
        {"op": "layers.select", "slices": [{"model": "m", "layers": [0, 1], "scale": {".*": None}}]},
    ],
    ids=lambda edit: edit["op"],
)
def test_a_number_that_nothing_can_be_computed_with_is_refused(edit: dict[str, Any], value: Any, base: str) -> None:
    def filled(item: Any) -> Any:
        if isinstance(item, dict):
            return {key: filled(each) for key, each in item.items()}
        return [filled(each) for each in item] if isinstance(item, list) else value if item is None else item

    with pytest.raises(surgery.SpecError, match="no number to compute with"):
        plan(base, filled(edit), m=base)


@pytest.mark.parametrize(("name", "value"), [("density", 1.5), ("density", -0.1), ("gamma", 2)])
def test_a_share_beyond_its_range_is_refused(name: str, value: float, base: str) -> None:
    edit = {"op": "merge.breadcrumbs", "models": {"m": {**WEIGHT, name: value}}}
    with pytest.raises(surgery.OpError, match="from 0 to 1"):
        plan(base, edit, m=base)


def test_weights_that_add_up_to_nothing_cannot_be_divided_by(base: str) -> None:
    models = {"source": {"weight": 1}, "m": {"weight": -1}}
    with pytest.raises(surgery.OpError, match="add up to 0"):
        plan(base, {"op": "merge.linear", "models": models}, m=base)
    plan(base, {"op": "merge.linear", "models": models, "normalize": False}, m=base)


def test_a_merge_without_the_source_still_fits_the_source(tmp_path: Path, base: str) -> None:
    narrow = checkpoint(tmp_path / "narrow", {"layers.0.q_proj.weight": torch.randn(4, 8)})
    with pytest.raises(surgery.OpError, match=r"unlike shapes: \[8, 8\] in `source`, \[4, 8\] in `m`"):
        plan(base, {"op": "merge.linear", "models": {"m": WEIGHT}}, m=narrow)


def test_what_is_no_float_is_never_exchanged(tmp_path: Path) -> None:
    source = checkpoint(tmp_path / "source", {"ids": torch.arange(5)})
    other = checkpoint(tmp_path / "other", {"ids": torch.arange(1, 6)})
    with pytest.raises(surgery.OpError, match="differs between the models"):
        surgery.apply(plan(source, {"op": "merge.linear", "models": {"m": WEIGHT}}, m=other), tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("op", ["merge.ties", "merge.breadcrumbs"])
@pytest.mark.parametrize("rows", [3, 600])
def test_a_nan_cannot_be_ranked(op: str, rows: int, tmp_path: Path) -> None:
    source = checkpoint(tmp_path / "source", {"x.weight": torch.randn(rows, 700)})
    damaged = torch.randn(rows, 700)
    damaged[1, 2] = torch.nan
    other = checkpoint(tmp_path / "other", {"x.weight": damaged})
    made = plan(source, {"op": op, "models": {"m": {**WEIGHT, "density": 0.3}}}, m=other)
    with pytest.raises(surgery.OpError, match=r"`x\.weight`.* NaN"):
        surgery.apply(made, tmp_path / "out")


def test_an_error_in_a_first_pass_ends_the_run_under_little_memory(tmp_path: Path) -> None:
    """What the failed span had read must not be waited for."""
    damaged = torch.randn(3000, 3001)
    damaged[5, 7] = torch.nan
    source = checkpoint(tmp_path / "source", {"x.weight": damaged})
    models = {name: checkpoint(tmp_path / name, {"x.weight": torch.randn(3000, 3001)}) for name in "ab"}
    edits = [{"op": "merge.model_stock", "models": ["a", "b"]}, {"op": "quantize.nf4", "modules": ".*"}]
    made = surgery.plan({"version": 1, "source": source, "models": models, "edits": edits})
    with pytest.raises(surgery.OpError, match="NaN"):
        surgery.apply(made, tmp_path / "out", memory=made.cost.min_memory, workers=2)


@pytest.mark.parametrize("init", ["pissa", "pissa_niter_4", "olora"])
@pytest.mark.parametrize("op", ["adapter.fold", "merge.linear"])
def test_an_adapter_of_a_changed_base_is_refused(op: str, init: str, tmp_path: Path, base: str) -> None:
    made = adapter(tmp_path / "adapter", lora(), init_lora_weights=init)
    with pytest.raises(surgery.OpError, match="belongs to a base that its initialisation has changed"):
        plan(base, {"op": op, "models": {"m": WEIGHT}}, m=made)


@pytest.mark.parametrize(
    "config",
    [
        {"r": 0},
        {"r": 10**400},
        {"lora_alpha": 10**400},
        {"alpha_pattern": {"q_proj": float("nan")}},
        {"rank_pattern": {"q_proj": float("inf")}},
        {"target_modules": "a{99999999999999}"},
        {"target_modules": "(" * 5000 + ")" * 5000},
    ],
    ids=["r-0", "r-huge", "alpha-huge", "alpha-nan", "rank-inf", "regex-count", "regex-depth"],
)
def test_a_config_that_misleads_is_refused(config: dict[str, Any], tmp_path: Path, base: str) -> None:
    made = adapter(tmp_path / "adapter", lora(), **config)
    with pytest.raises(surgery.SurgeryError, match="adapter's config"):
        plan(base, {"op": "adapter.fold", "models": "m"}, m=made)


def test_both_sides_of_a_tied_pair_cannot_be_stored_in_one(tmp_path: Path) -> None:
    tied = checkpoint(tmp_path / "tied", {"model.embed_tokens.weight": torch.randn(6, 8)}, tie_word_embeddings=True)
    tensors = {"model.embed_tokens.weight": torch.randn(6, 8), "lm_head.weight": torch.randn(6, 8)}
    made = adapter(tmp_path / "adapter", tensors, modules_to_save=["embed_tokens", "lm_head"], target_modules=[])
    with pytest.raises(surgery.OpError, match="one would be lost"):
        plan(tied, {"op": "adapter.fold", "models": "m", "tied": "both"}, m=made)
    assert {
        tensor.name for tensor in plan(tied, {"op": "adapter.fold", "models": "m", "tied": "untie"}, m=made).tensors
    }


def test_a_range_of_layers_that_no_model_has_is_refused_at_once(base: str) -> None:
    with pytest.raises(surgery.SpecError, match="no model has"):
        plan(base, {"op": "layers.select", "slices": [{"layers": [0, 10**9]}]})


def test_an_adapter_is_not_quantized(tmp_path: Path) -> None:
    made = adapter(tmp_path / "adapter", lora())
    with pytest.raises(surgery.OpError, match="belongs to an adapter"):
        plan(made, {"op": "quantize.nf4", "modules": "all-linear"})


def test_a_config_of_mergekit_is_told_from_a_spec(tmp_path: Path) -> None:
    (tmp_path / "merge.yml").write_text("merge_method: linear\nmodels:\n  - model: org/a\n")
    with pytest.raises(surgery.SpecError, match="import-mergekit"):
        surgery.load(tmp_path / "merge.yml")


def test_a_spec_is_planned_before_it_is_applied(base: str, tmp_path: Path) -> None:
    spec: Any = surgery.load(
        {"version": 1, "source": base, "edits": [{"op": "tensor.cast", "tensors": ".*", "dtype": "bfloat16"}]}
    )
    with pytest.raises(TypeError, match="a Plan is applied"):
        surgery.apply(spec, tmp_path / "out")


def test_a_plan_names_the_model_that_a_tensor_is_copied_from(tmp_path: Path) -> None:
    layers = {f"model.layers.{index}.q_proj.weight": torch.randn(8, 8) for index in range(2)}
    source, other = (checkpoint(tmp_path / name, layers, num_hidden_layers=2) for name in ("source", "other"))
    made = plan(
        source, {"op": "layers.select", "slices": [{"layers": [0, 1]}, {"model": "m", "layers": [1, 2]}]}, m=other
    )
    assert "model.layers.1.q_proj.weight" in str(made) and "← m" in str(made)
    assert made.summary()["change"] == 1


def test_an_adapter_extracted_for_other_weights_is_refused_when_they_are_known(tmp_path: Path) -> None:
    names = ("base", "tuned", "other")
    paths = {name: checkpoint(tmp_path / name, {"layers.0.q_proj.weight": torch.randn(16, 8)}) for name in names}
    edit = {"op": "adapter.extract", "modules": "all-linear", "models": "tuned", "rank": 4}
    surgery.apply(plan(paths["base"], edit, tuned=paths["tuned"]), tmp_path / "adapter")
    for fold in ({"op": "adapter.fold", "models": "m"}, {"op": "merge.linear", "models": {"m": WEIGHT}}):
        models = {"m": str(tmp_path / "adapter")}
        with pytest.raises(surgery.OpError, match="was extracted for other weights"):
            surgery.apply(plan(paths["other"], fold, **models), tmp_path / "out")
        assert not (tmp_path / "out").exists()
        surgery.apply(plan(paths["other"], {**fold, "any_base": True}, **models), tmp_path / "out", overwrite=True)
        surgery.apply(plan(paths["base"], fold, **models), tmp_path / "out", overwrite=True)
        (tmp_path / "out").rename(tmp_path / fold["op"])


def test_a_vocabulary_that_ends_tiles_before_the_other_is_padded(tmp_path: Path) -> None:
    name, rows = "model.embed_tokens.weight", {"source": 1500, "other": 4000}
    weights = {model: torch.randn(count, 512) for model, count in rows.items()}
    paths = {model: checkpoint(tmp_path / model, {name: x}, vocab_size=rows[model]) for model, x in weights.items()}
    edit = {"op": "merge.linear", "models": {"source": WEIGHT, "m": WEIGHT}, "pad_vocab": True}
    made = plan(paths["source"], edit, m=paths["other"])
    surgery.apply(made, tmp_path / "out", memory=made.cost.min_memory)
    expected = (torch.cat([weights["source"], weights["other"][1500:]]) + weights["other"]) / 2
    assert torch.equal(load_file(tmp_path / "out" / "model.safetensors")[name], expected)
    assert json.loads((tmp_path / "out" / "config.json").read_text())["vocab_size"] == 4000
