"""`merge.*` against mergekit itself: the same models, the same numbers, every tensor bit for bit."""

import json
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import surgery
from tests import models, peers

Config = dict[str, Any]
ARCHITECTURES: dict[str, Config] = {
    "llama": {},
    "qwen2": {"tie": False},
    "gpt2": {},
    "t5": {"feed_forward_proj": "gated-gelu", "tie_word_embeddings": False, "num_layers": 2},
}
GRADIENT = [0.1, 0.9, 0.4]

# name: mergekit's method, base, parameters of the edit, parameters of each model; our edit has the same words
LISTED: dict[str, tuple[str, Config, Config]] = {
    "linear": ("linear", {}, {"base": {"weight": 1.0}, "a": {"weight": GRADIENT}, "b": {"weight": -0.2}}),
    "linear-plain-sum": ("linear", {"normalize": False}, {"base": {"weight": 0.5}, "b": {"weight": 0.3}}),
    "nuslerp": ("nuslerp", {}, {"a": {"weight": 0.7}, "b": {"weight": 0.5}}),
    "multislerp": ("multislerp", {}, {"base": {"weight": 0.2}, "a": {"weight": 0.7}, "b": {"weight": 0.5}}),
    "karcher": ("karcher", {}, {"base": {}, "a": {}, "b": {}}),
}
PAIR = {"a": {"weight": 0.7}, "b": {"weight": GRADIENT}}
DENSE = {"a": {"weight": 0.7, "density": 1.0}, "b": {"weight": GRADIENT, "density": 1.0}}
BASED: dict[str, tuple[str, Config, Config]] = {
    "slerp": ("slerp", {"t": GRADIENT}, {"a": {}}),
    "nuslerp-of-deltas": ("nuslerp", {}, PAIR),
    "nuslerp-by-rows": ("nuslerp", {"nuslerp_flatten": False}, PAIR),
    "task_arithmetic": ("task_arithmetic", {"lambda": 0.8}, PAIR),
    "task_arithmetic-normalized": ("task_arithmetic", {"normalize": True}, PAIR),
    "ties-dense": ("ties", {}, DENSE),
    "ties-dense-sum": ("ties", {"normalize": False, "lambda": 1.5}, DENSE),
    "dare_linear-dense": ("dare_linear", {}, DENSE),
    "dare_ties-dense": ("dare_ties", {}, DENSE),
    "breadcrumbs-dense": ("breadcrumbs", {}, DENSE),
    "breadcrumbs_ties-dense": ("breadcrumbs_ties", {}, DENSE),
    "model_stock": ("model_stock", {}, {"a": {}, "b": {}}),
    "model_stock-by-rows": ("model_stock", {"filter_wise": True}, {"a": {}, "b": {}}),
    "multislerp-of-deltas": ("multislerp", {}, PAIR),
    "sce": ("sce", {"select_topk": 1.0}, {"a": {}, "b": {}}),
    "nearswap": ("nearswap", {"t": 0.01}, {"a": {}}),
    "ram": ("ram", {}, {"a": {}, "b": {}}),
    "ramplus": ("ramplus_tl", {"r": 0.2}, {"a": {}, "b": {}}),
    "arcee_fusion": ("arcee_fusion", {}, {"a": {}}),
}
METHODS = [*LISTED, *BASED]
WIDENED = ("ramplus", "arcee_fusion")  # mergekit writes float32 whatever the inputs are; we write their dtype
COMPUTE: dict[str, Config] = {"source": {}, "float32": {"dtype": "float32", "out_dtype": "bfloat16"}}


