"""A merge of three 1B Llamas as whole processes: `surgery apply` and `mergekit-yaml`.

mergekit is timed as it is mostly run: without `dtype`, so that it computes in bfloat16. Ours are timed both
in float32, which is the default, and in bfloat16, where the bits should be mergekit's. For the bits of the
default mergekit runs once more, with `dtype: float32` and `out_dtype: bfloat16`.
"""

import shutil
from pathlib import Path

from tests.bench import contest, models
from tests.bench.equality import Difference, compare
from tests.bench.mergekit import BASE, METHODS, Method, merging, write
from tests.bench.table import mib
from tests.bench.thresholds import num_at_threshold

OURS, SOURCE_DTYPE, PEER = "surgery", "surgery, compute_dtype: source", "mergekit"
ONE_THREAD = "mergekit on one thread"
IN_FLOAT32 = "mergekit in float32 on one thread"
PAIRS = (  # and the dtype of their deltas, if they are the same
    (SOURCE_DTYPE, PEER, "bfloat16"),
    (SOURCE_DTYPE, ONE_THREAD, "bfloat16"),
    (OURS, IN_FLOAT32, "float32"),
    (OURS, PEER, ""),
)


def main(workdir: Path, rounds: int, method_name: str, model: str) -> None:
    method = METHODS[method_name]
    paths = {BASE: models.source(workdir, model)}
    paths |= {name: models.source(workdir, f"{model}_{i + 1}") for i, name in enumerate(method.others)}
    contenders = {
        OURS: contest.apply(write(workdir / "ours.yaml", method.spec(paths)), workdir / "ours"),
        PEER: merging(write(workdir / "peer.yaml", method.config(paths)), workdir / "peer"),
        SOURCE_DTYPE: contest.apply(
            write(workdir / "ours-source.yaml", method.spec(paths, "source")), workdir / "ours-source"
        ),
    }
    contest.print_race(contenders, contest.race(contenders, rounds), PEER)
    float32 = write(workdir / "peer-f32.yaml", method.config(paths, dtype="float32", out_dtype="bfloat16"))
    others = {
        ONE_THREAD: merging(str(workdir / "peer.yaml"), workdir / "peer-one", "--num-threads", "1"),
        IN_FLOAT32: merging(float32, workdir / "peer-f32", "--num-threads", "1"),
    }
    for name, contender in others.items():
        used = contender.run()
        print(f"{name}, once: {used.wall_s:.2f} s, {mib(used.peak_bytes)} MiB")
    outs = {name: contender.out for name, contender in (contenders | others).items()}
    for one, other, dtype in PAIRS:
        difference = compare(outs[one], outs[other])
        where = _at_threshold(method, paths, difference, dtype, (outs[one], outs[other])) if dtype else ""
        print(f"{one}; {other}: {difference}{where}", flush=True)
    for out in outs.values():
        shutil.rmtree(out)


def _at_threshold(
    method: Method, paths: dict[str, Path], difference: Difference, dtype: str, outs: tuple[Path, Path]
) -> str:
    """TIES alone: how many of the elements that differ have a delta exactly as large as the smallest one kept."""
    if method.name != "ties" or not difference.different:
        return ""
    densities = {paths[name]: given["density"] for name, given in method.models.items()}
    number = num_at_threshold(paths[BASE], densities, dtype, outs, difference.different)
    return f"; {number} of these where the delta of a model is its threshold"
