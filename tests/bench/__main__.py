"""`python -m tests.bench`."""

import argparse
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tests import bench
from tests.bench import convert, kernel, tensor


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.bench", description=bench.__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    command = commands.add_parser("kernel", help="NF4 of one weight: ours and bitsandbytes on one thread")
    command.add_argument("--rounds", type=int, default=5)
    for name, what in (
        ("convert", "a 1B Llama to NF4: `surgery apply` and transformers with bitsandbytes"),
        ("tensor", "one tensor of 2 GiB to NF4 under little memory"),
    ):
        command = commands.add_parser(name, help=what)
        command.add_argument("--rounds", type=int, default=3 if name == "convert" else 1)
        command.add_argument("--workdir", type=Path, help="keeps the source for the next run [default: temporary]")
    given = parser.parse_args()
    if given.command == "kernel":
        kernel.main(given.rounds)
    else:
        with _directory(given.workdir) as workdir:
            (convert if given.command == "convert" else tensor).main(workdir, given.rounds)


@contextmanager
def _directory(given: Path | None) -> Iterator[Path]:
    if given is None:
        with tempfile.TemporaryDirectory(prefix="surgery-bench-") as name:
            yield Path(name)
    else:
        given.mkdir(parents=True, exist_ok=True)
        yield given


main()
