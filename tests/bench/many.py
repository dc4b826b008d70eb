"""Three models of many small tensors merged: what a tensor costs, whatever its size.

mergekit's schedule takes time that grows with the square of their number, so it merges the fewest only.
"""

import shutil
from pathlib import Path

from tests.bench import models
from tests.bench.contest import Contender, apply
from tests.bench.equality import compare
from tests.bench.mergekit import BASE, METHODS, merging, write
from tests.bench.process import import_footprint
from tests.bench.table import mib, print_table

METHOD = METHODS["linear"]
NUMBERS = (2000, 5000, 10000, 20000)


def main(workdir: Path, rounds: int, numbers: tuple[int, ...] = NUMBERS) -> None:
    rows: list[list[str]] = []
    imports_s: dict[str, float] = {}
    for number in sorted(numbers):
        paths = {BASE: models.source(workdir, f"many-{number}")}
        paths |= {name: models.source(workdir, f"many-{number}_{i + 1}") for i, name in enumerate(METHOD.others)}
        ours = apply(write(workdir / "ours.yaml", METHOD.spec(paths)), workdir / "ours")
        contenders = {"surgery": ours}
        if number == min(numbers):
            contenders["mergekit"] = merging(write(workdir / "peer.yaml", METHOD.config(paths)), workdir / "peer")
        imports_s |= {name: _imports_s(item) for name, item in contenders.items() if name not in imports_s}
        for _ in range(rounds):
            rows += [_row(name, number, contender, imports_s[name]) for name, contender in contenders.items()]
        if len(contenders) > 1:
            print(f"{number} tensors, surgery; mergekit in bfloat16: {compare(workdir / 'ours', workdir / 'peer')}")
    print_table(["3 models", "tensors", "wall s", "cpu s", "ms a tensor beyond imports", "peak RSS MiB"], rows)
    for out in ("ours", "peer"):
        shutil.rmtree(workdir / out)


def _imports_s(contender: Contender) -> float:
    return import_footprint(contender.imports, contender.python).wall_s


def _row(name: str, number: int, contender: Contender, imports_s: float) -> list[str]:
    used = contender.run()
    each = f"{1000 * (used.wall_s - imports_s) / number:.2f}"
    return [name, str(number), f"{used.wall_s:.2f}", f"{used.cpu_s:.2f}", each, mib(used.peak_bytes)]
