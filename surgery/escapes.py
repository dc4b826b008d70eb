"""Text of others, for a terminal: hostile names could move the cursor, forge a line of ours, or never end."""

from __future__ import annotations

__all__ = ["escaped", "shown"]

LONGEST_SHOWN = 3000  # characters


def shown(line: str) -> str:
    """`line` without its middle if it is long, and escaped."""
    if len(line) > LONGEST_SHOWN:
        line = f"{line[: LONGEST_SHOWN // 2]} ... {line[-LONGEST_SHOWN // 2 :]}"
    return escaped(line)


def escaped(line: str) -> str:
    """`line` with all that is no visible character or space as Python writes it.

    That is controls, line ends, marks that turn the direction of writing, lone surrogates.
    """
    if line.isprintable():
        return line
    return "".join(char if char.isprintable() else repr(char)[1:-1] for char in line)
