"""What the Hub takes of the disk, shown on a filesystem that holds no more: a tmpfs in a namespace of its own."""

import json
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from hub import Hub, environment, files_of, serving
from safetensors.torch import save_file

import surgery

REPO = "org/model"
DONORS = ("first", "second")
ROOM = 1 << 20  # for whole pages, index, config and manifest
TIES = {"op": "merge.ties", "models": {name: {"weight": 1, "density": 0.4} for name in DONORS}}


@cache
def namespace() -> list[str]:
    """The command that gives the one after it mounts of its own; none where that is not allowed."""
    for options in ("-m", "-rm"):
        start = ["unshare", options]
        tried = [*start, "sh", "-c", "mount -t tmpfs -o size=1m none /mnt"]
        if shutil.which("unshare") and subprocess.run(tried, capture_output=True).returncode == 0:
            return start
    return []


def write_model(path: Path, seed: int) -> Path:
    """Three shards of one matrix, 12 MB each."""
    path.mkdir()
    generator = torch.Generator().manual_seed(seed)
    weight_map: dict[str, str] = {}
    for number in range(3):
        file, name = f"model-{number + 1:05d}-of-00003.safetensors", f"model.layers.{number}.mlp.up_proj.weight"
        save_file({name: torch.randn(3072, 1024, generator=generator)}, path / file, {"format": "pt"})
        weight_map[name] = file
    (path / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    (path / "config.json").write_text('{"model_type": "llama", "num_hidden_layers": 3}')
    return path


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    parent = tmp_path_factory.mktemp("models")
    return {name: write_model(parent / name, seed) for seed, name in enumerate((REPO.split("/")[1], *DONORS))}


@pytest.fixture
def hub(models: dict[str, Path]) -> Iterator[Hub]:
    with serving(REPO, {"main": "c" * 40}, {"c" * 40: files_of(models["model"])}) as hub:
        hub.more = {f"org/{name}": {str(number) * 40: files_of(models[name])} for number, name in enumerate(DONORS)}
        yield hub


@pytest.fixture
def home(tmp_path: Path) -> Path:
    spec = {"version": 1, "source": REPO, "models": {name: f"org/{name}" for name in DONORS}, "edits": [TIES]}
    (tmp_path / "spec.yaml").write_text(json.dumps({**spec, "output": {"shard_size": "13MB"}}))
    (tmp_path / "disk").mkdir()
    return tmp_path


def applied_within(num_bytes: int, home: Path, hub: Hub, *options: str) -> "subprocess.CompletedProcess[str]":
    """`surgery apply` on a filesystem of so many bytes; OUT is moved to `kept`, and what else lies there listed."""
    if not namespace():
        pytest.skip("no tmpfs can be mounted here, not even in a namespace of its own")
    apply = shlex.join([sys.executable, "-m", "surgery", "apply", "spec.yaml", "-o", "disk/out", *options])
    after = "result=$?; test -e disk/out && cp -r disk/out kept; ls -A disk >left; exit $result"
    script = f"mount -t tmpfs -o size={num_bytes} none disk && {apply}; {after}"
    return subprocess.run(
        [*namespace(), "sh", "-c", script],
        cwd=home,
        env=environment(home, hub),
        capture_output=True,
        text=True,
        timeout=120,
    )


def sent_once(hub: Hub) -> bool:
    spans = [sorted(found) for name, found in hub.served.by_path.items() if name.endswith(".safetensors")]
    return all(stop <= start for found in spans for (_, stop), (start, _) in pairwise(found))


def least_memory(home: Path, hub: Hub) -> int:
    run = subprocess.run(
        [sys.executable, "-m", "surgery", "plan", "spec.yaml", "--json"],
        cwd=home,
        env=environment(home, hub),
        capture_output=True,
        text=True,
        check=True,
    )
    hub.served.by_path.clear()
    return json.loads(run.stdout)["cost"]["min_memory_bytes"]


def test_the_disk_holds_the_output_and_the_memory_and_no_more(
    home: Path, hub: Hub, models: dict[str, Path], tmp_path: Path
) -> None:
    """A matrix of each model is read twice, and fits nowhere but on scratch between."""
    written = sum(path.stat().st_size for path in models["model"].iterdir())
    memory = least_memory(home, hub)
    run = applied_within(written + memory + ROOM, home, hub, "--memory", str(memory), "--workers", "1")
    assert run.returncode == 0, run.stderr
    assert (home / "left").read_text() == "out\n"
    assert sent_once(hub)
    spec = json.loads((home / "spec.yaml").read_text())
    local = {**spec, "source": str(models["model"]), "models": {name: str(models[name]) for name in DONORS}}
    surgery.apply(surgery.plan(local), tmp_path / "again")
    for path in (tmp_path / "again").glob("*.safetensors"):
        assert (home / "kept" / path.name).read_bytes() == path.read_bytes()


def test_what_scratch_has_no_room_for_is_read_again(home: Path, hub: Hub, models: dict[str, Path]) -> None:
    written = sum(path.stat().st_size for path in models["model"].iterdir())
    memory = least_memory(home, hub)
    run = applied_within(written + ROOM, home, hub, "--memory", str(memory), "--workers", "1")
    assert run.returncode == 0, run.stderr
    assert (home / "left").read_text() == "out\n"


def test_a_disk_that_is_too_small_for_the_output_is_refused(home: Path, hub: Hub, models: dict[str, Path]) -> None:
    written = sum(path.stat().st_size for path in models["model"].glob("*.safetensors"))
    run = applied_within(written - ROOM, home, hub)
    assert run.returncode == 1
    assert "free, the output takes" in run.stderr
    assert (home / "left").read_text() == ""
    assert not [
        name for name in hub.served.by_path if name.endswith(".safetensors") and len(hub.served.by_path[name]) > 1
    ]
