"""The command: fuzz one target, and print what it found."""

import argparse
import sys

from .search import search
from .targets import TARGETS


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__)
    parser.add_argument("target", choices=list(TARGETS))
    parser.add_argument("--executions", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    result = search(TARGETS[options.target], options.executions, options.seed, report=print)
    print(result)
    for finding in result.findings:
        print(f"\n{finding.what}\n{finding.content!r}")
    return 1 if result.findings else 0


if __name__ == "__main__":
    sys.exit(main())
