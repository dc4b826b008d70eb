"""Sources on the Hub: the true client against a Hub of our own on the loopback, pinned, and never a pickle."""

import json
import re
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hub import Hub, command, files_of, serving
from jsonschema import Draft202012Validator
from safetensors.torch import save_file

import surgery
from surgery.checkpoint import remote, repository

ROOT = Path(__file__).parents[1]
REPO = "org/tiny"
OLD, NEW = "0" * 39 + "1", "a" * 40
PICKLES = ("pytorch_model.bin", "optimizer.pt", "onnx/model.onnx", "tf_model.h5")


@pytest.fixture(scope="module")
def local(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The repository's files at NEW, as a local directory."""
    path = tmp_path_factory.mktemp("local") / "tiny"
    (path / "onnx").mkdir(parents=True)
    save_file(
        {"layers.0.up_proj.weight": torch.randn(64, 64), "norm.weight": torch.ones(8)}, path / "model.safetensors"
    )
    (path / "config.json").write_text('{"model_type": "llama"}')
    (path / "tokenizer.json").write_text("{}")
    for name in PICKLES:
        (path / name).write_bytes(b"cos\nsystem\n(S'exit'\ntR.")
    return path


@pytest.fixture
def hub(local: Path) -> Iterator[Hub]:
    files = files_of(local)
    with serving(
        REPO,
        {"main": NEW, "v1": OLD, "refs/pr/1": OLD},
        {NEW: files, OLD: {**files, "tokenizer.json": b'{"old": 1}'}},
    ) as hub:
        yield hub


@pytest.fixture
def home(tmp_path: Path) -> Path:
    """The working directory, with a spec whose source is a parameter."""
    edits = "edits:\n  - {op: quantize.nf4, modules: all-linear}\n"
    (tmp_path / "spec.yaml").write_text(f"version: 1\nparams: {{model: {REPO}}}\nsource: ${{model}}\n{edits}")
    return tmp_path


def manifest_of(out: Path) -> dict[str, Any]:
    return json.loads((out / "surgery-manifest.json").read_text())


def test_a_repository_gives_the_bytes_of_a_local_copy(home: Path, hub: Hub, local: Path) -> None:
    run = command(home, hub, "apply", "spec.yaml", "-o", "out")
    assert run.returncode == 0, run.stderr
    surgery.apply(surgery.plan(home / "spec.yaml", model=str(local)), home / "again")
    written, again = ({path.name: path.read_bytes() for path in (home / name).iterdir()} for name in ("out", "again"))
    assert written.pop("surgery-manifest.json") != again.pop("surgery-manifest.json")
    assert written == again


def test_the_manifest_names_the_commit(home: Path, hub: Hub) -> None:
    assert command(home, hub, "apply", "spec.yaml", "-o", "out").returncode == 0
    manifest = manifest_of(home / "out")
    assert manifest["source"]["identity"] == manifest["spec"]["source"] == f"{REPO}@{NEW}"
    assert str(home) not in json.dumps(manifest)
    Draft202012Validator(json.loads((ROOT / "schemas" / "manifest.v1.schema.json").read_text())).validate(manifest)


@pytest.mark.parametrize("option", [[], ["--download"]], ids=["streamed", "downloaded"])
def test_no_pickle_is_fetched(option: list[str], home: Path, hub: Hub) -> None:
    run = command(home, hub, "apply", "spec.yaml", "-o", "out", *option)
    assert run.returncode == 0, run.stderr
    fetched = {path.rpartition(f"{NEW}/")[2] for _, path in hub.asked if "/resolve/" in path}
    assert fetched == {"config.json", "tokenizer.json", "model.safetensors"}


def test_a_plan_from_the_config_alone_fetches_the_config_alone(home: Path, hub: Hub) -> None:
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4, "num_hidden_layers": 2}
    config = json.dumps({"model_type": "llama", "vocab_size": 96, **sizes})
    hub.files[NEW] = {**hub.files[NEW], "config.json": config.encode()}
    run = command(home, hub, "plan", "spec.yaml", "--config-only")
    assert run.returncode == 0, run.stderr
    assert {path.rpartition(f"{NEW}/")[2] for _, path in hub.asked if "/resolve/" in path} == {"config.json"}


@pytest.mark.parametrize(("revision", "commit"), [("v1", OLD), ("refs/pr/1", OLD), (OLD, OLD), ("main", NEW)])
def test_a_revision_is_resolved_to_its_commit(revision: str, commit: str, home: Path, hub: Hub) -> None:
    run = command(home, hub, "plan", "spec.yaml", "--json", "--set", f"model={REPO}@{revision}")
    assert run.returncode == 0, run.stderr
    plan = json.loads(run.stdout)
    assert plan["source"] == f"{REPO}@{commit}"
    Draft202012Validator(json.loads((ROOT / "schemas" / "plan.v1.schema.json").read_text())).validate(plan)


def test_the_output_is_made_again_without_being_told_where_the_source_is(home: Path, hub: Hub) -> None:
    assert command(home, hub, "apply", "spec.yaml", "-o", "out").returncode == 0
    hub.revisions["main"] = OLD  # the branch moves on; the manifest names the commit
    run = command(home, hub, "verify", "out", "--reproduce")
    assert (run.returncode, run.stderr) == (0, "")
    assert "made again byte for byte" in run.stdout


