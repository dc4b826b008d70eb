"""Convert a checkpoint to NF4 from Python.

python examples/convert.py SOURCE OUT
"""

import sys

import surgery


def main(source: str, out: str) -> None:
    """Plan, show the plan, apply it, verify it."""
    plan = surgery.plan(surgery.load("nf4", model=source))
    print(plan)
    manifest = surgery.apply(plan, out, memory="1GiB")
    print(manifest)
    surgery.verify(out)


if __name__ == "__main__":
    main(*sys.argv[1:])
