"""What is fuzzed: seeds, how a tree becomes a file, and what is done with the file."""

import io
import json
import struct
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path

import surgery
from surgery.checkpoint.header import parse_header

from .mutation import Tree

Run = Callable[[bytes], None]

LINEARS = ("self_attn.q_proj", "self_attn.k_proj", "mlp.up_proj")
CONFIG: dict[str, Tree] = {
    "model_type": "llama", "architectures": ["LlamaForCausalLM"], "hidden_size": 8, "intermediate_size": 8,
    "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 2, "vocab_size": 16, "rms_norm_eps": 1e-5,
    "tie_word_embeddings": False, "torch_dtype": "float32", "layer_types": ["full_attention", "full_attention"],
    "quantization_config": None,
}  # fmt: skip
ADAPTER: dict[str, Tree] = {
    "peft_type": "LORA", "task_type": "CAUSAL_LM", "r": 2, "lora_alpha": 4, "target_modules": ["q_proj"],
    "rank_pattern": {r"layers\.1\.self_attn\.q_proj": 2}, "alpha_pattern": {"layers.0.self_attn.q_proj": 8},
    "modules_to_save": None, "bias": "none", "use_rslora": False, "use_dora": False, "fan_in_fan_out": False,
    "base_model_name_or_path": None, "layers_to_transform": None, "init_lora_weights": True,
}  # fmt: skip
CAST = {
    "op": "tensor.cast",
    "tensors": r".*\.(q|k)_proj\.weight",
    "except": r".*\.0\..*",
    "dtype": "float16",
    "expect": 2,
}
EDITS: list[Tree] = [
    CAST,
    {"op": "quantize.nf4", "modules": [r".*\.up_proj", r"model\.layers\.0\.self_attn\.q_proj"], "block_size": 64},
    {"op": "tensor.rename", "tensors": r"(lm_head)\.weight", "to": r"head_\1.weight"},
    {"op": "tensor.drop", "tensors": r"lm_head\.weight"},
    {"op": "layers.select", "slices": [{"layers": [0, 1], "scale": {r".*q_proj\.weight": 0.5}}]},
    {"op": "merge.ties", "models": {"other": {"weight": [0, 1], "density": {r".*q_proj.*": 0.5, ".*": 1}}}},
]


@dataclass(frozen=True)
class Target:
    """`prepared` gives what runs one input; it may raise SurgeryError and nothing else."""

    seeds: list[Tree]
    encode: Callable[[Tree], bytes]
    prepared: Callable[[], AbstractContextManager[Run]]


def tensors_of(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Tree]:
    """The header of float32 tensors of these shapes, one after the other."""
    entries: dict[str, Tree] = {}
    position = 0
    for name, shape in shapes.items():
        size = 4
        for length in shape:
            size *= length
        entries[name] = {"dtype": "F32", "shape": list(shape), "data_offsets": [position, position + size]}
        position += size
    return entries


def header_bytes(tree: Tree) -> bytes:
    """The length field and the header, right for whatever `tree` is."""
    raw = json_bytes(tree)
    return struct.pack("<Q", len(raw)) + raw


def json_bytes(tree: Tree) -> bytes:
    """As JSON; what JSON cannot say is written as Python does."""
    return json.dumps(tree).encode()


def write_tensors(path: Path, shapes: Mapping[str, tuple[int, ...]]) -> None:
    """A safetensors file of zeros."""
    entries = tensors_of(shapes)
    size = max(entry["data_offsets"][1] for entry in entries.values())  # pyright: ignore
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(header_bytes(entries) + bytes(size))


def write_model(directory: Path) -> Path:
    """A llama of two layers."""
    layers = {f"model.layers.{index}.{name}.weight": (8, 8) for index in range(2) for name in LINEARS}
    write_tensors(
        directory / "model.safetensors", {"model.embed_tokens.weight": (16, 8), **layers, "lm_head.weight": (16, 8)}
    )
    (directory / "config.json").write_bytes(json_bytes(CONFIG))
    return directory


def write_adapter(directory: Path) -> Path:
    """A LoRA for its queries."""
    shapes = {
        f"base_model.model.model.layers.{index}.self_attn.q_proj.lora_{side}.weight": shape
        for index in range(2)
        for side, shape in (("A", (2, 8)), ("B", (8, 2)))
    }
    write_tensors(directory / "adapter_model.safetensors", shapes)
    (directory / "adapter_config.json").write_bytes(json_bytes(ADAPTER))
    return directory


