"""SIGKILL at any moment: OUT is absent or whole, and the next run goes on to the same bytes."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import models
import pytest
from hub import Hub, environment, files_of, serving

KILLS = 50
COMMIT, OTHER = "a" * 40, "b" * 40
EDITS = [
    {"op": "merge.ties", "models": {"donor": {"weight": 1.0, "density": 0.5}}},
    {"op": "quantize.nf4", "modules": "all-linear"},
    {"op": "attach.lora", "name": "new", "modules": "all-linear", "rank": 4, "alpha": 8},
]
SIZES: dict[str, Any] = {"hidden_size": 256, "intermediate_size": 640, "num_hidden_layers": 5}


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return models.llama(tmp_path_factory.mktemp("crash") / "source", max_shard_size="3MB", **SIZES)


@pytest.fixture(scope="module")
def donor(source: Path) -> Path:
    return models.llama(source.with_name("donor"), **SIZES)


@pytest.fixture(scope="module")
def hub(source: Path, donor: Path) -> Iterator[Hub]:
    with serving("org/model", {"main": COMMIT}, {COMMIT: files_of(source)}) as hub:
        hub.more = {"org/donor": {OTHER: files_of(donor)}}
        yield hub


def spec_of(source: str | Path, donor: str | Path, shard_size: str) -> dict[str, Any]:
    models = {"donor": str(donor)}
    return {"version": 1, "source": str(source), "models": models, "edits": EDITS, "output": {"shard_size": shard_size}}


def crash(home: Path, environ: dict[str, str], **job: Any) -> dict[str, Any]:
    done = subprocess.run(
        [sys.executable, "-m", "crash", json.dumps({**job, "home": str(home)})],
        cwd=Path(__file__).parent,
        env=environ,
        capture_output=True,
        text=True,
        timeout=900,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.parametrize(("shard_size", "kills"), [("1MB", KILLS), ("1GB", KILLS // 2)])
def test_local_runs_are_killed_at_random_moments(
    shard_size: str, kills: int, source: Path, donor: Path, tmp_path: Path
) -> None:
    spec = spec_of(source, donor, shard_size)
    found = crash(tmp_path, dict(os.environ), kind="random_moments", spec=spec, kills=kills, seed=1)
    assert found["kills"] >= kills
    assert found["half"] == found["differ"] == []
    assert found["resumed"] >= kills // 10, "nothing was gone on from"


def test_runs_from_the_hub_are_killed_at_random_moments(hub: Hub, tmp_path: Path) -> None:
    spec = spec_of("org/model", "org/donor", "1MB")
    found = crash(tmp_path, environment(tmp_path, hub), kind="random_moments", spec=spec, kills=KILLS, seed=2)
    assert found["kills"] >= KILLS
    assert found["half"] == found["differ"] == []
    assert found["resumed"] >= KILLS // 10, "nothing was gone on from"


@pytest.mark.parametrize("overwrite", [False, True])
def test_a_run_is_killed_before_each_change_of_the_disk(
    overwrite: bool, source: Path, donor: Path, tmp_path: Path
) -> None:
    spec = spec_of(source, donor, "1MB")
    found = crash(tmp_path, dict(os.environ), kind="every_call", spec=spec, at_most=40, overwrite=overwrite)
    assert found["kills"] >= 30
    assert found["half"] == found["differ"] == []
