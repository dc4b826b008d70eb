"""mergekit configs as specs: the examples of its own manual, and what it lets pass in silence."""

from pathlib import Path
from typing import Any

import pytest
import yaml

import surgery
from surgery.importing import from_mergekit
from surgery.importing.methods import METHODS
from surgery.op import find_op, op_names, options_of
from surgery.spec.document import read_document

CAST: list[dict[str, Any]] = [{"op": "tensor.cast", "tensors": ".*", "dtype": "float16"}]


def imported(tmp_path: Path, config: str) -> tuple[dict[str, Any], str]:
    file = tmp_path / "mergekit.yml"
    file.write_text(config)
    text = from_mergekit(read_document(file))
    spec = tmp_path / "spec.yaml"
    spec.write_text(text)
    return yaml.safe_load(text), text


def edits(tmp_path: Path, config: str) -> list[dict[str, Any]]:
    return imported(tmp_path, config)[0]["edits"]


def problems(tmp_path: Path, config: str) -> str:
    with pytest.raises(surgery.SpecError) as caught:
        imported(tmp_path, config)
    return str(caught.value).replace(str(tmp_path), "")


def two(method: str, extra: str = "", *, base: str = "base_model: org/base", own: str = "") -> str:
    parameters = f", parameters: {{{own}}}" if own else ""
    models = f"models: [{{model: org/a{parameters}}}, {{model: org/b{parameters}}}]"
    return f"{models}\nmerge_method: {method}\n{base}\n{extra}\n"


# The examples of its manual

TIES = """
models:
  - model: org/base
  - model: org/Orca_Mini-v3
    parameters:
      density: [1, 0.7, 0.1]
      weight: 1.0
  - model: org/platypus2@main
    parameters:
      density: 0.5
      weight: [0, 0.3, 0.7, 1]
  - model: ./wizard-math
    parameters:
      density: 0.33
      weight:
        - filter: mlp
          value: 0.5
        - value: 0
merge_method: ties
base_model: org/base
parameters:
  normalize: true
  int8_mask: true
dtype: float16
"""

SLERP = """
slices:
  - sources:
      - model: org/orca
        layer_range: [0, 40]
      - model: org/platypus
        layer_range: [0, 40]
merge_method: slerp
base_model: org/orca
parameters:
  t:
    - filter: self_attn
      value: [0, 0.5, 0.3, 0.7, 1]
    - filter: mlp
      value: [1, 0.5, 0.7, 0.3, 0]
    - value: 0.5
dtype: float16
"""

FRANKEN = """
slices:
  - sources:
    - model: org/orca
      layer_range: [0, 24]
  - sources:
    - model: org/platypus
      layer_range: [20, 40]
      parameters:
        scale: [{filter: o_proj, value: 0.0}, {filter: down_proj, value: 0.0}, {value: 1.0}]
merge_method: passthrough
dtype: float16
"""


def test_ties_with_gradients_and_filters(tmp_path: Path) -> None:
    spec, text = imported(tmp_path, TIES)
    assert text.startswith("# From mergekit.yml, a config of mergekit.\n# note: `int8_mask` has no effect on `ties`")
    assert spec == {
        "version": 1,
        "source": "org/base",
        "models": {
            "orca_mini-v3": "org/Orca_Mini-v3",
            "platypus2": "org/platypus2@main",
            "wizard-math": "./wizard-math",
        },
        "edits": [
            {
                "op": "merge.ties",
                "models": {
                    "orca_mini-v3": {"weight": 1, "density": [1, 0.7, 0.1]},
                    "platypus2": {"weight": [0, 0.3, 0.7, 1], "density": 0.5},
                    "wizard-math": {"weight": {".*mlp.*": 0.5, ".*": 0}, "density": 0.33},
                },
                "normalize": True,
                "compute_dtype": "source",
            },
            *CAST,
        ],
    }


