"""Makes what is worked on: `python -m tests.bench.models NAME DIRECTORY`.

A NAME is `llama`, `llama-small`, `tensor-SIDE` or `many-NUMBER`; `NAME_1` and `NAME_2` are fine-tuned
variants of it, and `NAME_lora` is an adapter for it. A process of its own, since whoever measures
memory must not have imported torch.
"""

import json
import os
import shutil
import struct
import sys
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

from tests.bench.process import run, warm

LLAMA = {
    "hidden_size": 2048,
    "intermediate_size": 5632,
    "num_hidden_layers": 20,
    "num_attention_heads": 32,
    "num_key_value_heads": 4,
    "vocab_size": 32000,
    "tie_word_embeddings": False,
}
SMALL_LLAMA = {
    **LLAMA,
    "hidden_size": 512,
    "intermediate_size": 1408,
    "num_hidden_layers": 8,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
}
NUM_SHARDS = 4
TENSOR_NAME = "model.layers.0.mlp.up_proj.weight"
MANY_SIDE = 64
NOISE = 1e-3  # standard deviation of a fine-tuned weight from its base, which has 0.02
PIECE_BYTES = 1 << 24
RANK = 16


def source(workdir: Path, name: str) -> Path:
    """The checkpoint or adapter `name` in `workdir`, made if it is not there, its pages in memory."""
    base, _, variant = name.partition("_")
    if variant:
        source(workdir, base)
    directory = workdir / name
    if not directory.exists():
        making = workdir / f"{name}.making"
        shutil.rmtree(making, ignore_errors=True)
        making.mkdir()
        run("-m", "tests.bench.models", name, str(making))
        making.rename(directory)
    warm(directory)
    return directory


def make(name: str, directory: Path) -> None:
    base, _, variant = name.partition("_")
    kind, _, number = name.partition("-")
    if variant == "lora":
        make_lora(directory.parent / base, directory)
    elif variant:
        make_variant(directory.parent / base, directory, seed=int(variant))
    elif kind in NUMBERED:
        NUMBERED[kind](directory, int(number))
    else:
        make_llama(directory, LLAMAS[name])


