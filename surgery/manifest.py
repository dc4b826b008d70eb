"""`Manifest`: the plan plus evidence. No wall-clock, host or path is in it: the same run gives the same bytes."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from itertools import islice
from pathlib import Path
from typing import cast

from surgery.checkpoint import ADAPTER_CONFIG, Checkpoint
from surgery.checkpoint.paths import read_json, stands
from surgery.errors import OpError, Problem, VerifyError
from surgery.evidence import FileRecord, TensorRecord
from surgery.op import SOURCE
from surgery.plan import Plan, TensorPlan
from surgery.types import text

__all__ = ["MANIFEST_NAME", "Manifest", "check_bases", "make_manifest", "read_manifest"]

MANIFEST_NAME = "surgery-manifest.json"
SEAL = "manifest_sha256"
PARTS_AT_ONCE = 10_000


@dataclass(frozen=True, slots=True)
class Manifest:
    """What was made, from what, and how exactly, as plain data; its schema is `schemas/manifest.v1.schema.json`."""

    content: Mapping[str, object]

    def __str__(self) -> str:
        return text(self)

    def encode(self) -> bytes:
        """The file's bytes."""
        return b"".join(self.pieces())

    def pieces(self) -> Iterator[bytes]:
        """The file's bytes, a part at a time: as JSON, 100,000 tensors are millions of little strings."""
        parts = json.JSONEncoder(indent=1, ensure_ascii=False).iterencode(self.content)
        while batch := "".join(islice(parts, PARTS_AT_ONCE)):
            yield batch.encode()
        yield b"\n"

    @property
    def files(self) -> tuple[FileRecord, ...]:
        """The output files with their hashes."""
        entries = cast("list[dict[str, object]]", self.content["files"])
        return tuple(
            FileRecord(cast(str, entry["name"]), cast(int, entry["bytes"]), cast(str, entry["sha256"]))
            for entry in entries
        )

    @property
    def tensors(self) -> Mapping[str, Mapping[str, object]]:
        """The output tensors by name: dtype, shape, file, data_offsets, sha256, sources, ops, error."""
        return cast("Mapping[str, Mapping[str, object]]", self.content["tensors"])


