"""Every message of the spec loader and of planning, word by word: what is wrong, where, how to mend it."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch
from golden import assert_golden, golden_names
from safetensors.torch import save_file
from torch import Tensor

import surgery


@dataclass(frozen=True)
class Case:
    """A spec that does not hold, and the checkpoint it is applied to: one of `CHECKPOINTS`."""

    text: str
    model: str = "llama"
    settings: Mapping[str, str] = field(default_factory=dict)


def edits(*lines: str, model: str = "llama", head: str = "") -> Case:
    """A spec that is well but for its edits, one line each."""
    body = "".join(f"  - {{{line}}}\n" for line in lines)
    return Case(f"version: 1\nsource: {model}\n{head}edits:\n{body}", model)


def zeros(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.zeros(shape, dtype=dtype)


def llama() -> dict[str, Tensor]:
    tensors = {"model.embed_tokens.weight": zeros(16, 8)}
    for layer in range(2):
        path = f"model.layers.{layer}"
        tensors |= {f"{path}.self_attn.{name}_proj.weight": zeros(8, 8) for name in "qkvo"}
        tensors |= {f"{path}.mlp.up_proj.weight": zeros(16, 8), f"{path}.mlp.down_proj.weight": zeros(8, 16)}
        tensors |= {f"{path}.input_layernorm.weight": zeros(8)}
    return {**tensors, "model.norm.weight": zeros(8), "lm_head.weight": zeros(16, 8)}


def odd() -> dict[str, Tensor]:
    """What no Linear is: another dtype, another rank, no weight at all."""
    return {
        "double.weight": zeros(8, 8, dtype=torch.float64),
        "integers.weight": zeros(8, 8, dtype=torch.int32),
        "convolution.weight": zeros(4, 4, 3),
        "empty.weight": zeros(0, 8),
        "scale.gain": zeros(8),
        "buffer.position_ids": zeros(1, 8, dtype=torch.int64),
    }


def broken(record: bytes, num_blocks: int = 1) -> dict[str, Tensor]:
    """A 4-bit weight whose quant_state is `record`."""
    return {
        "linear.weight": zeros(32, 1, dtype=torch.uint8),
        "linear.weight.absmax": zeros(num_blocks, dtype=torch.float32),
        "linear.weight.quant_map": zeros(16, dtype=torch.float32),
        "linear.weight.quant_state.bitsandbytes__nf4": torch.tensor(list(record), dtype=torch.uint8),
    }


RECORD = b'{"quant_type": "nf4", "blocksize": 64, "dtype": "bfloat16", "shape": [8, 8]}'

CHECKPOINTS: dict[str, tuple[dict[str, object], dict[str, Tensor]]] = {
    "llama": ({"model_type": "llama"}, llama()),
    "tied": ({"model_type": "llama", "tie_word_embeddings": True}, llama()),
    "odd": ({"model_type": "llama"}, odd()),
    "gptq": ({"model_type": "llama", "quantization_config": {"quant_method": "gptq", "bits": 4}}, llama()),
    "mixtral": (
        {"model_type": "mixtral"},
        {
            "model.layers.0.block_sparse_moe.gate.weight": zeros(2, 8),
            **{f"model.layers.0.block_sparse_moe.experts.{i}.w1.weight": zeros(16, 8) for i in range(2)},
        },
    ),
    "t5": (
        {"model_type": "t5"},
        {f"encoder.block.0.layer.1.DenseReluDense.{name}.weight": zeros(8, 8) for name in ("wi", "wo")},
    ),
    "no-json": ({"model_type": "llama"}, broken(b"{not json")),
    "no-dtype": ({"model_type": "llama"}, broken(b'{"quant_type": "nf4", "blocksize": 64, "shape": [8, 8]}')),
    "int8-record": ({"model_type": "llama"}, broken(RECORD.replace(b"nf4", b"int8"))),
    "odd-blocks": ({"model_type": "llama"}, broken(RECORD.replace(b"64", b"63"))),
    "too-many-blocks": ({"model_type": "llama"}, broken(RECORD, num_blocks=2)),
    "no-absmax": (
        {"model_type": "llama"},
        {name: value for name, value in broken(RECORD).items() if not name.endswith("absmax")},
    ),
}

HEAD = "version: 1\nsource: llama\n"
NF4 = "op: quantize.nf4, modules: all-linear"
EVERY_Q = r"op: quantize.nf4, modules: '.*\.q_proj'"

CASES = {
    # YAML
    "yaml-broken": Case("version: 1\nsource: [llama\nedits: []\n"),
    "yaml-regex-in-double-quotes": Case(HEAD + 'edits:\n  - {op: quantize.nf4, modules: "model\\.x"}\n'),
    "yaml-key-twice": Case(HEAD + "edits: []\nsource: other\n"),
    "yaml-key-no-string": Case(HEAD + "edits: []\n1: one\n"),
    "yaml-tag-on-scalar": Case("version: 1\nsource: !!python/name:os.system ''\nedits: []\n"),
    "yaml-tag-on-list": Case("version: 1\nsource: llama\nedits: !!python/object/apply:os.system [echo]\n"),
    "yaml-tag-on-map": Case("version: 1\nsource: llama\nedits: []\noutput: !mine {shard_size: 5GB}\n"),
    "yaml-alias-bomb": Case(
        "a: &a [x, x, x, x, x, x, x, x, x]\n"
        + "".join(f"{b}: &{b} [{', '.join([f'*{a}'] * 9)}]\n" for a, b in zip("abcdefgh", "bcdefghi", strict=True))
    ),
    "yaml-alias-of-itself": Case("version: 1\nsource: llama\nedits: &a [*a]\n"),
    "yaml-two-documents": Case(HEAD + "edits: []\n---\n" + HEAD),
    "yaml-empty": Case(""),
    "yaml-a-list": Case("- version: 1\n"),
    # the frame
    "version-unknown": Case("version: 2\nsource: llama\nedits: []\n"),
    "required-missing": Case("version: 1\n"),
    "source-empty": Case("version: 1\nsource: ''\nedits: []\n"),
    "key-unknown": Case(HEAD + "edits: []\noutputs: {shard_size: 5GB}\n"),
    "key-unknown-of-output": Case(HEAD + "edits: []\noutput: {shards: 3}\n"),
    "edit-no-map": Case(HEAD + "edits: [quantize.nf4]\n"),
    "model-unused": Case(HEAD + "models: {math: org/math}\nedits: []\n"),
    "seed-negative": Case(HEAD + "edits: []\nseed: -1\n"),
    "size-no-size": Case(HEAD + "edits: []\noutput: {shard_size: 5 gigs}\n"),
    "size-nothing": Case(HEAD + "edits: []\noutput: {shard_size: 0GB}\n"),
    "size-no-number": Case(HEAD + "edits: []\noutput: {shard_size: [5]}\n"),
    # edits
    "op-missing": edits("modules: all-linear"),
    "op-misspelt": edits("op: quantise.nf4, modules: all-linear"),
    "op-unlike-any": edits("op: frobnicate, modules: all-linear"),
    "edit-key-unknown": edits(f"{NF4}, blocksize: 64"),
    "edit-key-unlike-any": edits(f"{NF4}, colour: red"),
    "edit-selects-by-the-other": edits("op: quantize.nf4, tensors: '.*'", "op: tensor.drop, modules: '.*'"),
    "edit-selects-nothing": edits("op: quantize.nf4"),
    "option-missing": edits("op: tensor.cast, tensors: '.*'"),
    "option-of-wrong-type": edits(f"{NF4}, double_quant: 'yes'"),
    "option-not-allowed": edits(f"{NF4}, block_size: 63", "op: tensor.cast, tensors: '.*', dtype: bf16"),
    "regex-empty": edits("op: quantize.nf4, modules: ''"),
    "regex-of-wrong-type": edits("op: quantize.nf4, modules: 7"),
    "regex-broken": edits("op: quantize.nf4, modules: 'model.layers.(0'"),
    "regex-broken-in-a-list": edits("op: quantize.nf4, modules: ['.*', '*']", f"{NF4}, except: '['"),
    "regex-too-large": edits("op: quantize.nf4, modules: 'x{99999999999}'"),
    "expect-zero": edits(f"{NF4}, expect: 0"),
    "rename-group-unknown": edits(r"op: tensor.rename, tensors: 'model\.(.*)', to: 'm.\2'"),
    "rename-group-unknown-by-name": edits(r"op: tensor.rename, tensors: 'model\.(.*)', to: 'm.\g<rest>'"),
    "rename-to-a-regex": edits(r"op: tensor.rename, tensors: '(lm_head)\.weight', to: 'head\.\1'"),
    "compute-dtypes-differ": edits(
        r"op: quantize.nf4, modules: '.*\.q_proj', compute_dtype: float16",
        r"op: quantize.fp4, modules: '.*\.k_proj'",
    ),
    # parameters
    "parameter-unknown-in-set": Case("params: {model: llama}\n" + HEAD + "edits: []\n", settings={"modle": "x"}),
    "parameter-in-set-without-any": Case(HEAD + "edits: []\n", settings={"model": "x"}),
    "parameter-unknown": Case("version: 1\nparams: {model: llama}\nsource: ${modle}\nedits: []\n"),
    "parameter-undeclared": Case("version: 1\nsource: ${model}/base\nedits: []\n"),
    "parameter-without-value": Case("version: 1\nparams: {model: null}\nsource: ${model}\nedits: []\n"),
    "parameter-of-wrong-type": Case("version: 1\nparams: {model: [a]}\nsource: llama\nedits: []\n"),
    "parameter-set-to-wrong-type": Case(
        "version: 1\nparams: {size: 64}\nsource: llama\nedits:\n  - {op: quantize.nf4, modules: all-linear,\n"
        "     block_size: '${size}'}\n",
        settings={"size": "large"},
    ),
    # all at once
    "every-problem-at-once": Case(
        "version: 1\n"
        "params: {size: null}\n"
        "source: 5\n"
        "edits:\n"
        "  - op: quantise.nf4\n"
        "    modules: all-linear\n"
        "  - op: quantize.nf4\n"
        "    modules: '('\n"
        "    except: ')'\n"
        "  - op: quantize.nf4\n"
        "    modules: all-linear\n"
        "    block_size: ${size}\n"
        "    double-quant: true\n"
        "  - op: tensor.rename\n"
        "    tensors: 'a'\n"
        "    to: '\\1'\n"
        "output:\n"
        "  shard_size: 5 gigs\n"
        "extra: 1\n",
        settings={"siz": "64"},
    ),
    # selecting
    "regex-matches-nothing": edits(r"op: quantize.nf4, modules: 'model\.layer\.\d+\.self_attn\.q_proj'"),
    "regex-matches-in-part-only": edits(r"op: quantize.nf4, modules: '\d+\.self_attn\.q_proj'"),
    "regex-like-nothing": edits("op: quantize.nf4, modules: 'zzzzzzzzzzzzzzzz'"),
    "regex-matches-no-tensor": edits(r"op: tensor.drop, tensors: 'model\.norm'"),
    "regex-of-a-list-matches-nothing": edits(r"op: quantize.nf4, modules: ['.*\.q_proj', '.*\.w_proj']"),
    "except-matches-nothing": edits(rf"{NF4}, except: '.*\.gate_proj'"),
    "except-takes-all": edits(rf"{EVERY_Q}, except: '.*'"),
    "expect-broken": edits(f"{EVERY_Q}, expect: 32"),
    "expect-broken-of-many": edits(f"{NF4}, expect: 224"),
    "all-linear-matches-nothing": edits("op: quantize.dequantize, modules: all-linear"),
    "every-edit-at-once": edits(r"op: quantize.nf4, modules: 'x'", r"op: tensor.drop, tensors: 'y'", NF4, NF4),
    # quantizing
    "quantize-twice": edits(EVERY_Q, r"op: quantize.fp4, modules: '.*\.0\.self_attn\.q_proj'"),
    "quantize-what-is-quantized": edits(EVERY_Q, model="quantized"),
    "quantize-a-norm": edits(r"op: quantize.nf4, modules: '.*norm'"),
    "quantize-an-embedding": edits("op: quantize.nf4, modules: model.embed_tokens"),
    "quantize-a-tied-head": edits("op: quantize.nf4, modules: lm_head", model="tied"),
    "quantize-a-convolution": edits("op: quantize.nf4, modules: convolution", model="odd"),
    "quantize-a-double": edits("op: quantize.nf4, modules: double", model="odd"),
    "quantize-integers": edits("op: quantize.nf4, modules: integers", model="odd"),
    "quantize-an-empty-matrix": edits("op: quantize.nf4, modules: empty", model="odd"),
    "quantize-without-a-weight": edits("op: quantize.nf4, modules: 'scale|buffer'", model="odd"),
    "quantize-another-method": edits(NF4, model="gptq"),
    "quantize-experts": edits(NF4, model="mixtral"),
    "quantize-a-router": edits(r"op: quantize.nf4, modules: '.*\.gate'", model="mixtral"),
    "quantize-what-stays-float32": edits(r"op: quantize.nf4, modules: '.*\.w[io]'", model="t5"),
    # dequantizing
    "dequantize-what-is-not": edits(r"op: quantize.dequantize, modules: '.*\.q_proj'"),
    "dequantize-record-no-json": edits("op: quantize.dequantize, modules: linear", model="no-json"),
    "dequantize-record-incomplete": edits("op: quantize.dequantize, modules: linear", model="no-dtype"),
    "dequantize-record-of-another-type": edits("op: quantize.dequantize, modules: linear", model="int8-record"),
    "dequantize-record-with-odd-blocks": edits("op: quantize.dequantize, modules: linear", model="odd-blocks"),
    "dequantize-parts-do-not-fit": edits("op: quantize.dequantize, modules: linear", model="too-many-blocks"),
    "dequantize-part-missing": edits("op: quantize.dequantize, modules: linear", model="no-absmax"),
    # tensors
    "rename-two-to-one": edits(r"op: tensor.rename, tensors: 'model\.layers\.\d\.(.*q_proj.*)', to: 'layer.\1'"),
    "rename-onto-another": edits("op: tensor.rename, tensors: lm_head.weight, to: model.norm.weight"),
    "rename-to-nothing": edits("op: tensor.rename, tensors: '(lm_head.weight)(x?)', to: '\\2'"),
    "rename-tears-parts": edits("op: tensor.rename, tensors: '(.*)absmax', to: '\\1amax'", model="quantized"),
    "rename-tears-the-weight": edits("op: tensor.rename, tensors: '(.*q_proj.weight)', to: 'x.\\1'", model="quantized"),
    "drop-tears-parts": edits(NF4, "op: tensor.drop, tensors: '.*quant_state.*'"),
    "drop-everything": edits("op: tensor.drop, tensors: '.*'"),
    "cast-integers": edits("op: tensor.cast, tensors: '.*', dtype: float32", model="odd"),
    "cast-a-quantized-part": edits("op: tensor.cast, tensors: '.*absmax', dtype: float16", model="quantized"),
}


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with every checkpoint, so that messages name them without a path."""
    home = tmp_path_factory.mktemp("specs")
    for name, (config, tensors) in CHECKPOINTS.items():
        (home / name).mkdir()
        (home / name / "config.json").write_text(json.dumps(config))
        save_file(tensors, home / name / "model.safetensors")
    spec = {"version": 1, "source": str(home / "llama"), "edits": [{"op": "quantize.nf4", "modules": r".*\.q_proj"}]}
    surgery.apply(surgery.plan(spec), home / "quantized")
    return home


