"""A 1B Llama to NF4 as whole processes: `surgery apply`, and transformers with bitsandbytes.

The peer's bytes depend on its threads, since the mean of all absmax is a float sum that torch
splits among them; ours are those of one thread. So the peer runs once more, on one thread.
"""

import shutil
from collections.abc import Iterator
from pathlib import Path
from statistics import median

from surgery.checkpoint import TensorEntry, open_checkpoint
from tests.bench import models
from tests.bench.process import Usage, import_footprint, run
from tests.bench.table import mib, print_table, spread

OURS, SMALL, PEER = "surgery", "surgery --memory 256MiB", "transformers + bitsandbytes"
PEER_ON_ONE_THREAD = f"{PEER} on one thread"
IMPORTS = "import surgery, torch"
PEER_IMPORTS = "import torch, bitsandbytes; from transformers import LlamaForCausalLM, BitsAndBytesConfig"
COMPARED_BYTES = 1 << 20
RECORD = ".quant_state."


def main(workdir: Path, rounds: int) -> None:
    source = models.source(workdir, "llama")
    outs = {OURS: workdir / "ours", SMALL: workdir / "ours-small", PEER: workdir / "peer"}
    surgery = ("-m", "surgery", "apply", "nf4", "--set", f"model={source}", "-o")
    commands = {
        OURS: (*surgery, str(outs[OURS])),
        PEER: ("-m", "tests.bench.peer", str(source), str(outs[PEER])),
        SMALL: (*surgery, str(outs[SMALL]), "--memory", "256MiB"),
    }
    usages: dict[str, list[Usage]] = {name: [] for name in commands}
    for _ in range(rounds):
        for name, command in commands.items():
            shutil.rmtree(outs[name], ignore_errors=True)
            usages[name].append(run(*command))
    _print_rounds(usages)
    _print_medians(usages)
    outs[PEER_ON_ONE_THREAD] = workdir / "peer-on-one-thread"
    peer = ("-m", "tests.bench.peer", str(source), str(outs[PEER_ON_ONE_THREAD]))
    run(*peer, prefix=("env", "OMP_NUM_THREADS=1"))
    for name, other in ((OURS, SMALL), (OURS, PEER_ON_ONE_THREAD), (OURS, PEER), (PEER, PEER_ON_ONE_THREAD)):
        _print_equality(name, outs[name], other, outs[other])
    for out in outs.values():
        shutil.rmtree(out)


def _print_rounds(usages: dict[str, list[Usage]]) -> None:
    head = ["each round", "wall s", "cpu s", "peak RSS MiB", "of it anonymous"]
    rows = [
        [name, f"{usage.wall_s:.2f}", f"{usage.cpu_s:.2f}", mib(usage.peak_bytes), mib(usage.peak_anonymous_bytes)]
        for round_ in zip(*usages.values(), strict=True)
        for name, usage in zip(usages, round_, strict=True)
    ]
    print_table(head, rows)


def _print_medians(usages: dict[str, list[Usage]]) -> None:
    imports, peer_imports = import_footprint(IMPORTS), import_footprint(PEER_IMPORTS)
    own_imports = {OURS: imports, SMALL: imports, PEER: peer_imports}
    rows = []
    for name, measured in usages.items():
        peak = median(usage.peak_bytes for usage in measured)
        beyond, beyond_own = (peak - used.peak_bytes for used in (imports, own_imports[name]))
        anonymous = median(usage.peak_anonymous_bytes for usage in measured)
        wall = median(usage.wall_s for usage in measured)
        cpu = median(usage.cpu_s for usage in measured)
        rows.append((name, [wall, cpu, peak, anonymous, beyond, beyond_own]))
    head = ["median", "wall s", "cpu s", "peak RSS MiB", "of it anonymous", "beyond imports", "beyond its own imports"]
    print_table(head, [[name, *(f"{s:.2f}" for s in cells[:2]), *map(mib, cells[2:])] for name, cells in rows])
    peers = dict(rows)[PEER]
    ratios = [[name, *map(_ratio, peers, cells)] for name, cells in rows if name != PEER]
    print_table(["times less than the peer", *head[1:]], ratios)
    print(f"imports: {mib(imports.peak_bytes)} MiB, {imports.wall_s:.2f} s for `{IMPORTS}`")
    print(f"         {mib(peer_imports.peak_bytes)} MiB, {peer_imports.wall_s:.2f} s for the peer's")
    for name in (OURS, SMALL):
        walls = [peer.wall_s / ours.wall_s for ours, peer in zip(usages[name], usages[PEER], strict=True)]
        print(f"wall, ratio per round, {name}: {', '.join(f'{wall:.2f}' for wall in walls)}; median {spread(walls)}")
    print()


def _ratio(theirs: float, ours: float) -> str:
    return f"{theirs / ours:.2f}" if ours > 0 else "inf"


def _print_equality(one: str, one_path: Path, other: str, other_path: Path) -> None:
    ours, theirs = open_checkpoint(str(one_path)).tensors, open_checkpoint(str(other_path)).tensors
    both = ours.keys() & theirs.keys()
    unequal = {name for name in both if not _equal(ours[name], theirs[name])}
    padded = {name for name in unequal if RECORD in name and _record(ours[name]) == _record(theirs[name])}
    print(f"{one}, {other}: {len(both - unequal)} of {len(ours.keys() | theirs.keys())} tensors equal")
    groups = {
        "equal but for the spaces that end a record": padded,
        "differ": unequal - padded,
        f"only in {one}": ours.keys() - both,
        f"only in {other}": theirs.keys() - both,
    }
    for what, names in groups.items():
        if names:
            print(f"  {len(names)} {what}: {', '.join(sorted(names)[:3])}, ...")


def _equal(one: TensorEntry, other: TensorEntry) -> bool:
    return one.type == other.type and all(a == b for a, b in zip(_pieces(one), _pieces(other), strict=True))


def _record(entry: TensorEntry) -> bytes:
    """The JSON text without its padding: ours is planned before the offset's digits are known."""
    return b"".join(_pieces(entry)).rstrip(b" ")


def _pieces(entry: TensorEntry) -> Iterator[bytes]:
    with entry.file.path.open("rb", buffering=0) as file:
        file.seek(entry.start)
        for start in range(entry.start, entry.stop, COMPARED_BYTES):
            yield file.read(min(COMPARED_BYTES, entry.stop - start))
