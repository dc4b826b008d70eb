"""What people read of a comparison: layers folded as in a plan, with figures. Words only, no logic."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence

from surgery.comparison.model import Comparison, ConfigDifference, Figures, Stored, TensorDifference, total
from surgery.escapes import shown
from surgery.types import text
from surgery.view import NUMBER, fold

__all__ = ["comparison_text", "register"]

MARKS = {"change": "~", "add": "+", "drop": "-", "same": "="}
WORDS = {"change": "changed", "add": "added", "drop": "dropped", "same": "same"}
MOST_LINES = 24  # of the config, or of notes
LONGEST_VALUE = 60  # characters
Group = Sequence[TensorDifference]


def register() -> None:
    """Make this text what `str()` gives."""
    text.register(Comparison, comparison_text)


def comparison_text(comparison: Comparison) -> str:
    """Layers folded; `+ add  ~ change  - drop  = same`, then the config, and the largest difference."""
    counts = comparison.summary()
    lines = _table([group for action in ("change", "add", "drop") for group in _groups(comparison, action)])
    if counts["same"]:
        lines.append(f"= {counts['same']} {'tensor' if counts['same'] == 1 else 'tensors'} the same byte for byte")
    lines += _config_lines(comparison)
    lines += _unmatched(comparison)
    lines += [f"note: {note}" for note in comparison.notes]
    words = [f"{number} {WORDS[action]}" for action, number in counts.items() if number]
    words += [f"{len(comparison.config)} in {comparison.config_name}"] if comparison.config else []
    lines.append(f"Diff: {', '.join(words) or 'no tensors'}.{_largest(comparison)}")
    return "\n".join(map(shown, lines))


def _groups(comparison: Comparison, action: str) -> Iterator[Group]:
    """Tensors whose names differ in numbers only, and whose types are the same."""
    groups: dict[tuple[str, Stored | None, Stored | None], list[TensorDifference]] = {}
    for tensor in comparison.tensors:
        if tensor.action == action:
            key = (NUMBER.sub("{}", tensor.name), tensor.before, tensor.after)
            groups.setdefault(key, []).append(tensor)
    yield from groups.values()


def _table(groups: Sequence[Group]) -> list[str]:
    rows = [
        (fold([tensor.name for tensor in group]), f"×{len(group)}", _types(group[0]), _figures(group))
        for group in groups
    ]
    widths = [max((len(row[column]) for row in rows), default=0) for column in range(3)]
    return [
        f"{MARKS[group[0].action]} "
        + "   ".join([*(f"{cell:{width}}" for cell, width in zip(row, widths, strict=False)), row[3]]).rstrip()
        for group, row in zip(groups, rows, strict=True)
    ]


def _types(tensor: TensorDifference) -> str:
    sides = [str(side) for side in (tensor.before, tensor.after) if side]
    if tensor.figures and tensor.after and tensor.after.format and tensor.before != tensor.after:
        sides[1] = f"{tensor.after.format}{tensor.after.density}"
    return " → ".join(dict.fromkeys(sides))


def _figures(group: Group) -> str:
    """Of all its tensors together: the largest difference, and the RMS over all elements."""
    known = [tensor.figures for tensor in group if tensor.figures]
    if group[0].action != "change" or not known:
        return ""
    figures = total(known)
    parts = [f"{figures.num_different:,d} of {figures.num_elements:,d} differ"]
    return "  ".join([*parts, *(_values(figures, group[0]) if figures.has_values else ())])


def _values(figures: Figures, tensor: TensorDifference) -> Iterator[str]:
    yield f"max {figures.max_abs:.3g}"
    if any(side and side.type.dtype.is_float for side in (tensor.before, tensor.after)):
        relative = "" if figures.relative is None else f" ({100 * figures.relative:.3g}%)"
        yield f"RMS {figures.rms:.3g}{relative}"


def _unmatched(comparison: Comparison) -> Iterator[str]:
    """Tensors that are NaN or infinite in one alone."""
    found = [(tensor.name, tensor.figures, tensor.first_unmatched()) for tensor in comparison.tensors]
    named = [(name, figures.num_unmatched, index) for name, figures, index in found if figures and index is not None]
    for name, number, index in named[:MOST_LINES]:
        what = "1 element that is" if number == 1 else f"{number:,d} elements that are"
        yield f"note: {name} has {what} NaN or infinite, and not the same in both, the first at {index}"
    if len(named) > MOST_LINES:
        yield f"note: so have {len(named) - MOST_LINES} tensors more"


def _largest(comparison: Comparison) -> str:
    changed = [tensor for tensor in comparison.tensors if tensor.figures and tensor.figures.max_abs]
    if not changed:
        return ""
    worst = max(changed, key=lambda tensor: tensor.figures.max_abs if tensor.figures else 0.0)
    return f"  largest difference {worst.figures.max_abs:.3g} in {worst.name}" if worst.figures else ""


def _config_lines(comparison: Comparison) -> Iterator[str]:
    for difference in comparison.config[:MOST_LINES]:
        yield f"{MARKS[difference.action]} {comparison.config_name}: {_short(difference.key)}  {_change(difference)}"
    if len(comparison.config) > MOST_LINES:
        yield f"~ {comparison.config_name}: {len(comparison.config) - MOST_LINES} keys more"


def _change(difference: ConfigDifference) -> str:
    before, after = (_short(json.dumps(value)) for value in (difference.before, difference.after))
    return {"add": after, "drop": before}.get(difference.action, f"{before} → {after}")


def _short(value: str) -> str:
    return value if len(value) <= LONGEST_VALUE else f"{value[:LONGEST_VALUE]}..."