def error_of(case: Case) -> surgery.SurgeryError:
    Path("spec.yaml").write_text(case.text)
    with pytest.raises(surgery.SurgeryError) as caught:
        surgery.plan("spec.yaml", **case.settings)
    return caught.value


@pytest.mark.parametrize("name", CASES)
def test_every_mistake_has_its_message(name: str, home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(home)
    error = error_of(CASES[name])
    assert isinstance(error, ValueError)
    assert_golden(f"errors/{name}", f"{type(error).__name__}\n{error}")


def test_no_golden_message_is_left_over() -> None:
    assert golden_names("errors") == {*CASES, *FILES}


FILES = ("file-missing", "file-a-directory", "file-no-text", "file-too-large", "plain-data")


@pytest.mark.parametrize("name", FILES)
def test_what_is_no_spec_file_has_its_message(name: str, home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(home)
    spec: str | dict[str, object] = f"{name}.yaml"
    if name == "file-a-directory":
        Path("file-a-directory.yaml").mkdir()
    elif name == "file-no-text":
        Path("file-no-text.yaml").write_bytes(b"\xff\xfe\x00")
    elif name == "file-too-large":
        with Path("file-too-large.yaml").open("wb") as file:
            file.truncate(1 << 40)
    elif name == "plain-data":
        spec = {"version": 1, "source": "llama", "edits": [{"op": "quantize.nf4", "modules": ["(", "a"]}], "x": 1}
    with pytest.raises(surgery.SpecError) as caught:
        surgery.plan(spec)
    assert_golden(f"errors/{name}", f"{type(caught.value).__name__}\n{caught.value}")


def test_problems_carry_what_where_and_how_to_mend_it(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(home)
    problems = error_of(CASES["every-problem-at-once"]).problems
    assert len(problems) >= 10
    assert all(problem.what and problem.at.startswith("spec.yaml") for problem in problems)
    lines = {int(problem.at.split(",")[0].partition(":")[2] or 0) for problem in problems}
    assert {3, 5, 8, 9, 12, 13, 14, 18, 19} <= lines


def test_validating_several_specs_reports_the_problems_of_all(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(home)
    Path("a.yaml").write_text(CASES["op-misspelt"].text)
    Path("b.yaml").write_text(CASES["regex-broken"].text)
    Path("c.yaml").write_text(HEAD + "edits: []\n")
    with pytest.raises(surgery.SpecError) as caught:
        surgery.validate(["a.yaml", "b.yaml", "c.yaml", "d.yaml"])
    assert [problem.at[:6] for problem in caught.value.problems] == ["a.yaml", "b.yaml", "d.yaml"]


def test_a_regex_that_matches_thousands_is_refused_in_one_message(home: Path, tmp_path: Path) -> None:
    tensors = {f"layers.{index}.norm.weight": zeros(1) for index in range(3000)}
    save_file(tensors, tmp_path / "model.safetensors")
    spec = {"version": 1, "source": str(tmp_path), "edits": [{"op": "quantize.nf4", "modules": ".*norm"}]}
    with pytest.raises(surgery.OpError) as caught:
        surgery.plan(spec)
    assert len(caught.value.problems) == 1
    assert "and 2999 more modules like it" in str(caught.value)