def tuned(kind: str, path: Path, base: Path, seed: int) -> Path:
    """The base with a little noise on every weight."""
    generator = torch.Generator().manual_seed(seed)
    path.mkdir()
    (path / "config.json").write_bytes((base / "config.json").read_bytes())
    tensors = {
        name: (x.float() + 0.02 * torch.randn(x.shape, generator=generator)).to(x.dtype)
        for name, x in load_file(base / "model.safetensors").items()
    }
    save_file(tensors, path / "model.safetensors", {"format": "pt"})
    return path


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Path]]:
    """For each architecture a base and two models tuned from it."""
    root = tmp_path_factory.mktemp("merged")
    found: dict[str, dict[str, Path]] = {}
    for kind, options in ARCHITECTURES.items():
        torch.manual_seed(0)
        base = getattr(models, kind)(root / f"{kind}-base", **options)
        found[kind] = {"base": base}
        for seed, name in enumerate("ab", 1):
            found[kind][name] = tuned(kind, root / f"{kind}-{name}", base, seed)
    return found


def mergekit_config(paths: dict[str, Path], method: str, compute: str) -> Config:
    word, shared, each = (LISTED | BASED)[method]
    given = {
        "merge_method": word,
        "models": [{"model": str(paths[name]), "parameters": numbers} for name, numbers in each.items()],
        "parameters": shared,
        **COMPUTE[compute],
    }
    return {**given, "base_model": str(paths["base"])} if method in BASED else given


@pytest.fixture(scope="module")
def merged_by_mergekit(
    sources: dict[str, dict[str, Path]], tmp_path_factory: pytest.TempPathFactory
) -> dict[tuple[str, str, str], Path]:
    """All of mergekit's merges, in one process of its own environment."""
    python = peers.mergekit_python()
    if python is None:
        pytest.skip("mergekit is not installed: .ci/run makes .venv-mergekit")
    root = tmp_path_factory.mktemp("mergekit")
    outs = {
        (kind, method, compute): root / f"{kind}-{method}-{compute}"
        for kind in ARCHITECTURES
        for method in METHODS
        for compute in COMPUTE
    }
    jobs = [[mergekit_config(sources[key[0]], *key[1:]), str(out)] for key, out in outs.items()]
    (root / "jobs.json").write_text(json.dumps(jobs))
    script = Path(peers.__file__).parent / "mergekit_run.py"
    done = subprocess.run([str(python), str(script), str(root / "jobs.json")], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return outs


def merge(paths: dict[str, Path], method: str, out: Path, **options: Any) -> dict[str, Tensor]:
    word, shared, each = (LISTED | BASED)[method]
    word = {"ramplus_tl": "ramplus"}.get(word, word)
    names = {"source" if name == "base" else name: numbers for name, numbers in each.items()}
    if method == "nuslerp":  # of two models that are not the source
        names = {"source" if name == "a" else name: numbers for name, numbers in each.items()}
        paths = {**paths, "base": paths["a"]}
    listed: Any = names if any(names.values()) else list(names)
    edit = {"op": f"merge.{word}", "models": listed, **shared, **options}
    others = {name: str(paths[name]) for name in names if name != "source"}
    spec = {"version": 1, "source": str(paths["base"]), "models": others, "edits": [edit]}
    surgery.apply(surgery.plan(spec), out)
    return load_file(out / "model.safetensors")


@pytest.mark.parametrize("compute", COMPUTE)
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_every_tensor_is_that_of_mergekit(
    kind: str,
    method: str,
    compute: str,
    sources: dict[str, dict[str, Path]],
    merged_by_mergekit: dict[tuple[str, str, str], Path],
    tmp_path: Path,
) -> None:
    ours = merge(sources[kind], method, tmp_path / "out", compute_dtype=compute)
    (file,) = merged_by_mergekit[kind, method, compute].glob("*.safetensors")
    theirs = load_file(file)
    if method in WIDENED:
        theirs = {name: x.to(ours[name].dtype) for name, x in theirs.items()}
    assert theirs.keys() <= ours.keys()
    unlike = {name: (ours[name] != theirs[name]).sum().item() for name in theirs if not equal(ours[name], theirs[name])}
    assert not unlike


def equal(one: Tensor, other: Tensor) -> bool:
    return one.dtype == other.dtype and torch.equal(one, other)
