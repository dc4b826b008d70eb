"""The adapters that edits attach: what is written of each, and whether they still fit the checkpoint."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace

from surgery.checkpoint import Checkpoint
from surgery.checkpoint.inventory import model_types
from surgery.errors import OpError, Problem
from surgery.graph import Node, TiledKernel, toposort
from surgery.layout import Layout, OutputFile, lay_out
from surgery.numerics.transpose import Transpose
from surgery.op import Attach, Attached
from surgery.plan.model import AdapterPlan, TensorPlan, sources_of
from surgery.plan.names import Attachment, Names
from surgery.spec import Spec

__all__ = [
    "adapter_plans",
    "adapter_tensors",
    "attach_notes",
    "changes_base",
    "check_attachments",
    "lay_out_adapters",
]

OWN_BASE = "../.."  # of an adapter in `adapters/<name>/`: the checkpoint that is written with it


def changes_base(spec: Spec, names: Names) -> bool:
    """Whether there is a checkpoint to write: anything but attaching does, and what changes a weight on the way."""
    only_attaches = spec.edits and all(isinstance(edit.op, Attach) for edit in spec.edits)
    return not only_attaches or any(entry.edits for entry in names.entries.values())


def check_attachments(names: Names) -> None:
    """Raises OpError if a later edit put another tensor where an adapter was attached."""
    problems = [problem for attachment in names.attachments for problem in _torn(attachment, names)]
    if problems:
        raise OpError(*problems)


def attach_notes(names: Names, checkpoint: Checkpoint) -> Iterator[str]:
    """What cannot be known of the live model that the adapters are for."""
    model_type = (checkpoint.config or {}).get("model_type")
    if names.attachments and model_type and model_type not in model_types():
        yield (
            f"how the live model of model_type {model_type!r} names and orders its modules is not known: adapters take "
            "the names on disk, and begin with other draws than the library's own"
        )


def _torn(attachment: Attachment, names: Names) -> Iterator[Problem]:
    seen = attachment.scene
    attached = {name: node for site in seen.sites for name, node in site.nodes.items()}
    read = set(toposort(attachment.nodes.values()))
    for name, node in (attached or seen.names).items():
        now = names.entries.get(name)
        if now is None or node not in toposort([now.node]):
            what = f"`{name}` is not what it was when {attachment.edit} attached to it"
            yield Problem(what, attachment.edit.place, "attach after the edits that move or drop tensors")
            return
        given = attachment.given.get(name)
        kept = given or (node if node in read else None)
        if kept is not None and not _has_value_of(now.node, kept):
            what = f"`{name}` is changed after {attachment.edit} made the adapter of its values"
            yield Problem(what, attachment.edit.place, "attach after the edits that change weights")
            return


def _has_value_of(node: Node, kept: Node) -> bool:
    """Whether `node` is `kept`, in another dtype or format at most."""
    while node is not kept and node.inputs:
        kernel = node.kernel
        is_same = isinstance(kernel, Transpose) or (isinstance(kernel, TiledKernel) and kernel.keeps_value)
        if not is_same and not kernel.label:
            return False
        node = node.inputs[0]
    return node is kept


def adapter_plans(names: Names, checkpoint: Checkpoint, *, writes_base: bool) -> tuple[AdapterPlan, ...]:
    """Every adapter with its config. Raises OpError."""
    return tuple(_adapter_plan(attachment, checkpoint, writes_base=writes_base) for attachment in names.attachments)


def _adapter_plan(attachment: Attachment, checkpoint: Checkpoint, *, writes_base: bool) -> AdapterPlan:
    op, place = attachment.op, attachment.edit.place
    if checkpoint.is_adapter:
        raise OpError(Problem("the source is an adapter, to which nothing can be attached", place))
    hub_id, _, commit = checkpoint.identity.partition("@")
    unchanged = None if writes_base or not commit else hub_id
    base_name = op.base or unchanged or (OWN_BASE if writes_base else None)
    revision = commit if base_name == unchanged and commit else None
    try:
        config = op.adapter_config(Attached(attachment.scene, attachment.nodes, base_name, revision))
    except OpError as error:
        raise OpError(*(replace(problem, at=problem.at or place) for problem in error.problems)) from None
    encoded = (json.dumps(config, indent=2) + "\n").encode()
    return AdapterPlan(op.adapter, op.name, op.stem, attachment.nodes, encoded)


def lay_out_adapters(adapters: Iterable[AdapterPlan]) -> Iterator[OutputFile]:
    """The weight file of each; an adapter is never sharded."""
    for adapter in adapters:
        stem = adapter.weights.removesuffix(".safetensors")
        whole = sum(node.type.num_bytes for node in adapter.nodes.values())
        yield from lay_out(adapter.nodes, whole + 1, {}, stem, 0).files


def adapter_tensors(adapters: Sequence[AdapterPlan], layout: Layout) -> Iterator[TensorPlan]:
    """The tensors of all adapters."""
    files = {file.name: file for file in layout.files}
    for adapter in adapters:
        for item in files[adapter.weights].tensors:
            name = f"{adapter.directory}/{item.name}"
            sources = sources_of(item.node)
            yield TensorPlan(
                name, item.node, "add", adapter.weights, item.start, item.stop, name, sources, (adapter.op,)
            )
