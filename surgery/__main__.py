"""`python -m surgery`."""

from surgery.cli import run

run()
