"""A LoRA adapter folded into a 1B Llama as whole processes: `surgery apply`, and PEFT's merge_and_unload."""

import shutil
from pathlib import Path

from tests.bench import contest, models
from tests.bench.equality import compare
from tests.bench.process import run

OURS, SMALL, PEER = "surgery", "surgery --memory 256MiB", "transformers + PEFT"
PEER_ON_ONE_THREAD = f"{PEER} on one thread"
PEER_IMPORTS = "import torch, peft; from transformers import LlamaForCausalLM"


def main(workdir: Path, rounds: int, model: str) -> None:
    source, adapter = models.source(workdir, model), models.source(workdir, f"{model}_lora")
    outs = {OURS: workdir / "ours", SMALL: workdir / "ours-small", PEER: workdir / "peer"}
    settings = ("--set", f"model={source}", "--set", f"adapter={adapter}")
    peer = ("-m", "tests.bench.peer", "fold", str(source), str(adapter))
    contenders = {
        OURS: contest.apply("fold-lora", outs[OURS], *settings),
        PEER: contest.Contender((*peer, str(outs[PEER])), outs[PEER], PEER_IMPORTS),
        SMALL: contest.apply("fold-lora", outs[SMALL], *settings, "--memory", "256MiB"),
    }
    contest.print_race(contenders, contest.race(contenders, rounds), PEER)
    outs[PEER_ON_ONE_THREAD] = workdir / "peer-on-one-thread"
    run(*peer, str(outs[PEER_ON_ONE_THREAD]), prefix=("env", "OMP_NUM_THREADS=1"))
    for one, other in ((OURS, SMALL), (OURS, PEER_ON_ONE_THREAD), (OURS, PEER), (PEER, PEER_ON_ONE_THREAD)):
        print(f"{one}; {other}: {compare(outs[one], outs[other])}")
    for out in outs.values():
        shutil.rmtree(out)