MERGE = """version: 1
source: REPO@v1
models: {other: REPO}
edits:
  - {op: merge.linear, models: {source: {weight: 1}, other: {weight: 3}}}
""".replace("REPO", REPO)


def test_models_of_a_merge_come_from_the_hub_and_can_be_made_again(home: Path, hub: Hub) -> None:
    (home / "merge.yaml").write_text(MERGE)
    run = command(home, hub, "apply", "merge.yaml", "-o", "out")
    assert run.returncode == 0, run.stderr
    manifest = manifest_of(home / "out")
    assert manifest["models"]["other"]["identity"] == manifest["spec"]["models"]["other"] == f"{REPO}@{NEW}"
    assert manifest["source"]["identity"] == f"{REPO}@{OLD}"
    assert command(home, hub, "verify", "out", "--reproduce").returncode == 0


def test_a_repository_in_the_cache_of_the_client_is_a_source(home: Path, hub: Hub) -> None:
    assert command(home, hub, "plan", "spec.yaml", "--download").returncode == 0
    (repository,) = (home / "cache" / "hub").glob("models--*")
    run = command(home, hub, "plan", "spec.yaml", "--json", "--set", f"model={repository}", HF_HUB_OFFLINE="1")
    assert json.loads(run.stdout)["source"] == f"{REPO}@{NEW}"
    (repository / "refs" / "main").write_text("0" * 40)
    message = failure(command(home, hub, "plan", "spec.yaml", "--set", f"model={repository}"))
    assert "no `refs/main` among them" in message


def test_a_cached_commit_needs_no_network(home: Path, hub: Hub) -> None:
    assert command(home, hub, "plan", "spec.yaml", "--download").returncode == 0
    num_asked = len(hub.asked)
    run = command(home, hub, "plan", "spec.yaml", "--json", HF_HUB_OFFLINE="1")
    assert json.loads(run.stdout)["source"] == f"{REPO}@{NEW}"
    assert len(hub.asked) == num_asked


def test_a_local_path_wins_over_the_hub(home: Path, hub: Hub, local: Path) -> None:
    (home / "org").mkdir()
    (home / "org" / "tiny").symlink_to(local)
    run = command(home, hub, "plan", "spec.yaml", "--json")
    assert json.loads(run.stdout)["source"].startswith("sha256:")
    assert hub.asked == []


def failure(run: subprocess.CompletedProcess[str]) -> str:
    assert (run.returncode, run.stdout) == (1, "")
    assert re.match(r"error: .*\n  at   .*\n  fix  .*\n\Z", run.stderr), run.stderr
    return run.stderr


def test_a_repository_that_does_not_exist_is_refused(home: Path, hub: Hub) -> None:
    message = failure(command(home, hub, "plan", "spec.yaml", "--set", "model=org/other"))
    assert "at   org/other" in message and "hf auth login" in message


def test_a_revision_that_does_not_exist_is_refused(home: Path, hub: Hub) -> None:
    message = failure(command(home, hub, "plan", "spec.yaml", "--set", f"model={REPO}@v9"))
    assert f"{REPO}@v9" in message and "check what follows the @" in message


def test_a_hub_that_is_not_there_is_named_as_the_cause(home: Path, hub: Hub) -> None:
    nobody = "http://127.0.0.1:9"
    message = failure(command(home, hub, "plan", "spec.yaml", HF_ENDPOINT=nobody))
    assert REPO in message and "network" in message


def test_an_id_that_is_none_never_reaches_the_hub(home: Path, hub: Hub) -> None:
    for source in ("tiny", "a/b/c", "org/tiny@", "./org/tiny", "../tiny", "~/tiny", "org/../x@y/z", "--/--"):
        message = failure(command(home, hub, "plan", "spec.yaml", "--set", f"model={source}"))
        assert source in message
    assert hub.asked == []


def test_a_damaged_download_is_refused(home: Path, hub: Hub) -> None:
    hub.files[NEW]["model.safetensors"] = hub.files[NEW]["model.safetensors"][:-4]
    message = failure(command(home, hub, "plan", "spec.yaml"))
    assert "is truncated" in message and f"{NEW}/model.safetensors" in message


def test_a_server_that_sends_byte_by_byte_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    @contextmanager
    def dripping(file: remote.RemoteFile, start: int, stop: int) -> Iterator[Any]:
        yield SimpleNamespace(iter_raw=lambda: (b"x" for _ in range(start, stop)))

    monkeypatch.setattr(remote, "_opened", dripping)
    monkeypatch.setattr(remote, "pause", lambda seconds: None)
    monkeypatch.setattr(remote, "PATIENCE", 0.0)
    monkeypatch.setattr(remote, "LEAST_RATE", 1 << 60)
    with pytest.raises(surgery.CheckpointError, match=r"cannot be read from the Hub(.|\n)*bytes a second"):
        remote.fetch_bytes(remote.RemoteFile("org/x", "c" * 40, "x", 1000))


def test_a_listing_that_leads_back_to_itself_is_refused() -> None:
    entries = [SimpleNamespace(path=name) for name in ("a", "b", "a")]
    with pytest.raises(surgery.CheckpointError, match="is listed twice"):
        repository._distinct(iter(entries))  # pyright: ignore[reportPrivateUsage, reportArgumentType]