def test_slerp_over_one_slice_is_a_merge_of_the_whole(tmp_path: Path) -> None:
    spec, text = imported(tmp_path, SLERP)
    assert "# note: layers 0 to 39 are taken to be all the layers of the models\n" in text
    assert (spec["source"], spec["models"]) == ("org/orca", {"platypus": "org/platypus"})
    t = {".*self_attn.*": [0, 0.5, 0.3, 0.7, 1], ".*mlp.*": [1, 0.5, 0.7, 0.3, 0], ".*": 0.5}
    edit = {"op": "merge.slerp", "models": {"platypus": {}}, "t": t, "compute_dtype": "source"}
    assert spec["edits"] == [edit, *CAST]


def test_a_frankenmerge_selects_layers(tmp_path: Path) -> None:
    spec, _ = imported(tmp_path, FRANKEN)
    scale = {".*o_proj.*": 0, ".*down_proj.*": 0}
    slices = [{"layers": [0, 24]}, {"model": "platypus", "layers": [20, 40], "scale": scale}]
    assert spec["edits"] == [{"op": "layers.select", "slices": slices, "head": "platypus"}, *CAST]
    assert (spec["source"], spec["models"]) == ("org/orca", {"platypus": "org/platypus"})


def test_linear_counts_its_source_among_the_models(tmp_path: Path) -> None:
    linear = two("linear", base="", own="weight: 0.5")
    models = {"source": {"weight": 0.5}, "b": {"weight": 0.5}}
    assert edits(tmp_path, linear) == [{"op": "merge.linear", "models": models, "compute_dtype": "source"}]


def test_a_base_that_is_not_listed_counts_last(tmp_path: Path) -> None:
    (edit,) = edits(tmp_path, two("linear", "parameters: {weight: 0.2, normalize: false}"))
    assert list(edit["models"]) == ["a", "b", "source"]
    assert edit["models"]["source"] == {"weight": 0.2} and edit["normalize"] is False
    assert list(edits(tmp_path, two("karcher"))[0]["models"]) == ["a", "b", "source"]


def test_a_base_of_nuslerp_is_apart_and_without_one_both_are_models(tmp_path: Path) -> None:
    assert list(edits(tmp_path, two("nuslerp", own="weight: 1"))[0]["models"]) == ["a", "b"]
    assert list(edits(tmp_path, two("nuslerp", own="weight: 1", base=""))[0]["models"]) == ["source", "b"]


def test_loras_are_operands(tmp_path: Path) -> None:
    config = """
    models:
      - {model: org/base+org/one, parameters: {weight: 0.5}}
      - {model: {model: org/base, lora: {path: ./two, revision: v1}}, parameters: {weight: 0.5}}
    merge_method: task_arithmetic
    base_model: org/base
    dtype: float32
    out_dtype: float16
    """
    spec, _ = imported(tmp_path, config)
    assert spec["models"] == {"one": "org/one", "two": "./two@v1"}
    models = {"one": {"weight": 0.5}, "two": {"weight": 0.5}}
    edit = {"op": "merge.task_arithmetic", "models": models, "compute_dtype": "float32"}
    assert spec["edits"] == [edit, *CAST]


def test_a_lone_lora_is_folded_and_a_lone_model_copied(tmp_path: Path) -> None:
    fold = "models: [{model: org/base+org/one}]\nmerge_method: passthrough\n"
    models = {"one": {"weight": 1}}
    edit = {"op": "merge.linear", "models": models, "normalize": False, "compute_dtype": "source"}
    assert edits(tmp_path, fold) == [edit]
    assert edits(tmp_path, "models: [{model: org/base}]\nmerge_method: passthrough\n") == []


def test_float32_is_written_unless_another_dtype_is_asked_for(tmp_path: Path) -> None:
    first, edit = edits(tmp_path, two("model_stock", "dtype: torch.float32\nparameters: {filter_wise: true}"))
    assert first == {"op": "tensor.cast", "tensors": ".*", "dtype": "float32"}
    assert edit["compute_dtype"] == "float32" and edit["mixed_dtypes"] is True and edit["filter_wise"] is True


def test_filters_fall_through_to_the_level_above_and_to_the_default(tmp_path: Path) -> None:
    own = "weight: [{filter: mlp, value: 0.1}, {filter: mlp.down, value: 9}], density: [{filter: mlp, value: 0.5}]"
    extra = "parameters: {weight: [{filter: down, value: 0.2}, {filter: q_proj.weight, value: 0.3}, {value: 0.4}]}"
    (edit,) = edits(tmp_path, two("ties", extra, own=own))
    assert edit["models"]["a"] == {
        "weight": {".*mlp.*": 0.1, ".*down.*": 0.2, r".*q_proj\.weight.*": 0.3, ".*": 0.4},
        "density": {".*mlp.*": 0.5, ".*": 1},
    }


