"""Whole processes in turn, ours and a peer's: what each takes, and what that is of the peer's."""

import shutil
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from statistics import median

from tests.bench.process import Usage, import_footprint, run
from tests.bench.table import mib, print_table, spread

IMPORTS = "import surgery, torch"


@dataclass(frozen=True, slots=True)
class Contender:
    """A command, where it writes, and the imports that it cannot do without."""

    command: tuple[str, ...]
    out: Path
    imports: str = IMPORTS
    python: str = sys.executable

    def run(self) -> Usage:
        shutil.rmtree(self.out, ignore_errors=True)
        return run(*self.command, python=self.python)


def apply(spec: str, out: Path, *options: str) -> Contender:
    """`surgery apply`."""
    return Contender(("-m", "surgery", "apply", spec, "-o", str(out), *options), out)


def race(contenders: Mapping[str, Contender], rounds: int) -> dict[str, list[Usage]]:
    """Each contender once in every round."""
    usages: dict[str, list[Usage]] = {name: [] for name in contenders}
    for _ in range(rounds):
        for name, contender in contenders.items():
            usages[name].append(contender.run())
    return usages


def print_race(contenders: Mapping[str, Contender], usages: Mapping[str, list[Usage]], peer: str) -> None:
    """Every round, the medians, and the medians as shares of the peer's."""
    _print_rounds(usages)
    imports = {(item.imports, item.python): import_footprint(item.imports, item.python) for item in contenders.values()}
    footprints = {name: imports[item.imports, item.python] for name, item in contenders.items()}
    _print_medians(usages, footprints, peer)
    for name, footprint in footprints.items():
        print(f"imports of {name}: {mib(footprint.peak_bytes)} MiB, {footprint.wall_s:.2f} s")
    for name, measured in usages.items():
        if name != peer:
            shares = [ours.wall_s / theirs.wall_s for ours, theirs in zip(measured, usages[peer], strict=True)]
            each = ", ".join(f"{share:.3f}" for share in shares)
            print(f"wall, share of the peer's per round, {name}: {each}; median {spread(shares, 3)}")
    print(flush=True)


def _print_rounds(usages: Mapping[str, list[Usage]]) -> None:
    head = ["each round", "wall s", "cpu s", "peak RSS MiB", "of it anonymous"]
    rows = [
        [name, f"{usage.wall_s:.2f}", f"{usage.cpu_s:.2f}", mib(usage.peak_bytes), mib(usage.peak_anonymous_bytes)]
        for round_ in zip(*usages.values(), strict=True)
        for name, usage in zip(usages, round_, strict=True)
    ]
    print_table(head, rows)


def _print_medians(usages: Mapping[str, list[Usage]], footprints: Mapping[str, Usage], peer: str) -> None:
    rows = {name: _medians(measured, footprints[name]) for name, measured in usages.items()}
    head = ["wall s", "cpu s", "peak RSS MiB", "of it anonymous", "beyond its imports"]
    print_table(
        ["median", *head],
        [[name, *(f"{s:.2f}" for s in cells[:2]), *map(mib, cells[2:])] for name, cells in rows.items()],
    )
    shares = [[name, *map(_share, cells, rows[peer])] for name, cells in rows.items() if name != peer]
    print_table([f"share of {peer}, and times less", *head], shares)


def _medians(measured: list[Usage], footprint: Usage) -> list[float]:
    peak = median(usage.peak_bytes for usage in measured)
    anonymous = median(usage.peak_anonymous_bytes for usage in measured)
    wall, cpu = median(usage.wall_s for usage in measured), median(usage.cpu_s for usage in measured)
    return [wall, cpu, peak, anonymous, peak - footprint.peak_bytes]


def _share(ours: float, theirs: float) -> str:
    return f"{ours / theirs:.3f} ({theirs / ours:.1f})" if ours > 0 < theirs else "-"
