"""One tensor of 2 GiB to NF4: memory beyond the imports stays under --memory, however large a tensor is."""

import shutil
from pathlib import Path

from tests.bench import models
from tests.bench.process import import_footprint, run
from tests.bench.table import MIB, mib, print_table

LIMITS_MIB = (64, 256, 2048)
IMPORTS = "import surgery.stream, torch"


def main(workdir: Path, rounds: int) -> None:
    source, out = models.source(workdir, "tensor"), workdir / "out"
    footprint = import_footprint(IMPORTS)
    head = ["--memory MiB", "wall s", "cpu s", "peak RSS MiB", "imports", "beyond imports", "limit", "of it anonymous"]
    rows = []
    for limit in LIMITS_MIB * rounds:
        shutil.rmtree(out, ignore_errors=True)
        apply = ("-m", "surgery", "apply", "nf4", "--set", f"model={source}")
        used = run(*apply, "-o", str(out), "--memory", f"{limit}MiB")
        beyond = used.peak_bytes - footprint.peak_bytes
        verdict = "kept" if beyond <= limit * MIB else "EXCEEDED"
        anonymous = used.peak_anonymous_bytes - footprint.peak_anonymous_bytes
        figures = [mib(used.peak_bytes), mib(footprint.peak_bytes), mib(beyond), verdict, mib(anonymous)]
        rows.append([str(limit), f"{used.wall_s:.2f}", f"{used.cpu_s:.2f}", *figures])
    print_table(head, rows)
    shutil.rmtree(out)