def test_slices_of_one_order_become_values_by_layer(tmp_path: Path) -> None:
    config = """
    slices:
      - sources: [{model: a, layer_range: [0, 2]}, {model: b, layer_range: [0, 2]}]
        parameters: {t: 0.25}
      - sources: [{model: a, layer_range: [2, 5]}, {model: b, layer_range: [2, 5]}]
        parameters: {t: [{filter: mlp, value: [0, 1]}, {value: 0.75}]}
    merge_method: slerp
    base_model: a
    """
    (edit,) = edits(tmp_path, config)
    assert list(edit["t"].items()) == [
        (r"\D*\.(0|1)\..*", 0.25),
        (r"(?=.*mlp)\D*\.2\..*", 0),
        (r"(?=.*mlp)\D*\.3\..*", 0.5),
        (r"(?=.*mlp)\D*\.4\..*", 1),
        (r"\D*\.(2|3|4)\..*", 0.75),
        (".*(embed|wte|wpe).*", 0.25),
        (".*", 0.75),
    ]


def test_tokenizers_of_one_kind_need_no_union(tmp_path: Path) -> None:
    for wish in ("tokenizer_source: base", "tokenizer_source: org/base", "tokenizer: {source: base}"):
        assert "note: `union`" not in imported(tmp_path, two("model_stock", wish))[1]
    assert "note: `union`" in imported(tmp_path, two("model_stock", "tokenizer_source: union\nchat_template: auto"))[1]


@pytest.mark.parametrize("method", METHODS)
def test_every_method_gives_a_spec_that_loads(method: str, tmp_path: Path) -> None:
    if method == "passthrough":
        config = FRANKEN
    else:
        required = "weight: 0.5, t: 0.5"
        count = METHODS[method].most or 2
        models = ", ".join(f"{{model: org/{letter}}}" for letter in "ab"[:count])
        config = f"models: [{models}]\nmerge_method: {method}\nbase_model: org/base\nparameters: {{{required}}}"
    imported(tmp_path, config)
    if METHODS[method].op not in op_names():
        pytest.skip(f"{METHODS[method].op} is not built yet")
    surgery.load(tmp_path / "spec.yaml")


@pytest.mark.parametrize("method", [name for name in METHODS if name != "passthrough"])
def test_defaults_left_unsaid_are_the_same_on_both_sides(method: str) -> None:
    if METHODS[method].op not in op_names():
        pytest.skip(f"{METHODS[method].op} is not built yet")
    options = {option.key: option for option in options_of(find_op(METHODS[method].op))}
    each: dict[str, Any] = next(
        (item.get("additionalProperties", {}) for item in options["models"].schema["anyOf"] if "object" in str(item)),
        {},
    )
    for parameter in METHODS[method].parameters:
        if parameter.per_model and not parameter.without_effect:
            assert each["properties"][parameter.ours].get("default") == parameter.default
        elif not parameter.without_effect:
            option = options[parameter.ours]
            assert (None if option.required else option.default) == parameter.default


# What mergekit lets pass in silence, and what is not ours to do


