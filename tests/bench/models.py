"""Makes the checkpoints that are converted: `python -m tests.bench.models llama|tensor DIRECTORY`.

A process of its own, since whoever measures memory must not have imported torch.
"""

import json
import struct
import sys
from collections.abc import Callable
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
NUM_SHARDS = 4
TENSOR_NAME = "model.layers.0.mlp.up_proj.weight"
TENSOR_SIDE = 32768


def source(workdir: Path, name: str) -> Path:
    """The checkpoint `name` in `workdir`, made if it is not there, its pages in memory."""
    directory = workdir / name
    if not (directory / "config.json").exists():
        run("-m", "tests.bench.models", name, str(directory))
    warm(directory)
    return directory


def make_llama(directory: Path) -> None:
    """1.01 B random bf16 weights in 4 shards."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    torch.set_default_dtype(torch.bfloat16)
    model = LlamaForCausalLM(LlamaConfig(**LLAMA, dtype="bfloat16"))
    num_bytes = 2 * sum(parameter.numel() for parameter in model.parameters())
    model.save_pretrained(directory, max_shard_size=num_bytes // NUM_SHARDS + num_bytes // 40)


def make_tensor(directory: Path) -> None:
    """One bf16 matrix of 2 GiB in one file."""
    import torch

    directory.mkdir(parents=True)
    shape, num_bytes = [TENSOR_SIDE, TENSOR_SIDE], 2 * TENSOR_SIDE**2
    header = json.dumps({TENSOR_NAME: {"dtype": "BF16", "shape": shape, "data_offsets": [0, num_bytes]}}).encode()
    header += b" " * (-len(header) % 8)
    generator = torch.Generator().manual_seed(0)
    with (directory / "model.safetensors").open("wb") as file:
        file.write(struct.pack("<Q", len(header)) + header)
        for _ in range(0, TENSOR_SIDE, 256):
            rows = torch.randn(256, TENSOR_SIDE, generator=generator).mul_(0.02).bfloat16()
            file.write(memoryview(rows.view(torch.uint8).numpy()))
    config = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "dtype": "bfloat16"}
    config |= {"hidden_size": TENSOR_SIDE, "intermediate_size": TENSOR_SIDE, "num_hidden_layers": 1}
    (directory / "config.json").write_text(json.dumps(config, indent=1))


MAKERS: dict[str, Callable[[Path], None]] = {"llama": make_llama, "tensor": make_tensor}

if __name__ == "__main__":
    MAKERS[sys.argv[1]](Path(sys.argv[2]))
