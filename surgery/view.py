"""What people read: plans, inspections and manifests as text. Words and pictures, no logic."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from typing import cast

from surgery.checkpoint.modules import Module
from surgery.counting import Training
from surgery.escapes import shown
from surgery.graph import Source, bits_per_element
from surgery.inspection import Inspection
from surgery.manifest import Manifest
from surgery.plan import Plan, TensorPlan
from surgery.sizes import format_binary, format_decimal
from surgery.types import text

__all__ = ["fold", "inspection_text", "manifest_text", "plan_text", "register"]

Row = tuple[str, str, str]  # mark, name, what happens to it
NUMBER = re.compile(r"(?<![^.])\d+(?![^.])")
MARKS = "~+-→"
SUFFIX = re.compile(r"\.weight$")


def register() -> None:
    """Make these texts what `str()` gives."""
    text.register(Plan, plan_text)
    text.register(Inspection, inspection_text)
    text.register(Manifest, manifest_text)


def _page(lines: Iterable[str]) -> str:
    """What goes to a terminal. Names and configs are of others: here, and only here, they become harmless."""
    return "\n".join(map(shown, lines))


# Plans


def plan_text(plan: Plan) -> str:
    """Layers folded; `+ add  ~ change  - drop  → rename  = copy`."""
    lines = _table(sorted(_rows(plan), key=lambda row: MARKS.index(row[0])))
    counts = plan.summary()
    if counts["copy"]:
        lines.append(f"= {_count(counts['copy'], 'tensor')} copied byte for byte")
    lines += [line for name, training in plan.training().items() for line in _training(name, training, plan)]
    lines += [f"note: {note}" for note in plan.notes]
    words = ", ".join(f"{number} {word}" for word, number in counts.items() if number) + "."
    reads, writes = format_decimal(plan.cost.bytes_read), format_decimal(plan.cost.bytes_written)
    lines.append(f"Plan: {words}  reads {reads}  writes {writes}  peak memory {format_binary(plan.cost.peak_memory)}")
    return _page(lines)


def _training(name: str, training: Training, plan: Plan) -> Iterator[str]:
    """As PEFT prints it, and the memory."""
    trained, total = f"{training.trainable:,d}", f"{training.total:,d}"
    which = f"{name}: " if len(plan.adapters) > 1 else ""
    yield f"{which}trainable params: {trained} || all params: {total} || trainable%: {training.percent:.4f}"
    full, lora, qlora = map(format_binary, (training.full_bytes, training.lora_bytes, training.qlora_bytes))
    yield f"{which}memory to train it: {lora}, on NF4 {qlora}; the whole model {full} (AdamW; activations not counted)"


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def _rows(plan: Plan) -> Iterator[Row]:
    for tensor in plan.tensors:
        is_part = tensor.node.port > 0 and bool(tensor.node.kernel.label)
        if tensor.action == "change" and not is_part:
            yield "~", _site_name(tensor), _change(plan, tensor)
        elif tensor.action == "add" and not is_part:
            yield "+", tensor.name, f"{tensor.node.type}{_from(tensor)}"
        elif tensor.action == "rename":
            yield "→", f"{tensor.origin} → {tensor.name}", str(tensor.node.type)
    for name, type_ in plan.dropped.items():
        yield "-", name, str(type_)


def _site_name(tensor: TensorPlan) -> str:
    name = SUFFIX.sub("", tensor.name) if tensor.node.kernel.label else tensor.name
    return name if tensor.name == tensor.origin else f"{tensor.origin} → {name}"


def _change(plan: Plan, tensor: TensorPlan) -> str:
    before = plan.checkpoint.tensors[tensor.origin].type
    label = tensor.node.kernel.label
    if label:
        earlier = f"  after {', '.join(tensor.ops[:-1])}" if len(tensor.ops) > 1 else ""
        return f"{before} → {label} ({bits_per_element(tensor.node):.3f} bits){earlier}"
    if before == tensor.node.type:
        return f"{before}{_from(tensor) or '  ' + ', '.join(tensor.ops)}"
    return f"{before} → {tensor.node.type}{_from(tensor)}"


def _from(tensor: TensorPlan) -> str:
    """Of which further model a tensor is a copy."""
    kernel = tensor.node.kernel
    return f" ← {kernel.model}" if isinstance(kernel, Source) else ""


def _table(rows: Sequence[Row]) -> list[str]:
    folded = list(_fold_rows(rows))
    width = max((len(name) for _, name, _, _ in folded), default=0)
    times_width = max((len(times) for _, _, times, _ in folded), default=0)
    return [f"{mark} {name:{width}}   {times:{times_width}}   {what}".rstrip() for mark, name, times, what in folded]


def _fold_rows(rows: Iterable[Row]) -> Iterator[tuple[str, str, str, str]]:
    groups: dict[tuple[str, str, str], list[str]] = {}
    for mark, name, what in rows:
        groups.setdefault((mark, NUMBER.sub("{}", name), what), []).append(name)
    for (mark, _, what), names in groups.items():
        yield mark, fold(names), f"×{len(names)}", what


def fold(names: Sequence[str]) -> str:
    """Names that differ in numbers only, as one: `model.layers.{0..31}.mlp.up_proj`."""
    columns = list(zip(*(NUMBER.findall(name) for name in names), strict=True))
    result = names[0]
    for match, column in reversed(list(zip(NUMBER.finditer(names[0]), columns, strict=True))):
        numbers = sorted(set(map(int, column)))
        if len(numbers) > 1:
            result = f"{result[: match.start()]}{{{_ranges(numbers)}}}{result[match.end() :]}"
    return result


def _ranges(numbers: Sequence[int]) -> str:
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    return ",".join(str(run[0]) if len(run) == 1 else f"{run[0]}..{run[-1]}" for run in runs)


# Inspections


def inspection_text(inspection: Inspection) -> str:
    """Module tree with kinds, types and sizes, folded; then how it is quantized."""
    rows = [(" ", module.path or "(root)", _module_text(module)) for module in inspection.modules.values()]
    checkpoint = inspection.checkpoint
    lines = _table(rows)
    model_type = f"{inspection.model_type}, " if inspection.model_type else ""
    files = _count(len(checkpoint.files), "file")
    lines.append(
        f"{model_type}{_count(len(checkpoint.tensors), 'tensor')} in {files}, {format_decimal(inspection.num_bytes)}"
    )
    if inspection.adapter():
        lines.append("adapter: " + ", ".join(f"{key} {value}" for key, value in inspection.adapter().items()))
    lines += [f"quantized: {label}, {_count(count, 'module')}" for label, count in inspection.quantization().items()]
    lines += [f"note: {note}" for note in checkpoint.notes]
    return _page(lines)


def _module_text(module: Module) -> str:
    start = len(module.path) + 1 if module.path else 0
    tensors = {name[start:]: type_ for name, type_ in module.tensors.items()}
    formats = {name.rpartition("__")[2] for name in tensors if ".quant_state." in name}
    shown = {name: str(type_) for name, type_ in tensors.items() if not name.startswith("weight.")}
    for label in formats:
        shown["weight"] = f"{label} {shown.get('weight', '')}"
    size = format_decimal(sum(type_.num_bytes for type_ in tensors.values()))
    return f"{module.kind.value:9}  {', '.join(f'{name} {type_}' for name, type_ in shown.items())}  {size}"


# Manifests


def _ratio(before: int, after: int) -> str:
    return f"{format_decimal(before)} → {format_decimal(after)}{f' ({after / before:.1%})' if before else ''}"


def manifest_text(manifest: Manifest) -> str:
    """What came out: bytes before and after, worst and mean error."""
    source = cast("dict[str, list[dict[str, int]]]", manifest.content["source"])
    before = sum(file["bytes"] for file in source["files"])
    after = sum(file.num_bytes for file in manifest.files if file.name.endswith(".safetensors"))
    weights = [file.name for file in manifest.files if file.name.endswith(".safetensors")]
    only_adapters = all(name.startswith("adapters/") for name in weights)
    lines = [format_decimal(after) if only_adapters else _ratio(before, after)]
    errors = {
        name: cast("dict[str, float]", entry["error"]) for name, entry in manifest.tensors.items() if "error" in entry
    }
    if errors:
        worst = max(errors, key=lambda name: errors[name]["max"])
        mean = sum(error["rms"] for error in errors.values()) / len(errors)
        lines.append(f"worst error {errors[worst]['max']:.3g} in {worst}")
        lines.append(f"mean RMS error {mean:.3g} over {_count(len(errors), 'rounded tensor')}")
    return _page(lines)