def test_every_unknown_key_is_an_error_with_its_line(tmp_path: Path) -> None:
    config = """\
models:
  - model: org/a
    parameters: {densty: 0.5, weight: 0.3}
    paramters: {}
merge_method: ties
base_model: org/base
int8_mask: true
random_seed: 0
parameters:
  weight: {filter: mlp, valu: 1}
"""
    assert problems(tmp_path, config).split("error: ")[1:] == [
        "unknown key `int8_mask`, which mergekit ignores\n  at   /mergekit.yml:7, int8_mask\n"
        "  fix  put it under `parameters`, where it counts, or take it out\n",
        "unknown key `random_seed`, which mergekit ignores\n  at   /mergekit.yml:8, random_seed\n"
        "  fix  take it out; `--random-seed` of mergekit is `seed:` of a spec\n",
        "unknown key `paramters`, which mergekit ignores\n  at   /mergekit.yml:4, models[0].paramters\n"
        "  fix  did you mean `parameters`?\n",
        "unknown parameter `densty`, which mergekit ignores\n  at   /mergekit.yml:3, models[0].parameters.densty\n"
        "  fix  did you mean `density`?",
    ]
    condition = two("ties", "parameters: {weight: [{filter: mlp, valu: 1}]}")
    assert "unknown key `valu`" in problems(tmp_path, condition)


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ("a: 1", "`merge_method` is missing"),
        ("merge_method: tie\nmodels: [{model: a}]", "there is no merge_method `tie`"),
        (two("ties", own="weight: 1", base=""), "`ties` needs a `base_model`"),
        (two("ties"), "`weight` is missing"),
        (two("slerp", "parameters: {t: 1}"), "`slerp` merges 1 models beside the base; 2 are given"),
        (two("ties", "slices: []", own="weight: x"), "`weight` is 'x', not a number"),
        (
            two("ties", "parameters: {normalize: [{filter: mlp, value: true}]}", own="weight: 1"),
            "from tensor to tensor",
        ),
        (two("linear", "dtype: bf16", own="weight: 1"), "there is no float dtype `bf16`"),
        (two("linear", "dtype: float64", own="weight: 1", base=""), "no op computes in float64"),
        (two("model_stock", "tokenizer_source: org/a"), "the tokenizer of `org/a` is not the source's"),
        (two("model_stock", "tokenizer: {source: base, tokens: {x: {source: org/a}}}"), "`tokens` is not translated"),
        ("models: [{model: a}, {model: a}]\nmerge_method: karcher", "`a` stands twice"),
        ("models: [{model: a+l}, {model: b+k}]\nmerge_method: karcher", "`b+k` is a LoRA over another model"),
        ("models: [{model: a}]\nmerge_method: model_stock\nbase_model: b+l", "a LoRA in `base_model`"),
        ("modules: {x: {models: [{model: a}]}, y: {}}\nmerge_method: karcher", "`modules` of more than one part"),
        ("models: [{model: a}, {model: b}]\nmerge_method: passthrough", "passes one model through; 2 are given"),
        (FRANKEN.replace("value: 1.0", "value: 0.9"), "is for tensors such as `model.norm.weight` too"),
        (FRANKEN.replace("org/orca", "org/orca+l"), "layers of a model with a LoRA"),
        (SLERP.replace("[0, 40]", "[1, 40]"), "the layers of this slice begin at 1, not at 0"),
        (SLERP.replace("[0, 40]", "[0, 39]", 1), "layers of different index are merged"),
        (SLERP.replace("[0, 40]", "[40, 0]"), "is no range"),
    ],
)
def test_what_cannot_be_said_is_an_error(config: str, words: str, tmp_path: Path) -> None:
    assert words in problems(tmp_path, config)


def test_a_parameter_of_another_method_is_left_out_with_a_note(tmp_path: Path) -> None:
    spec, text = imported(tmp_path, two("model_stock", "parameters: {normalize: true}"))
    assert "# note: `normalize` has no effect on `model_stock`, in mergekit neither: it is left out\n" in text
    assert "normalize" not in spec["edits"][0]


@pytest.mark.parametrize(
    ("config", "what"),
    [
        ("modules: {a: {slices: []}}\nmerge_method: linear\n", "names no model"),
        (
            f"models: [{{model: a/b, parameters: {{weight: 1{'0' * 400}}}}}]\nmerge_method: linear\n",
            "a number of 401 characters",
        ),
    ],
    ids=["empty", "huge"],
)
def test_a_config_that_leads_nowhere_is_a_spec_error(config: str, what: str, tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text(config)
    with pytest.raises(surgery.SpecError, match=what):
        surgery.import_mergekit(tmp_path / "config.yaml")


def test_a_lora_baked_into_its_base_is_translated(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text(
        "base_model: m/a+m/l\nmerge_method: passthrough\nmodels: [{model: m/a+m/l}]\n"
    )
    text = surgery.import_mergekit(tmp_path / "config.yaml")
    assert "source: m/a" in text and "l: m/l" in text
