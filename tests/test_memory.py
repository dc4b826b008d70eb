"""Peak resident memory stays under the imports' footprint plus --memory, whatever the tensor's size."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from surgery.checkpoint.header import encode_header
from surgery.types import DType, TensorType

GIB = 1 << 30
MIB = 1 << 20
NAME = "model.layers.0.mlp.up_proj.weight"

# The high-water mark of this process alone: getrusage would count the parent that forked it.
HIGH_WATER = "int(open('/proc/self/status').read().split('VmHWM:')[1].split()[0]) * 1024"
FOOTPRINT = f"import torch, surgery, surgery.cli, surgery.write; torch.ones(8).sum(); print({HIGH_WATER})"
APPLY = f"""
import sys
from surgery.cli import main
try:
    main(sys.argv[1:])
finally:
    print({HIGH_WATER})
"""


def peak_bytes(code: str, *arguments: str) -> int:
    run = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, check=True)
    return int(run.stdout.splitlines()[-1])


def one_large_tensor(directory: Path) -> Path:
    """A checkpoint of one 2 GiB weight: its first and last 8 MiB are random, the rest a hole in the file."""
    directory.mkdir()
    type_ = TensorType(DType.BF16, (32768, 32768))
    header = encode_header({NAME: (type_, 0)}, {"format": "pt"})
    piece = b"".join(os.urandom(1) + b"\x3c" for _ in range(4096)) * 1024  # bf16 values around 0.01
    with (directory / "model.safetensors").open("wb") as file:
        file.write(header + piece)
        file.truncate(len(header) + 2 * GIB)
        file.seek(-len(piece), os.SEEK_END)
        file.write(piece)
    (directory / "config.json").write_text(json.dumps({"model_type": "llama"}))
    return directory


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return one_large_tensor(tmp_path_factory.mktemp("large") / "model")


@pytest.mark.parametrize("memory", [256, 64])
def test_a_tensor_of_two_gigabytes_is_quantized_in_a_fraction_of_it(large: Path, memory: int) -> None:
    out = large.parent / f"out-{memory}"
    footprint = peak_bytes(FOOTPRINT)
    peak = peak_bytes(
        APPLY, "apply", "nf4", "--set", f"model={large}", "-o", str(out), "--memory", f"{memory}MiB", "--workers", "2"
    )
    assert peak < footprint + memory * MIB


def test_the_bytes_do_not_depend_on_the_memory(large: Path) -> None:
    manifests = [(large.parent / f"out-{memory}" / "surgery-manifest.json").read_bytes() for memory in (256, 64)]
    assert manifests[0] == manifests[1]
