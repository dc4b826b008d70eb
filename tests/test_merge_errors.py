"""What the models of a merge do not share: each is refused with a choice, and each choice does what it says."""

import json
from pathlib import Path
from typing import Any

import models
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

import surgery
from surgery.cli import main
from surgery.op import find_op, op_names

EMBEDDING, HEAD, NORM = "model.embed_tokens.weight", "lm_head.weight", "model.norm.weight"
Q, UP = "model.layers.0.self_attn.q_proj.weight", "model.layers.0.mlp.up_proj.weight"
POSITIONS = "model.layers.0.self_attn.position_ids"


def tensors(seed: int, *, vocabulary: int = 16, dtype: torch.dtype = torch.bfloat16) -> dict[str, Tensor]:
    shapes = {EMBEDDING: (vocabulary, 8), Q: (8, 8), UP: (16, 8), NORM: (8,), HEAD: (vocabulary, 8)}
    return {
        name: models.random_weight(*shape, dtype=dtype, seed=10 * seed + index)
        for index, (name, shape) in enumerate(shapes.items())
    }


def save(path: Path, weights: dict[str, Tensor], **config: Any) -> Path:
    path.mkdir()
    save_file(weights, path / "model.safetensors")
    fields = {"model_type": "llama", "vocab_size": weights[EMBEDDING].shape[0] if EMBEDDING in weights else 16}
    (path / "config.json").write_text(json.dumps({**fields, **config}))
    return path