@contextmanager
def _header() -> Iterator[Run]:
    def run(content: bytes) -> None:
        length = int.from_bytes(content[:8], "little")
        data = 40 if 8 + length <= len(content) else 0
        parse_header(io.BytesIO(content), len(content) + data, "x")

    yield run


@contextmanager
def _index() -> Iterator[Run]:
    with tempfile.TemporaryDirectory() as home:
        for name in "ab":
            write_tensors(Path(home, f"{name}.safetensors"), {f"{name}.weight": (2, 2)})

        def run(content: bytes) -> None:
            Path(home, "model.safetensors.index.json").write_bytes(content)
            str(surgery.inspect(home))

        yield run


@contextmanager
def _config() -> Iterator[Run]:
    with tempfile.TemporaryDirectory() as home:
        model = write_model(Path(home, "model"))
        quantize = {"op": "quantize.nf4", "modules": "all-linear"}
        select = {"op": "layers.select", "drop": [0]}
        attach = {"op": "attach.lora", "name": "x", "modules": "all-linear", "rank": 2}
        specs = [{"version": 1, "source": str(model), "edits": [edit]} for edit in (quantize, select, attach)]

        def run(content: bytes) -> None:
            (model / "config.json").write_bytes(content)
            str(surgery.inspect(model))
            for number, spec in enumerate(specs):
                try:
                    surgery.plan(spec).to_json()
                except surgery.SurgeryError:
                    if number == len(specs) - 1:
                        raise

        yield run


@contextmanager
def _adapter() -> Iterator[Run]:
    with tempfile.TemporaryDirectory() as home:
        model, adapter = write_model(Path(home, "model")), write_adapter(Path(home, "adapter"))
        fold = {
            "version": 1,
            "source": str(model),
            "models": {"a": str(adapter)},
            "edits": [{"op": "adapter.fold", "models": "a"}],
        }

        def run(content: bytes) -> None:
            (adapter / "adapter_config.json").write_bytes(content)
            str(surgery.inspect(adapter))
            surgery.plan(fold).to_json()

        yield run


@contextmanager
def _spec() -> Iterator[Run]:
    with tempfile.TemporaryDirectory() as home:
        path = Path(home, "spec.yaml")

        def run(content: bytes) -> None:
            path.write_bytes(content)
            surgery.load(path)

        yield run


@contextmanager
def _plan() -> Iterator[Run]:
    with tempfile.TemporaryDirectory() as home:
        sources = {name: str(write_model(Path(home, name))) for name in ("model", "other")}
        path = Path(home, "spec.yaml")

        def run(content: bytes) -> None:
            for name, source in sources.items():
                content = content.replace(f"@{name}".encode(), source.encode())
            path.write_bytes(content)
            spec = surgery.load(path)
            if {spec.source, *spec.models.values()} <= set(sources.values()):  # nothing else is opened
                surgery.plan(spec).to_json()

        yield run


def _specs() -> list[Tree]:
    head = {"version": 1, "params": {"x": 1, "y": "a"}, "source": "@model", "seed": 0}
    output = {"shard_size": "5GB"}
    plain: list[Tree] = [{**head, "edits": [edit], "output": output} for edit in EDITS[:-1]]
    merge = {**head, "models": {"other": "@other"}, "edits": [EDITS[-1]]}
    return [*plain, merge, {**head, "edits": [CAST, EDITS[1], EDITS[2]]}]


HEADER: Tree = {
    "__metadata__": {"format": "pt"},
    "a.weight": {"dtype": "F32", "shape": [2, 2], "data_offsets": [0, 16]},
    "b.weight": {"dtype": "BF16", "shape": [3, 4], "data_offsets": [16, 40]},
}
INDEX: Tree = {
    "metadata": {"total_size": 32},
    "weight_map": {"a.weight": "a.safetensors", "b.weight": "b.safetensors"},
}

TARGETS = {
    "header": Target([HEADER], header_bytes, _header),
    "index": Target([INDEX], json_bytes, _index),
    "config": Target(
        [CONFIG, {**CONFIG, "model_type": "gpt2"}, {**CONFIG, "model_type": "mixtral"}], json_bytes, _config
    ),
    "adapter": Target([ADAPTER, {**ADAPTER, "target_modules": r".*q_proj"}], json_bytes, _adapter),
    "spec": Target(_specs(), json_bytes, _spec),
    "plan": Target(_specs(), json_bytes, _plan),
}
