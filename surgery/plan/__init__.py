"""Planning: names through the edits, the graph simplified, the output laid out. No weight is read."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping

from surgery.checkpoint import ADAPTER_CONFIG, CONFIG, Checkpoint
from surgery.checkpoint.architecture import architecture_of
from surgery.checkpoint.modules import QUANTIZED_PARTS, Module, modules_of
from surgery.cost import cost_of
from surgery.errors import ConservationError, OpError, Problem
from surgery.graph import Graph, Node, Source, rewrite, toposort
from surgery.layout import Layout, lay_out
from surgery.op import SOURCE, Attach, Finished
from surgery.plan.adapters import (
    adapter_plans,
    adapter_tensors,
    attach_notes,
    changes_base,
    check_attachments,
    lay_out_adapters,
)
from surgery.plan.model import Action, Plan, TensorPlan, sources_of
from surgery.plan.names import Names, open_models, run_edits
from surgery.regexes import shared_time
from surgery.spec import Spec

__all__ = ["Plan", "TensorPlan", "make_plan"]


@shared_time()
def make_plan(spec: Spec, checkpoints: Mapping[str, Checkpoint]) -> Plan:
    """What applying `spec` to the source and the further models would do, from headers alone.

    Raises SpecError for edits that match nothing or not what they promise, OpError for an op that
    cannot be applied where it is asked to, ConservationError if a source tensor would vanish.
    """
    graph = Graph()
    models = open_models(checkpoints, graph)
    checkpoint = checkpoints[SOURCE]
    names, matched = run_edits(spec, models, graph)
    _check_conservation(checkpoint, names)
    check_attachments(names)
    writes_base = spec.copy_base or changes_base(spec, names)
    simplified = _simplified(names, spec, graph)
    modules = modules_of({name: node.type for name, node in simplified.items()}, names.architecture)
    _check_quantized_parts(modules)
    finished = Finished(simplified, modules, names.architecture, models)
    outputs = simplified if writes_base else {}
    adapters = adapter_plans(names, checkpoint, writes_base=writes_base)
    roots = [*outputs.values(), *(node for adapter in adapters for node in adapter.nodes.values())]
    base_layout = _layout(spec, checkpoint, outputs) if writes_base else Layout((), b"")
    layout = Layout((*base_layout.files, *lay_out_adapters(adapters)), base_layout.index)
    read = {node.kernel for node in toposort(roots) if isinstance(node.kernel, Source)}
    used = {kernel.model for kernel in read}
    used |= {SOURCE} if writes_base else set()
    bytes_read = sum(_bytes_read(name, checkpoints[name], read) for name in used)
    num_further = sum(len(model.tensors) for name, model in checkpoints.items() if name != SOURCE)
    num_remote = sum(checkpoints[name].is_remote for name in used)
    bytes_written = sum(file.num_bytes for file in layout.files) + len(layout.index)
    tensors = _tensor_plans(spec, checkpoint, names, base_layout) if writes_base else ()
    kept = {tensor.origin for tensor in tensors if tensor.node.port == 0 or tensor.name == tensor.origin}
    is_adapter = _makes_adapter(spec, checkpoint)
    copies_sides = writes_base and is_adapter == checkpoint.is_adapter
    return Plan(
        spec=spec,
        checkpoints=checkpoints,
        streamed=tuple(name for name in checkpoints if name in used or name == SOURCE),
        tensors=(*tensors, *adapter_tensors(adapters, layout)),
        adapters=adapters,
        writes_base=writes_base,
        dropped={name: entry.type for name, entry in checkpoint.tensors.items() if writes_base and name not in kept},
        config=_config(spec, checkpoint, finished, is_adapter=is_adapter) if writes_base else None,
        config_name=ADAPTER_CONFIG if is_adapter else CONFIG,
        side_files=checkpoint.sides.copied if copies_sides else (),
        layout=layout,
        cost=cost_of(roots, bytes_read, bytes_written, num_further, num_remote),
        sites=tuple((edit.op.name, edit.op.selects, count) for edit, count in matched),
        notes=(
            *(note for model in checkpoints.values() for note in (*model.notes, *_notes(model))),
            *attach_notes(names, checkpoint),
        ),
    )


def _bytes_read(name: str, checkpoint: Checkpoint, read: Collection[Source]) -> int:
    """Of a model: of one on the Hub what is needed, and files as a whole of a local one."""
    if not checkpoint.is_remote:
        return checkpoint.num_bytes
    return sum(checkpoint.tensors[kernel.name].type.num_bytes for kernel in read if kernel.model == name)


def _simplified(names: Names, spec: Spec, graph: Graph) -> dict[str, Node]:
    rules = list(dict.fromkeys(rule for edit in spec.edits for rule in type(edit.op).rules))
    roots = [entry.node for entry in names.entries.values()]
    return dict(zip(names.entries, rewrite(graph, roots, rules), strict=True))


def _check_conservation(checkpoint: Checkpoint, names: Names) -> None:
    """Every source tensor is in some output, or was dropped by name."""
    roots = [entry.node for entry in names.entries.values()] + list(names.dropped.values())
    sources = [node.kernel for node in toposort(roots) if isinstance(node.kernel, Source)]
    kept = {kernel.name for kernel in sources if kernel.model == SOURCE}
    lost = [name for name in checkpoint.tensors if name not in kept]
    if lost:
        what = f"{len(lost)} tensors of the source would vanish: {', '.join(lost[:3])}"
        fix = "an op takes them without giving or dropping anything: this is a fault of that op, please report it"
        raise ConservationError(Problem(what, fix=fix))
    if not names.entries:
        raise OpError(Problem("the edits leave no tensor at all", fix="narrow what is dropped"))


def _check_quantized_parts(modules: Mapping[str, Module]) -> None:
    problems: list[Problem] = []
    for module in modules.values():
        parts = [name for name in module.tensors if QUANTIZED_PARTS.fullmatch(name)]
        needed = [f"{module.path}.weight{suffix}" for suffix in ("", ".absmax", ".quant_map")] if parts else []
        missing = [name for name in needed if name not in module.tensors]
        if not any(".quant_state." in name for name in parts) and parts:
            missing.append(f"{module.path}.weight.quant_state.bitsandbytes__*")
        if missing:
            what = (
                f"the quantized weight of `{module.path}` would be torn apart: `{missing[0]}` is not with `{parts[0]}`"
            )
            problems.append(Problem(what, fix="rename or drop a quantized weight together with all its parts"))
    if problems:
        raise OpError(*problems[:8])


def _makes_adapter(spec: Spec, checkpoint: Checkpoint) -> bool:
    return checkpoint.is_adapter or any(edit.op.produces == "adapter" for edit in spec.edits)


def _config(spec: Spec, checkpoint: Checkpoint, finished: Finished, *, is_adapter: bool) -> bytes | None:
    if checkpoint.config is None and is_adapter == checkpoint.is_adapter:
        return None
    config = checkpoint.config or {}
    for edit in spec.edits:
        config = edit.op.config(config, finished)
    return (json.dumps(config, indent=2) + "\n").encode()


def _layout(spec: Spec, checkpoint: Checkpoint, outputs: Mapping[str, Node]) -> Layout:
    is_adapter = _makes_adapter(spec, checkpoint)
    stems = [edit.op.stem for edit in spec.edits if edit.op.stem and not isinstance(edit.op, Attach)]
    if checkpoint.is_adapter:
        stems.insert(0, checkpoint.files[0].name.removesuffix(".safetensors"))
    stem = stems[-1] if stems else "adapter_model" if is_adapter else "model"
    shard_bytes = 1 << 62 if is_adapter else spec.shard_bytes  # adapters are never sharded
    return lay_out(outputs, shard_bytes, checkpoint.metadata, stem, _num_parameters(outputs))


def _num_parameters(outputs: Mapping[str, Node]) -> int:
    """Parameters as the model counts them: a 4-bit weight is its elements, its parts are none."""
    total = 0
    for name, node in outputs.items():
        if not QUANTIZED_PARTS.fullmatch(name):
            total += node.inputs[0].type.num_elements if node.kernel.label else node.type.num_elements
    return total


def _tensor_plans(spec: Spec, checkpoint: Checkpoint, names: Names, layout: Layout) -> tuple[TensorPlan, ...]:
    op_names = {edit.index: edit.op.name for edit in spec.edits}
    placed = {item.name: (file.name, item) for file in layout.files for item in file.tensors}
    plans: list[TensorPlan] = []
    chains: dict[tuple[int, ...], tuple[str, ...]] = {}
    call, sources = None, ()
    for name, entry in names.entries.items():
        file, item = placed[name]
        if item.node.call != call or isinstance(item.node.kernel, Source):
            call, sources = item.node.call, sources_of(item.node)
        own = [source for source in sources if source in checkpoint.tensors]
        origin = name if name in own or not own else own[0]
        action = _action(name, item.node, origin, checkpoint, names)
        ops = chains.setdefault(entry.edits, tuple(op_names[index] for index in entry.edits))
        plans.append(TensorPlan(name, item.node, action, file, item.start, item.stop, origin, sources, ops))
    return tuple(plans)


def _action(name: str, node: Node, origin: str, checkpoint: Checkpoint, names: Names) -> Action:
    if isinstance(node.kernel, Source) and node.kernel.model == SOURCE:
        return "copy" if origin == name else "rename"
    moved = node.port == 0 and origin not in names.entries
    return "change" if name in checkpoint.tensors or moved else "add"


def _notes(checkpoint: Checkpoint) -> list[str]:
    if checkpoint.is_adapter:
        return []
    if checkpoint.config is None:
        return ["the source has no config.json: what each module is, is judged by names and shapes"]
    if not architecture_of(checkpoint.config).model_types:
        model_type = checkpoint.config.get("model_type")
        return [f"model_type {model_type!r} is not in the table: what each module is, is judged by names and shapes"]
    return []