def make_llama(directory: Path, sizes: Mapping[str, int]) -> None:
    """Random bf16 weights in 4 shards: 1.01 B with LLAMA's sizes, 55 M with SMALL_LLAMA's."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    torch.set_default_dtype(torch.bfloat16)
    model = LlamaForCausalLM(LlamaConfig(**sizes, dtype="bfloat16"))
    num_bytes = 2 * sum(parameter.numel() for parameter in model.parameters())
    model.save_pretrained(directory, max_shard_size=num_bytes // NUM_SHARDS + num_bytes // 40)


def make_tensor(directory: Path, side: int) -> None:
    """One square bf16 matrix in one file; 2 GiB at a side of 32768."""
    import torch

    generator = torch.Generator().manual_seed(0)
    rows = (
        torch.randn(min(256, side - start), side, generator=generator).mul_(0.02).bfloat16()
        for start in range(0, side, 256)
    )
    _write(directory, {TENSOR_NAME: (side, side)}, (piece.view(torch.uint8).numpy().data for piece in rows))
    _write_config(directory, hidden_size=side, intermediate_size=side, num_hidden_layers=1)


def make_many(directory: Path, num_tensors: int) -> None:
    """A Llama of about `num_tensors` tensors of 8 kB, bf16, in one file."""
    import torch

    num_layers = (num_tensors - 3) // 9
    shapes = {"model.embed_tokens.weight": (MANY_SIDE, MANY_SIDE)}
    for layer in range(num_layers):
        attention = [f"self_attn.{name}_proj" for name in "qkvo"]
        mlp = [f"mlp.{name}_proj" for name in ("gate", "up", "down")]
        shapes |= {f"model.layers.{layer}.{name}.weight": (MANY_SIDE, MANY_SIDE) for name in attention + mlp}
        norms = ("input_layernorm", "post_attention_layernorm")
        shapes |= {f"model.layers.{layer}.{name}.weight": (MANY_SIDE,) for name in norms}
    shapes |= {"model.norm.weight": (MANY_SIDE,), "lm_head.weight": (MANY_SIDE, MANY_SIDE)}
    generator = torch.Generator().manual_seed(0)
    weights = (torch.randn(shape, generator=generator).mul_(0.02).bfloat16() for shape in shapes.values())
    _write(directory, shapes, (weight.view(torch.uint8).numpy().data for weight in weights))
    sizes = {"hidden_size": MANY_SIDE, "intermediate_size": MANY_SIDE, "vocab_size": MANY_SIDE, "head_dim": MANY_SIDE}
    heads = {"num_attention_heads": 1, "num_key_value_heads": 1, "tie_word_embeddings": False}
    _write_config(directory, num_hidden_layers=num_layers, **sizes, **heads)


def _write(directory: Path, shapes: dict[str, tuple[int, ...]], data: Iterable[memoryview]) -> None:
    """A file of bf16 tensors, written as it comes."""
    header, offset = {}, 0
    for name, shape in shapes.items():
        stop = offset + 2 * _product(shape)
        header[name] = {"dtype": "BF16", "shape": list(shape), "data_offsets": [offset, stop]}
        offset = stop
    text = json.dumps({"__metadata__": {"format": "pt"}, **header}).encode()
    text += b" " * (-len(text) % 8)
    with (directory / "model.safetensors").open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for piece in data:
            file.write(piece)


def _product(shape: tuple[int, ...]) -> int:
    product = 1
    for size in shape:
        product *= size
    return product


def _write_config(directory: Path, **sizes: int) -> None:
    config = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "dtype": "bfloat16", **sizes}
    (directory / "config.json").write_text(json.dumps(config, indent=1))


def make_variant(base: Path, directory: Path, seed: int) -> None:
    """`base`, all bf16, with a little noise on every weight."""
    import torch

    generator = torch.Generator().manual_seed(seed)
    for path in sorted(base.iterdir()):
        if path.suffix != ".safetensors":
            shutil.copy(path, directory)
            continue
        with path.open("rb") as file, (directory / path.name).open("wb") as out:
            length = file.read(8)
            out.write(length + file.read(*struct.unpack("<Q", length)))
            while piece := bytearray(file.read(PIECE_BYTES)):
                x = torch.frombuffer(piece, dtype=torch.bfloat16)
                noise = torch.randn(x.numel(), generator=generator).mul_(NOISE)
                out.write(noise.add_(x).bfloat16().view(torch.uint8).numpy().data)


def make_lora(base: Path, directory: Path) -> None:
    """A trained LoRA adapter of RANK on every projection of `base`, as PEFT saves one."""
    import torch
    from safetensors.torch import save_file

    from surgery.checkpoint import open_checkpoint

    torch.manual_seed(0)
    factors, targets = {}, set[str]()
    for name, entry in open_checkpoint(str(base)).tensors.items():
        module = name.removesuffix(".weight")
        if module.endswith("_proj"):
            num_outputs, num_inputs = entry.type.shape
            prefix = f"base_model.model.{module}"
            factors[f"{prefix}.lora_A.weight"] = torch.empty(RANK, num_inputs).uniform_(-1, 1) / num_inputs**0.5
            factors[f"{prefix}.lora_B.weight"] = torch.randn(num_outputs, RANK).mul_(0.01)
            targets.add(module.rpartition(".")[2])
    save_file(factors, directory / "adapter_model.safetensors", {"format": "pt"})
    kind = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": os.fspath(base)}
    config = {**kind, "r": RANK, "lora_alpha": 2 * RANK, "target_modules": sorted(targets)}
    (directory / "adapter_config.json").write_text(json.dumps(config, indent=1))


LLAMAS = {"llama": LLAMA, "llama-small": SMALL_LLAMA}
NUMBERED: dict[str, Callable[[Path, int], None]] = {"tensor": make_tensor, "many": make_many}

if __name__ == "__main__":
    make(sys.argv[1], Path(sys.argv[2]))
