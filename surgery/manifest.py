"""`Manifest`: the plan plus evidence. No wall-clock, host or path is in it: the same run gives the same bytes."""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from itertools import islice
from pathlib import Path
from typing import cast

from surgery.checkpoint import ADAPTER_CONFIG, SourceFile
from surgery.checkpoint.home import read_json
from surgery.checkpoint.paths import is_text, open_regular
from surgery.errors import CheckpointError, OpError, Problem, VerifyError
from surgery.evidence import FileRecord, TensorRecord
from surgery.forms import is_count, lists_of, maps_of, one_of, record
from surgery.op import SOURCE
from surgery.plan import Plan, TensorPlan
from surgery.types import text

__all__ = ["MANIFEST_NAME", "Manifest", "check_bases", "hashed_models", "make_manifest", "read_manifest"]

MANIFEST_NAME = "surgery-manifest.json"
SEAL = "manifest_sha256"
PARTS_AT_ONCE = 10_000
MOST_BYTES = 2 << 30  # of a manifest: that of a million tensors has a third of it
LONGEST_NAME = 255  # bytes of each part
SHA256 = re.compile("[0-9a-f]{64}")


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
    def models(self) -> Mapping[str, Mapping[str, object]]:
        """What it was made from: the source and the further models, their identity and files."""
        further = cast("Mapping[str, Mapping[str, object]]", self.content.get("models", {}))
        return {SOURCE: cast("Mapping[str, object]", self.content["source"]), **further}

    @property
    def tensors(self) -> Mapping[str, Mapping[str, object]]:
        """The output tensors by name: dtype, shape, file, data_offsets, sha256, sources, ops, error."""
        return cast("Mapping[str, Mapping[str, object]]", self.content["tensors"])