def make_manifest(plan: Plan, source_hashes: Mapping[tuple[str, str], str], written: Sequence[FileRecord]) -> Manifest:
    """The manifest of a finished run."""
    records = {record.name: record for file in written for record in file.tensors}
    resolved = {key: value for key, value in plan.spec.resolved.items() if key != "params"}
    # A local path would tie the bytes to one machine.
    resolved["source"] = plan.checkpoint.identity
    models = {name: _model(name, plan.checkpoints[name], source_hashes) for name in plan.spec.models}
    if models:
        resolved["models"] = {name: plan.checkpoints[name].identity for name in models}
    canonical = json.dumps(resolved, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    body: dict[str, object] = {
        "version": 1,
        "spec": resolved,
        "spec_sha256": hashlib.sha256(canonical.encode()).hexdigest(),
        "plan_sha256": plan.digest,
        "versions": {name: version(package) for name, package in _VERSIONS.items()},
        "source": _model(SOURCE, plan.checkpoint, source_hashes),
        "models": models,
        **_base(plan, source_hashes),
        "files": [{"name": file.name, "bytes": file.num_bytes, "sha256": file.sha256} for file in written],
        "tensors": {tensor.name: _tensor(tensor, records[tensor.name]) for tensor in plan.tensors},
        "dropped": {name: str(type_) for name, type_ in plan.dropped.items()},
    }
    return Manifest({**body, SEAL: _seal(body)})


def _base(plan: Plan, hashes: Mapping[tuple[str, str], str]) -> dict[str, object]:
    extracted = plan.config_name == ADAPTER_CONFIG and not plan.checkpoint.is_adapter
    return {"base": _model(SOURCE, plan.checkpoint, hashes)} if extracted else {}


def check_bases(plan: Plan, hashes: Mapping[tuple[str, str], str]) -> None:
    """Raises OpError if an adapter's manifest says that it was extracted for other weights than the source's.

    Only now are they known: the identity that planning compares is that of a local checkpoint's headers.
    """
    if any(options.get("any_base") for options in plan.spec.options):
        return
    for name in plan.streamed:
        model = plan.checkpoints[name]
        path = model.path / MANIFEST_NAME
        base = read_json(path, model.path).get("base") if model.is_adapter and stands(path) else None
        files = cast("Mapping[str, object]", base).get("files") if isinstance(base, Mapping) else None
        for entry in cast("list[dict[str, object]]", files) if isinstance(files, list) else []:
            if name != SOURCE and entry.get("sha256") != hashes.get((SOURCE, str(entry.get("name")))):
                what = f"adapter `{name}` was extracted for other weights: `{entry.get('name')}` of the source differs"
                raise OpError(Problem(what, str(path), "give that base as the source, or set `any_base: true`"))


def _model(name: str, checkpoint: Checkpoint, hashes: Mapping[tuple[str, str], str]) -> dict[str, object]:
    files = [
        {"name": file.name, "bytes": file.header.file_bytes, "sha256": hashes[name, file.name]}
        for file in checkpoint.files
        if (name, file.name) in hashes  # of a model whose config alone was read there is none
    ]
    return {"identity": checkpoint.identity, "files": files}


def _seal(body: Mapping[str, object]) -> str:
    """sha256 over everything in a manifest but the seal itself."""
    digest = hashlib.sha256()
    for piece in json.JSONEncoder(sort_keys=True).iterencode({key: body[key] for key in body if key != SEAL}):
        digest.update(piece.encode())
    return digest.hexdigest()


_VERSIONS = {"surgery": "model-surgery", "torch": "torch", "safetensors": "safetensors"}


def _tensor(tensor: TensorPlan, record: TensorRecord) -> dict[str, object]:
    entry: dict[str, object] = {
        "dtype": tensor.node.type.dtype.disk_name,
        "shape": list(tensor.node.type.shape),
        "file": tensor.file,
        "data_offsets": [tensor.start, tensor.stop],
        "sha256": record.sha256,
        "sources": list(tensor.sources),
        "ops": list(tensor.ops),
    }
    if record.max_error is not None:
        entry["error"] = {"max": record.max_error, "rms": record.rms_error}
    return entry


def _is_whole(fields: dict[str, object]) -> bool:
    """Whether everything that verifying reads is there, in the form in which it was written."""
    files, tensors = fields.get("files"), fields.get("tensors")
    if fields.get("version") != 1 or not isinstance(files, list) or not isinstance(tensors, dict):
        return False
    entries = [*cast("list[object]", files), *cast("dict[str, object]", tensors).values()]
    return isinstance(fields.get("spec"), dict) and all(
        isinstance(entry, dict) and isinstance(cast("dict[str, object]", entry).get("sha256"), str) for entry in entries
    )


def read_manifest(out: Path) -> Manifest:
    """The manifest in `out`. Raises VerifyError if there is none, or if one bit of it was changed."""
    path = out / MANIFEST_NAME
    try:
        raw = path.read_bytes()
        content: object = json.loads(raw)
    except OSError as error:
        fix = "give a directory that `surgery apply` wrote"
        raise VerifyError(Problem(f"has no manifest: {error.strerror}", str(out), fix)) from None
    except (ValueError, RecursionError) as error:
        raise VerifyError(Problem(f"is damaged: {error}", str(path), "apply again")) from None
    fields = cast("dict[str, object]", content) if isinstance(content, dict) else {}
    manifest = Manifest(fields)
    if not _is_whole(fields) or fields.get(SEAL) != _seal(fields) or manifest.encode() != raw:
        raise VerifyError(Problem("is damaged: it does not match its own seal", str(path), "apply again"))
    return manifest