class Home:
    """A directory with a source; `model` adds others."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.source = tensors(0)
        save(path / "source", self.source)

    def model(self, name: str, weights: dict[str, Tensor], **config: Any) -> dict[str, Tensor]:
        save(self.path / name, weights, **config)
        return weights

    def spec(self, *edits: dict[str, Any], source: str = "source") -> dict[str, Any]:
        there = {path.name: str(path) for path in self.path.iterdir() if path.is_dir() and path.name != "source"}
        used = {name: path for name, path in there.items() if any(f"'{name}'" in repr(edit) for edit in edits)}
        return {"version": 1, "source": str(self.path / source), "models": used, "edits": list(edits)}

    def refuses(self, *edits: dict[str, Any], source: str = "source") -> str:
        """What planning says; it says what, where and how to mend it, and nothing is written."""
        spec = self.spec(*edits, source=source)
        return self.refused(spec)

    def refused(self, spec: dict[str, Any]) -> str:
        with pytest.raises(surgery.SurgeryError) as caught:
            surgery.plan(spec)
        for problem in caught.value.problems:
            assert problem.what and problem.at, problem
            assert problem.fix or isinstance(caught.value, surgery.SpecError), problem
        file, out = self.path / "spec.yaml", self.path / "out"
        file.write_text(json.dumps(spec))
        with pytest.raises(SystemExit, match="1"):
            main(["apply", str(file), "-o", str(out)])
        assert not [path for path in self.path.iterdir() if path.name.startswith(("out", ".out"))]
        return str(caught.value)

    def merges(self, *edits: dict[str, Any], source: str = "source") -> dict[str, Tensor]:
        surgery.apply(surgery.plan(self.spec(*edits, source=source)), self.path / "out")
        return models.read(self.path / "out")


@pytest.fixture
def home(tmp_path: Path) -> Home:
    return Home(tmp_path)


def average(*names: str, **options: Any) -> dict[str, Any]:
    listed = {name: {"weight": 1} for name in names or ("source", "a")}
    return {"op": "merge.linear", "models": listed, **options}


def mean(*inputs: Tensor) -> Tensor:
    return torch.stack([x.float() for x in inputs]).mean(0).to(inputs[0].dtype)


# Tensors that only some have


def test_a_tensor_that_a_model_lacks(home: Home) -> None:
    a = tensors(1)
    del a[NORM]
    home.model("a", a)
    text = home.refuses(average())
    assert f"`{NORM}` is not in `a`" in text and "edits[0]" in text and "missing: source" in text
    merged = home.merges(average(missing="source"))
    assert models.same_bytes(merged[NORM], home.source[NORM])
    assert models.same_bytes(merged[Q], mean(home.source[Q], a[Q]))


def test_a_tensor_that_a_model_lacks_can_be_left_out(home: Home) -> None:
    a = tensors(1)
    del a[NORM]
    home.model("a", a)
    merged = home.merges(average(tensors=".*", **{"except": r"model\.norm\.weight"}))
    assert models.same_bytes(merged[NORM], home.source[NORM])


def test_tensors_that_only_a_model_has(home: Home) -> None:
    a = home.model("a", {**tensors(1), "model.layers.1.mlp.up_proj.weight": torch.ones(16, 8).bfloat16()})
    text = home.refuses(average())
    assert "`a` has 1 tensor" in text and "model.layers.1.mlp.up_proj.weight" in text and "unused: ignore" in text
    merged = home.merges(average(unused="ignore"))
    assert merged.keys() == home.source.keys()
    assert models.same_bytes(merged[UP], mean(home.source[UP], a[UP]))


def test_tensors_that_only_a_model_has_are_no_matter_to_a_merge_of_some(home: Home) -> None:
    home.model("a", {**tensors(1), "extra.weight": torch.ones(2).bfloat16()})
    merged = home.merges(average(tensors=r"model\.layers\..*"))
    assert models.same_bytes(merged[EMBEDDING], home.source[EMBEDDING])
    assert not models.same_bytes(merged[Q], home.source[Q])


def test_a_model_of_another_architecture(home: Home) -> None:
    home.model("a", {"h.0.attn.c_attn.weight": torch.ones(8, 24).bfloat16()})
    text = home.refuses(average())
    assert "`a` shares 0 of its 1 tensors' names" in text and "c_attn" in text and "one architecture" in text


def test_shapes_that_differ(home: Home) -> None:
    home.model("a", {**tensors(1), UP: torch.ones(20, 8).bfloat16()})
    text = home.refuses(average(pad_vocab=True))
    assert f"`{UP}` has unlike shapes: [16, 8] in `source`, [20, 8] in `a`" in text and "tensors" in text


# Vocabularies


def test_a_larger_vocabulary_of_a_model(home: Home) -> None:
    a = home.model("a", tensors(1, vocabulary=19))
    text = home.refuses(average())
    assert "vocabularies of different size: [16, 8] in `source`, [19, 8] in `a`" in text and "pad_vocab: true" in text
    merged = home.merges(average(pad_vocab=True))
    for name in (EMBEDDING, HEAD):
        assert models.same_bytes(merged[name][:16], mean(home.source[name], a[name][:16]))
        assert models.same_bytes(merged[name][16:], a[name][16:])
    assert json.loads((home.path / "out" / "config.json").read_text())["vocab_size"] == 19


def test_a_smaller_vocabulary_of_a_model(home: Home) -> None:
    a = home.model("a", tensors(1, vocabulary=13))
    assert "[13, 8] in `a`" in home.refuses(average())
    merged = home.merges(average(pad_vocab=True))
    assert models.same_bytes(merged[HEAD][:13], mean(home.source[HEAD][:13], a[HEAD]))
    assert models.same_bytes(merged[HEAD][13:], home.source[HEAD][13:])
    assert json.loads((home.path / "out" / "config.json").read_text())["vocab_size"] == 16


def test_rows_of_a_larger_vocabulary_are_no_difference_for_a_task_vector(home: Home) -> None:
    a = home.model("a", tensors(1, vocabulary=19))
    edit = {"op": "merge.task_arithmetic", "models": {"a": {"weight": 0.5}}, "pad_vocab": True}
    merged = home.merges(edit)
    assert models.same_bytes(merged[EMBEDDING][16:], a[EMBEDDING][16:])


# Tied heads


def test_a_head_that_a_model_ties(home: Home) -> None:
    a = tensors(1)
    del a[HEAD]
    home.model("a", a, tie_word_embeddings=True)
    text = home.refuses(average())
    assert f"`{HEAD}` is tied to the embedding in `a`" in text and "tied: embedding" in text
    merged = home.merges(average(tied="embedding"))
    assert models.same_bytes(merged[HEAD], mean(home.source[HEAD], a[EMBEDDING]))
    assert models.same_bytes(merged[EMBEDDING], mean(home.source[EMBEDDING], a[EMBEDDING]))


def test_a_head_that_only_the_source_ties(home: Home) -> None:
    tied = tensors(2)
    del tied[HEAD]
    home.model("tied", tied, tie_word_embeddings=True)
    a = home.model("a", tensors(1))
    text = home.refuses(average(), source="tied")
    assert "the source ties its output head" in text and HEAD in text and "unused: ignore" in text
    merged = home.merges(average(unused="ignore"), source="tied")
    assert HEAD not in merged
    assert models.same_bytes(merged[EMBEDDING], mean(tied[EMBEDDING], a[EMBEDDING]))


# Dtypes


def test_unlike_dtypes(home: Home) -> None:
    a = home.model("a", tensors(1, dtype=torch.float32))
    text = home.refuses(average())
    assert "unlike dtypes: bf16 in `source`, f32 in `a`" in text and "mixed_dtypes: true" in text
    assert text.count("unlike dtypes") == 1, "one message for all tensors"
    merged = home.merges(average(mixed_dtypes=True))
    for name, tensor in merged.items():
        assert models.same_bytes(tensor, mean(home.source[name], a[name])), name


def test_unlike_dtypes_of_models_that_the_source_is_not_among(home: Home) -> None:
    home.model("a", tensors(1, dtype=torch.float16))
    home.model("b", tensors(2, dtype=torch.float16))
    assert "unlike dtypes" in home.refuses(average("a", "b"))
    merged = home.merges(average("a", "b", mixed_dtypes=True))
    assert {tensor.dtype for tensor in merged.values()} == {torch.bfloat16}


def test_a_dtype_that_cannot_be_merged(home: Home) -> None:
    for name in ("wide", "a"):
        home.model(name, tensors(1, dtype=torch.float64))
    text = home.refuses(average(), source="wide")
    assert "only f32, f16 and bf16" in text


# Tokenizers


def tokenizer(path: Path, ids: dict[str, int], added: dict[str, int] | None = None, **layout: Any) -> None:
    tokens = [{"content": token, "id": index} for token, index in (added or {}).items()]
    content = {"model": {"type": "BPE", "vocab": ids, "merges": []}, "added_tokens": tokens}
    (path / "tokenizer.json").write_text(json.dumps(content, **layout))


def test_tokenizers_that_give_tokens_other_ids(home: Home) -> None:
    a = home.model("a", tensors(1))
    tokenizer(home.path / "source", {"x": 0, "y": 1})
    tokenizer(home.path / "a", {"x": 1, "y": 0})
    text = home.refuses(average())
    assert "the tokenizer of `a` differs" in text and "'x': 0 here, 1 there" in text and "tokenizers: any" in text
    merged = home.merges(average(tokenizers="any"))
    assert models.same_bytes(merged[Q], mean(home.source[Q], a[Q]))
    kept = (home.path / "out" / "tokenizer.json").read_bytes()
    assert kept == (home.path / "source" / "tokenizer.json").read_bytes()


def test_a_token_that_only_one_tokenizer_adds(home: Home) -> None:
    home.model("a", tensors(1))
    tokenizer(home.path / "source", {"x": 0, "y": 1})
    tokenizer(home.path / "a", {"x": 0, "y": 1}, {"<|im_end|>": 2})
    assert "<|im_end|>" in home.refuses(average())


def test_tokenizers_that_are_written_otherwise_are_the_same(home: Home) -> None:
    home.model("a", tensors(1))
    tokenizer(home.path / "source", {"x": 0, "y": 1}, {"z": 2})
    tokenizer(home.path / "a", {"y": 1, "x": 0, "z": 2}, indent=2)
    home.merges(average())


def test_sentencepiece_files_that_differ(home: Home) -> None:
    home.model("a", tensors(1))
    for index, name in enumerate(("source", "a")):
        (home.path / name / "tokenizer.model").write_bytes(bytes([index]) * 10)
    assert "`tokenizer.model`" in home.refuses(average())


@pytest.mark.parametrize("content", ["", "[]", "{", '{"model": []}', '{"model": {"vocab": [1, 2]}}', "[" * 100_000])
def test_a_tokenizer_that_cannot_be_read_is_no_fault_of_the_merge(content: str, home: Home) -> None:
    home.model("a", tensors(1))
    tokenizer(home.path / "source", {"x": 0})
    (home.path / "a" / "tokenizer.json").write_text(content)
    home.merges(average())


# Quantized weights


def quantized(home: Home, name: str, of: str) -> None:
    edit = {"op": "quantize.nf4", "modules": r".*\.q_proj"}
    surgery.apply(surgery.plan(home.spec(edit, source=of)), home.path / name)


def test_a_quantized_model(home: Home) -> None:
    home.model("a", tensors(1))
    quantized(home, "small", of="a")
    assert "absmax" in home.refuses(average("source", "small"))
    text = home.refuses(average("source", "small", unused="ignore"))
    assert f"`{Q}` is u8" in text and "dequantize `small`" in text


def test_a_quantized_source(home: Home) -> None:
    home.model("a", tensors(1))
    quantized(home, "small", of="source")
    some = {"tensors": r".*self_attn.*"}
    text = home.refuses(average(missing="source", **some), source="small")
    assert "quantized weight" in text and "quantize.dequantize" in text
    before = {"op": "quantize.dequantize", "modules": "all-linear"}
    merged = home.merges(before, average(), source="small")
    assert merged.keys() == home.source.keys()


# Numbers


def test_a_regex_that_matches_nothing(home: Home) -> None:
    home.model("a", tensors(1))
    models_ = {"source": {"weight": 1}, "a": {"weight": {"self_attn": 0.7, r".*\.": 1, ".*": 0.5}}}
    text = home.refuses({"op": "merge.linear", "models": models_})
    assert "`self_attn` of `models.a.weight` matches no tensor of this edit" in text
    assert "'.*self_attn.*'" in text, "what was meant"
    assert "`.*\\.` of `models.a.weight`" in text, "every regex at once"


def test_a_tensor_that_no_regex_matches(home: Home) -> None:
    home.model("a", tensors(1))
    text = home.refuses({"op": "merge.slerp", "models": "a", "t": {".*_proj.*": 0.5}})
    assert "has no `t`: none of its regexes matches" in text and "'.*': NUMBER" in text


def test_the_first_regex_counts(home: Home) -> None:
    a = home.model("a", tensors(1))
    weights = {".*q_proj.*": 1, ".*_proj.*": 0, ".*": 0.5}
    merged = home.merges({"op": "merge.task_arithmetic", "models": {"a": {"weight": weights}}})
    assert torch.allclose(merged[Q].float(), a[Q].float(), rtol=1e-2)
    assert models.same_bytes(merged[UP], home.source[UP])


def test_a_broken_regex(home: Home) -> None:
    home.model("a", tensors(1))
    models_ = {"source": {"weight": 1}, "a": {"weight": {"(": 1}}}
    text = home.refuses({"op": "merge.linear", "models": models_})
    assert "`(` of `models.a.weight` is no regex" in text


def test_a_number_that_a_method_does_not_know(home: Home) -> None:
    home.model("a", tensors(1))
    text = home.refuses({"op": "merge.ties", "models": {"a": {"weight": 1, "densty": 0.5}}})
    assert "densty" in text and "models.a" in text and "density" in text


def test_a_number_that_is_missing(home: Home) -> None:
    home.model("a", tensors(1))
    text = home.refuses({"op": "merge.ties", "models": {"a": {"density": 0.5}}})
    assert "weight" in text and "does not fit here" not in text
    assert "`t`" in home.refuses({"op": "merge.slerp", "models": "a"})


def test_weights_that_add_up_to_nothing(home: Home) -> None:
    a = home.model("a", tensors(1))
    models_ = {"source": {"weight": 1}, "a": {"weight": -1}}
    text = home.refuses({"op": "merge.linear", "models": models_})
    assert "the weights add up to 0" in text and "normalize: false" in text
    merged = home.merges({"op": "merge.linear", "models": models_, "normalize": False})
    assert models.same_bytes(merged[Q], (home.source[Q].float() - a[Q].float()).bfloat16())


@pytest.mark.parametrize("density", [0.95, 0.05])
def test_probabilities_beyond_certainty(density: float, home: Home) -> None:
    home.model("a", tensors(1))
    text = home.refuses({"op": "merge.della", "models": {"a": {"weight": 1, "density": density, "epsilon": 0.1}}})
    assert "is not within (0, 1)" in text


# Models


def test_a_model_that_there_is_not(home: Home) -> None:
    home.model("maths", tensors(1))
    spec = {**home.spec(average("source", "math")), "models": {"maths": str(home.path / "maths")}}
    text = home.refused(spec)
    assert "there is no model `math`" in text and "did you mean `maths`?" in text
    assert "model `maths` is used by no edit" in text


def test_a_model_called_source(home: Home) -> None:
    home.model("a", tensors(1))
    text = home.refused({**home.spec(average()), "models": {"a": str(home.path / "a"), "source": "x"}})
    assert "`source` is what edits call the source itself" in text


PAIRS = {  # with a base, that base among the models; too many; too few
    "merge.slerp": ["source", ["a", "b"], []],
    "merge.nearswap": ["source", ["a", "b"], []],
    "merge.arcee_fusion": ["source", ["a", "b"], []],
    "merge.nuslerp": [None, ["a", "b", "c"], ["a"]],
    "merge.model_stock": [["source", "a", "b"], None, ["a"]],
    "merge.karcher": [None, None, ["a"]],
    "merge.ties": [["source", "a"], None, []],
}


@pytest.mark.parametrize("name", PAIRS)
def test_a_wrong_number_of_models(name: str, home: Home) -> None:
    for seed, model in enumerate("abc"):
        home.model(model, tensors(seed))
    numbers = {"weight": 1} if name in ("merge.nuslerp", "merge.ties") else {}
    options = {"t": 0.5} if name in ("merge.slerp", "merge.nearswap") else {}
    for listed in PAIRS[name]:
        if listed is not None:
            given = dict.fromkeys(listed, numbers) if numbers else listed
            assert "does not fit here" not in home.refuses({"op": name, "models": given, **options})


def test_the_base_among_the_models(home: Home) -> None:
    text = home.refuses({"op": "merge.ties", "models": {"source": {"weight": 1}}})
    assert "`source` is the base of `merge.ties`" in text and "take `source` out" in text


@pytest.mark.parametrize("name", [name for name in op_names() if name.startswith("merge.")])
def test_every_method_refuses_models_that_do_not_fit(name: str, home: Home) -> None:
    """The checks are those of the edit, not of one method."""
    home.model("a", {**tensors(1), UP: torch.ones(20, 8).bfloat16()})
    home.model("b", tensors(2))
    one = find_op(name).num_models == 1  # type: ignore[attr-defined]
    weighted = '"weight"' in json.dumps(surgery.schema()["$defs"][name])  # type: ignore[index]
    listed: Any = {model: {"weight": 0.5} for model in "ab"} if weighted else ["a"] if one else ["a", "b"]
    options = {"t": 0.5} if name in ("merge.slerp", "merge.nearswap") else {}
    assert "unlike shapes" in home.refuses({"op": name, "models": listed, **options})
    merged = home.merges({"op": name, "models": listed, **options, "tensors": r".*q_proj.*"})
    assert merged[Q].isfinite().all() and not models.same_bytes(merged[Q], home.source[Q])


# Adapters


def test_an_adapter_as_source(home: Home) -> None:
    home.model("a", tensors(1))
    models.lora(home.path / "lora", home.path / "source")
    text = home.refuses(average(), source="lora")
    assert "the source is an adapter" in text and "adapter.combine" in text


def test_an_adapter_for_another_base(home: Home) -> None:
    other = {name: torch.zeros(2 * x.shape[0], *x.shape[1:]) for name, x in tensors(1).items()}
    models.lora(home.path / "lora", save(home.path / "other", other), targets=["q_proj"])
    text = home.refuses(average("source", "lora"))
    assert "`lora`" in text and "q_proj" in text and "[16," in text


def test_an_adapter_for_modules_that_the_source_lacks(home: Home) -> None:
    models.lora(home.path / "lora", save(home.path / "other", {"model.layers.7.q_proj.weight": torch.ones(8, 8)}))
    text = home.refuses(average("source", "lora"))
    assert "`lora`" in text and "model.layers.7.q_proj" in text


def test_an_adapter_that_was_extracted_for_another_base(home: Home) -> None:
    """It fits where it is put, and means another thing: its manifest says what it is for."""
    for seed, name in enumerate(("base", "tuned"), 1):
        home.model(name, {**tensors(seed), "model.layers.0.input_layernorm.weight": torch.ones(8).bfloat16()})
    extract = {"op": "adapter.extract", "models": "tuned", "modules": r".*_proj", "rank": 2}
    surgery.apply(surgery.plan(home.spec(extract, source="base")), home.path / "lora")
    home.merges(average("source", "lora"), source="base")
    (home.path / "out").rename(home.path / "right")
    text = home.refuses(average("source", "lora"))
    assert "`lora` was made for the base" in text and "any_base" in text
    merged = home.merges(average("source", "lora", any_base=True))
    assert not models.same_bytes(merged[Q], home.source[Q])


def test_an_adapter_that_says_nothing_of_its_base_is_taken(home: Home) -> None:
    models.lora(home.path / "lora", home.path / "source", targets=["q_proj"])
    merged = home.merges(average("source", "lora"))
    assert models.same_bytes(merged[UP], home.source[UP])
    assert not models.same_bytes(merged[Q], home.source[Q])


# What is no float


def test_buffers_that_are_the_same_are_kept(home: Home) -> None:
    positions = torch.arange(6)
    home.model("counted", {**tensors(2), POSITIONS: positions})
    home.model("a", {**tensors(1), POSITIONS: positions})
    assert torch.equal(home.merges(average(), source="counted")[POSITIONS], positions)


def test_buffers_that_differ(home: Home) -> None:
    home.model("counted", {**tensors(2), POSITIONS: torch.arange(6)})
    home.model("a", {**tensors(1), POSITIONS: torch.tensor([0, 1, 2, 9, 4, 5])})
    plan = surgery.plan(home.spec(average(), source="counted"))
    with pytest.raises(surgery.OpError) as caught:
        surgery.apply(plan, home.path / "out")
    text = str(caught.value)
    assert f"`{POSITIONS}`" in text and "[3]" in text and "differs between the models" in text and "except" in text
    assert not (home.path / "out").exists()
    merged = home.merges(average(tensors=".*", **{"except": ".*position_ids"}), source="counted")
    assert torch.equal(merged[POSITIONS], torch.arange(6))


def test_buffers_of_unlike_types(home: Home) -> None:
    home.model("counted", {**tensors(2), POSITIONS: torch.arange(6)})
    home.model("a", {**tensors(1), POSITIONS: torch.arange(6, dtype=torch.int32)})
    text = home.refuses(average(), source="counted")
    assert f"`{POSITIONS}` cannot be merged" in text and "leave it out of `tensors`" in text


def test_a_buffer_that_is_a_float_elsewhere(home: Home) -> None:
    home.model("counted", {**tensors(2), POSITIONS: torch.arange(6)})
    home.model("a", {**tensors(1), POSITIONS: torch.ones(6)})
    assert f"`{POSITIONS}`" in home.refuses(average(), source="counted")


# All at once


def test_every_problem_is_reported_at_once(home: Home) -> None:
    a = {**tensors(1, vocabulary=19), UP: torch.ones(20, 8).bfloat16()}
    del a[NORM]
    home.model("a", a)
    text = home.refuses(average())
    assert "unlike shapes" in text and "different size" in text and "is not in `a`" in text