def make_manifest(plan: Plan, source_hashes: Mapping[tuple[str, str], str], written: Sequence[FileRecord]) -> Manifest:
    """The manifest of a finished run."""
    records = {(file.name, record.name): record for file in written for record in file.tensors}
    resolved = {key: value for key, value in plan.spec.resolved.items() if key != "params"}
    # A local path would tie the bytes to one machine.
    resolved["source"] = plan.checkpoint.identity
    models = {name: _model(name, plan, source_hashes) for name in plan.spec.models}
    if models:
        resolved["models"] = {name: plan.checkpoints[name].identity for name in models}
    canonical = json.dumps(resolved, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    body: dict[str, object] = {
        "version": 1,
        "spec": resolved,
        "spec_sha256": hashlib.sha256(canonical.encode()).hexdigest(),
        "plan_sha256": plan.digest,
        "versions": {name: version(package) for name, package in _VERSIONS.items()},
        "source": _model(SOURCE, plan, source_hashes),
        "models": models,
        **_base(plan, source_hashes),
        "files": [{"name": file.name, "bytes": file.num_bytes, "sha256": file.sha256} for file in written],
        "tensors": {tensor.name: _tensor(tensor, records[tensor.file, tensor.key]) for tensor in plan.tensors},
        "dropped": {name: str(type_) for name, type_ in plan.dropped.items()},
    }
    return Manifest({**body, SEAL: _seal(body)})


def _base(plan: Plan, hashes: Mapping[tuple[str, str], str]) -> dict[str, object]:
    return {"base": _model(SOURCE, plan, hashes)} if _is_extracted(plan) else {}


def _is_extracted(plan: Plan) -> bool:
    return plan.config_name == ADAPTER_CONFIG and not plan.checkpoint.is_adapter


def hashed_models(plan: Plan, *, hash_sources: bool) -> Collection[str]:
    """The models whose files `apply` hashes: all if asked to, else a source that an adapter is or was extracted for.

    Why not all: to hash what is read takes longer than to average it, and the identity and the headers of a checkpoint
    are known without.
    """
    if hash_sources:
        return plan.streamed
    needed = _is_extracted(plan) or any(True for _ in _bases(plan))
    return (SOURCE,) if needed else ()


def check_bases(plan: Plan, hashes: Mapping[tuple[str, str], str]) -> None:
    """Raises OpError if an adapter's manifest says that it was extracted for other weights than the source's.

    Only now are they known: the identity that planning compares is that of a local checkpoint's headers.
    """
    for adapter, file, sha256 in _bases(plan):
        if sha256 != hashes.get((SOURCE, file)):
            what = f"adapter `{adapter}` was extracted for other weights: `{file}` of the source differs"
            at = plan.checkpoints[adapter].home.at(MANIFEST_NAME)
            raise OpError(Problem(what, at, "give that base as the source, or set `any_base: true`"))


def _bases(plan: Plan) -> Iterator[tuple[str, str, str]]:
    """The files of the base that adapters were extracted for, as their manifests say: adapter, file, sha256."""
    if any(options.get("any_base") for options in plan.spec.options):
        return
    for name in plan.streamed:
        model = plan.checkpoints[name]
        has_manifest = model.is_adapter and model.home.has(MANIFEST_NAME)
        base = read_json(model.home, MANIFEST_NAME).get("base") if has_manifest else None
        files = cast("Mapping[str, object]", base).get("files") if isinstance(base, Mapping) else None
        for entry in cast("list[dict[str, object]]", files) if isinstance(files, list) else []:
            if name != SOURCE and "sha256" in entry:
                yield name, str(entry.get("name")), str(entry["sha256"])


def _model(name: str, plan: Plan, hashes: Mapping[tuple[str, str], str]) -> dict[str, object]:
    """What a model was; of one whose config alone was read there are no files."""
    model = plan.checkpoints[name]
    files = [_source_file(file, hashes.get((name, file.name))) for file in model.files if name in plan.streamed]
    return {"identity": model.identity, "files": files}


def _source_file(file: SourceFile, sha256: str | None) -> dict[str, object]:
    """What tells a source file from another; `sha256` is of bytes that this run hashed, all of them."""
    header = file.header
    entry: dict[str, object] = {"name": file.name, "bytes": header.file_bytes, "header_sha256": header.sha256}
    hashes = {"listed_sha256": file.sha256, "sha256": sha256}
    return entry | {name: value for name, value in hashes.items() if value}


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


def _is_sha256(value: object) -> bool:
    return isinstance(value, str) and SHA256.fullmatch(value) is not None


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _is_file_name(value: object) -> bool:
    """Of a file that could lie in the output."""
    if not is_text(value) or not value:
        return False
    name = cast(str, value)
    return "\0" not in name and all(len(os.fsencode(part)) <= LONGEST_NAME for part in name.split("/"))


def _is_span(value: object) -> bool:
    return lists_of(is_count)(value) and len(cast("list[int]", value)) == len(("start", "stop"))


def _is_spec(value: object) -> bool:
    """As far as it is read here; loading it again checks the rest."""
    fields = cast("dict[str, object]", value) if isinstance(value, dict) else {}
    return is_text(fields.get("source")) and maps_of(is_text)(fields.get("models", {}))


_source_file_form = record(
    {"name": is_text, "bytes": is_count, "header_sha256": _is_sha256},
    {"listed_sha256": _is_sha256, "sha256": _is_sha256},
)
_model_form = record({"identity": is_text, "files": lists_of(_source_file_form)})
_tensor_form = record(
    {
        "dtype": is_text,
        "shape": lists_of(is_count),
        "file": is_text,
        "data_offsets": _is_span,
        "sha256": _is_sha256,
        "sources": lists_of(is_text),
        "ops": lists_of(is_text),
    },
    {"error": record({"max": _is_number, "rms": _is_number})},
)
_form = record(
    {
        "version": one_of(1),
        "spec": _is_spec,
        "spec_sha256": _is_sha256,
        "plan_sha256": _is_sha256,
        "versions": record(dict.fromkeys(_VERSIONS, is_text)),
        "source": _model_form,
        "models": maps_of(_model_form),
        "files": lists_of(record({"name": _is_file_name, "bytes": is_count, "sha256": _is_sha256})),
        "tensors": maps_of(_tensor_form),
        "dropped": maps_of(is_text),
        SEAL: _is_sha256,
    },
    {"base": _model_form},
)


def _is_sealed(manifest: Manifest, raw: bytes) -> bool:
    try:
        return manifest.content[SEAL] == _seal(manifest.content) and manifest.encode() == raw
    except ValueError:  # a lone surrogate is no text
        return False


def _read(path: Path) -> bytes:
    with open_regular(path) as file:
        if os.fstat(file.fileno()).st_size > MOST_BYTES:
            raise ValueError(f"it has more than {MOST_BYTES} bytes")
        return file.read()


def read_manifest(out: Path) -> Manifest:
    """The manifest in `out`. Raises VerifyError if there is none, or if one bit of it was changed."""
    path = out / MANIFEST_NAME
    try:
        raw = _read(path)
        content: object = json.loads(raw)
    except CheckpointError as error:
        fix = "give a directory that `surgery apply` wrote"
        raise VerifyError(Problem(f"has no manifest: {error.problems[0].what}", str(out), fix)) from None
    except (ValueError, RecursionError) as error:
        raise VerifyError(Problem(f"is damaged: {error}", str(path), "apply again")) from None
    fields = cast("dict[str, object]", content) if _form(content) else {}
    manifest = Manifest(fields)
    if not fields or not _is_sealed(manifest, raw):
        raise VerifyError(Problem("is damaged: it does not match its own seal", str(path), "apply again"))
    return manifest
