"""What every test shares: no network, one torch thread, and how a checkpoint is converted."""

import os

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol

import pytest
import torch

import surgery


class Convert(Protocol):
    def __call__(
        self, source: Path, edits: Sequence[dict[str, Any]], *, shard_size: str | None = None, **apply_options: Any
    ) -> Path: ...


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> Iterator[None]:
    """The bits of torch's mean depend on its threads; the reference is one."""
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(num_threads)


@pytest.fixture(scope="session")
def convert(tmp_path_factory: pytest.TempPathFactory) -> Convert:
    """`convert(source, edits, **apply_options)` plans and applies; gives the output's directory."""

    def run(
        source: Path, edits: Sequence[dict[str, Any]], *, shard_size: str | None = None, **apply_options: Any
    ) -> Path:
        spec: dict[str, Any] = {"version": 1, "source": str(source), "edits": list(edits)}
        if shard_size is not None:
            spec["output"] = {"shard_size": shard_size}
        out = tmp_path_factory.mktemp("converted") / "out"
        surgery.apply(surgery.plan(spec), out, **apply_options)
        return out

    return run


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    skip = pytest.mark.skip(reason="no CUDA device: GPU bytes are not compared with the CPU's")
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(skip)
