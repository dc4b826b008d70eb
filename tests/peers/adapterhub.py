"""The `adapters` library pins an old transformers, so it lives in an environment of its own; this runs it there."""

import json
import os
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
SIDE = Path(__file__).with_name("adapterhub_side.py")


def adapters_python() -> Path:
    """The interpreter that has `adapters`; skips the test where there is none."""
    named = os.environ.get("SURGERY_ADAPTERS_PYTHON")
    python = Path(named) if named else ROOT / ".venv-adapters/bin/python"
    if not python.exists():
        pytest.skip(f"no adapters library: set SURGERY_ADAPTERS_PYTHON, or install adapters==1.3.0 into {python}")
    return python


def run_jobs(jobs: Sequence[dict[str, Any]], directory: Path) -> list[dict[str, Any]]:
    """What the adapters library answers to each job, all in one process."""
    python = adapters_python()
    (directory / "jobs.json").write_text(json.dumps(list(jobs)))
    answers = directory / "answers.json"
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONPATH": ""}
    command = [str(python), "-I", str(SIDE), str(directory / "jobs.json"), str(answers)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(answers.read_text())
