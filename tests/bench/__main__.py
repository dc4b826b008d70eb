"""`python -m tests.bench`."""

import argparse
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tests import bench
from tests.bench import convert, fold, kernel, many, merge, mergekit, tensor

COMMANDS = {
    "kernel": (5, "NF4 of one weight: ours and bitsandbytes on one thread"),
    "convert": (3, "a 1B Llama to NF4: `surgery apply` and transformers with bitsandbytes"),
    "merge": (3, "three 1B Llamas to one: `surgery apply` and mergekit"),
    "fold": (3, "a LoRA adapter into a 1B Llama: `surgery apply` and PEFT"),
    "many": (1, "three models of up to 20,000 small tensors to one"),
    "tensor": (1, "one tensor of 2 GiB, converted or merged under little memory"),
}


def main() -> None:
    given = _parser().parse_args()
    if given.command == "kernel":
        kernel.main(given.rounds)
        return
    with _directory(given.workdir) as workdir:
        if given.command == "convert":
            convert.main(workdir, given.rounds, given.model)
        elif given.command == "tensor":
            tensor.main(workdir, given.rounds, given.op, given.side)
        elif given.command == "many":
            many.main(workdir, given.rounds, tuple(given.numbers))
        elif given.command == "merge":
            merge.main(workdir, given.rounds, given.method, given.model)
        else:
            fold.main(workdir, given.rounds, given.model)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m tests.bench", description=bench.__doc__)
    subparsers = parser.add_subparsers(dest="command", required=True)
    commands = {name: subparsers.add_parser(name, help=what) for name, (_, what) in COMMANDS.items()}
    for name, command in commands.items():
        command.add_argument("--rounds", type=int, default=COMMANDS[name][0])
        if name != "kernel":
            command.add_argument("--workdir", type=Path, help="keeps the models for the next run [default: temporary]")
    for name in ("convert", "merge", "fold"):
        small = "`llama-small`, 55 M weights, is to try it out"
        commands[name].add_argument("--model", choices=["llama", "llama-small"], default="llama", help=small)
    commands["merge"].add_argument("--method", choices=list(mergekit.METHODS), default="linear")
    commands["tensor"].add_argument("--op", choices=["nf4", *tensor.MERGES], default="nf4")
    commands["tensor"].add_argument("--side", type=int, default=tensor.SIDE, help="rows and columns of the tensor")
    commands["many"].add_argument("--numbers", type=int, nargs="+", default=many.NUMBERS, help="of tensors")
    return parser


@contextmanager
def _directory(given: Path | None) -> Iterator[Path]:
    if given is None:
        with tempfile.TemporaryDirectory(prefix="surgery-bench-") as name:
            yield Path(name)
    else:
        given.mkdir(parents=True, exist_ok=True)
        yield given.resolve()


main()
