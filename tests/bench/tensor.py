"""One tensor, of 2 GiB, under little memory: what is held beyond the imports stays under --memory."""

import shutil
from pathlib import Path

from tests.bench import models
from tests.bench.contest import apply
from tests.bench.mergekit import BASE, METHODS, Method, write
from tests.bench.process import import_footprint
from tests.bench.table import MIB, mib, print_table

SIDE = 32768
LIMITS_MIB = {"nf4": (64, 256, 2048), "slerp": (72, 256, 2048)}  # the first is close to what is refused
IMPORTS = "import surgery.stream, torch"
MERGES = {
    "linear": Method("linear", {BASE: {"weight": 0.5}, "one": {"weight": 0.5}}, {}),
    "ties": Method("ties", {"one": {"weight": 0.6, "density": 0.5}}, {}),
    "slerp": METHODS["slerp"],
}


def main(workdir: Path, rounds: int, op: str, side: int) -> None:
    spec, out = _spec(workdir, op, f"tensor-{side}"), workdir / "out"
    footprint = import_footprint(IMPORTS)
    head = ["--memory MiB", "wall s", "cpu s", "peak RSS MiB", "imports", "beyond imports", "limit", "of it anonymous"]
    rows = []
    for limit in LIMITS_MIB.get(op, LIMITS_MIB["nf4"]) * rounds:
        used = apply(spec, out, "--memory", f"{limit}MiB").run()
        beyond = used.peak_bytes - footprint.peak_bytes
        verdict = "kept" if beyond <= limit * MIB else "EXCEEDED"
        anonymous = used.peak_anonymous_bytes - footprint.peak_anonymous_bytes
        figures = [mib(used.peak_bytes), mib(footprint.peak_bytes), mib(beyond), verdict, mib(anonymous)]
        rows.append([str(limit), f"{used.wall_s:.2f}", f"{used.cpu_s:.2f}", *figures])
    print_table(head, rows)
    shutil.rmtree(out)


def _spec(workdir: Path, op: str, model: str) -> str:
    source = models.source(workdir, model)
    if op == "nf4":
        edit = {"op": "quantize.nf4", "modules": "all-linear"}
        return write(workdir / "spec.yaml", {"version": 1, "source": str(source), "edits": [edit]})
    paths = {BASE: source, "one": models.source(workdir, f"{model}_1")}
    return write(workdir / "spec.yaml", MERGES[op].spec(paths))
