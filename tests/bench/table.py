"""Tables of figures as plain text."""

from collections.abc import Iterable, Sequence
from statistics import median

MIB = 1 << 20


def print_table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    """Left-aligned names, right-aligned figures."""
    lines = [list(head), *map(list, rows)]
    widths = [max(len(line[column]) for line in lines) for column in range(len(head))]
    for line in lines:
        cells = [line[0].ljust(widths[0]), *map(str.rjust, line[1:], widths[1:])]
        print("  ".join(cells).rstrip(), flush=True)
    print(flush=True)


def mib(num_bytes: float) -> str:
    return f"{num_bytes / MIB:.0f}"


def spread(values: Sequence[float], digits: int = 2) -> str:
    """The median, and the range it lies in."""
    if len(values) == 1:
        return f"{values[0]:.{digits}f}"
    return f"{median(values):.{digits}f} [{min(values):.{digits}f} .. {max(values):.{digits}f}]"
