"""A 1B Llama to NF4 as whole processes: `surgery apply`, and transformers with bitsandbytes.

The peer's bytes depend on its threads, since the mean of all absmax is a float sum that torch
splits among them; ours are those of one thread. So the peer runs once more, on one thread.
"""

import shutil
from pathlib import Path

from surgery.checkpoint import TensorEntry, open_checkpoint
from tests.bench import contest, models
from tests.bench.equality import pieces_of
from tests.bench.process import run

OURS, SMALL, PEER = "surgery", "surgery --memory 256MiB", "transformers + bitsandbytes"
PEER_ON_ONE_THREAD = f"{PEER} on one thread"
PEER_IMPORTS = "import torch, bitsandbytes; from transformers import LlamaForCausalLM, BitsAndBytesConfig"
RECORD = ".quant_state."


def main(workdir: Path, rounds: int, model: str) -> None:
    source = models.source(workdir, model)
    outs = {OURS: workdir / "ours", SMALL: workdir / "ours-small", PEER: workdir / "peer"}
    settings = ("--set", f"model={source}")
    peer = ("-m", "tests.bench.peer", "nf4", str(source))
    contenders = {
        OURS: contest.apply("nf4", outs[OURS], *settings),
        PEER: contest.Contender((*peer, str(outs[PEER])), outs[PEER], PEER_IMPORTS),
        SMALL: contest.apply("nf4", outs[SMALL], *settings, "--memory", "256MiB"),
    }
    contest.print_race(contenders, contest.race(contenders, rounds), PEER)
    outs[PEER_ON_ONE_THREAD] = workdir / "peer-on-one-thread"
    run(*peer, str(outs[PEER_ON_ONE_THREAD]), prefix=("env", "OMP_NUM_THREADS=1"))
    for name, other in ((OURS, SMALL), (OURS, PEER_ON_ONE_THREAD), (OURS, PEER), (PEER, PEER_ON_ONE_THREAD)):
        _print_equality(name, outs[name], other, outs[other])
    for out in outs.values():
        shutil.rmtree(out)


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
    return one.type == other.type and all(a == b for a, b in zip(pieces_of(one), pieces_of(other), strict=True))


def _record(entry: TensorEntry) -> bytes:
    """The JSON text without its padding: ours is planned before the offset's digits are known."""
    return b"".join(pieces_of(entry)).rstrip(b" ")
