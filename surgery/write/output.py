"""The whole output of a plan, from the first header to the rename."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Collection, Iterable, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import cast

from surgery.checkpoint import ADAPTER_CONFIG
from surgery.checkpoint.remote import Damaged
from surgery.errors import OutputError, Problem
from surgery.evidence import FileRecord, TensorRecord
from surgery.layout import OutputFile
from surgery.manifest import MANIFEST_NAME, Manifest, check_bases, hashed_models, make_manifest
from surgery.plan import Plan
from surgery.stream import Resources, Stream
from surgery.write.place import Workplace
from surgery.write.weights import WeightWriter

__all__ = ["ProgressReport", "write_output"]

JOURNAL_NAME = ".surgery-journal"
INDEX_NAME = "model.safetensors.index.json"

ProgressReport = Callable[[int, int], None]
"""Called with bytes written so far, and in all."""


def write_output(
    plan: Plan,
    out: Path,
    resources: Resources,
    *,
    overwrite: bool,
    resume: bool,
    hash_sources: bool,
    report: ProgressReport,
) -> Manifest:
    """Do what `plan` says. OUT appears whole, by one rename, or not at all.

    Raises OutputError before anything is written if OUT cannot be, CheckpointError and OpError while
    streaming; the shards that were finished by then are kept for `resume`.
    """
    workplace = Workplace(out, overwrite=overwrite)
    workplace.check(plan)
    resources.fitted(plan.cost)
    try:
        workplace.open(keep=resume)
        try:
            hashed = hashed_models(plan, hash_sources=hash_sources)
            manifest = _fill(plan, workplace.path, resources, hashed, report, resume=resume)
            workplace.publish()
        except BaseException as error:
            if (
                isinstance(error, Damaged)
                or not _Journal(workplace.path / JOURNAL_NAME, _run_identity(plan)).has_entries()
            ):
                workplace.remove()
            raise
        finally:
            workplace.close()
    except OSError as error:
        if isinstance(error, OutputError):
            raise
        fix = "mend that, and run the same command with --resume"
        raise OutputError(Problem(f"cannot be written: {error.strerror or error}", str(out), fix)) from error
    return manifest


def _fill(
    plan: Plan,
    directory: Path,
    resources: Resources,
    hashed: Collection[str],
    report: ProgressReport,
    *,
    resume: bool,
) -> Manifest:
    journal = _Journal(directory / JOURNAL_NAME, _run_identity(plan))
    finished = journal.finished(directory) if resume else {}
    journal.start(finished)
    for file in plan.layout.files:
        (directory / file.name).parent.mkdir(parents=True, exist_ok=True)
    stream = Stream(plan, resources, hashed, directory)
    try:
        weights = _write_weights(plan, directory, stream, finished, journal, report)
        source_hashes = stream.source_hashes()
        check_bases(plan, source_hashes)
    finally:
        stream.close()
    del stream  # and its buffers: the manifest is the larger, the more tensors there are
    others = _write_others(plan, directory)
    manifest = make_manifest(plan, source_hashes, [*weights, *others])
    _write_synced(directory, MANIFEST_NAME, manifest.pieces())
    (directory / JOURNAL_NAME).unlink()
    return manifest


def _write_weights(
    plan: Plan,
    directory: Path,
    stream: Stream,
    finished: Mapping[str, FileRecord],
    journal: _Journal,
    report: ProgressReport,
) -> list[FileRecord]:
    total = sum(file.num_bytes for file in plan.layout.files)
    done = sum(record.num_bytes for record in finished.values())
    records = dict(finished)
    todo = [file for file in plan.layout.files if file.name not in finished]
    writer: WeightWriter | None = None
    current: OutputFile | None = None
    try:
        for chunk in stream.chunks(todo):
            if chunk.file is not current:
                if writer and current:
                    records[current.name] = journal.add(writer.finish())
                writer, current = WeightWriter(chunk.file, directory, stream.tensor_hashes), chunk.file
            assert writer is not None
            writer.write(chunk)
            done += len(chunk.data)
            report(done, total)
        if writer and current:
            records[current.name] = journal.add(writer.finish())
        for file in [file for file in todo if file.name not in records]:  # all of its tensors are empty
            records[file.name] = journal.add(WeightWriter(file, directory, stream.tensor_hashes).finish())
    finally:
        if writer:
            writer.close()
    report(total, total)
    return [records[file.name] for file in plan.layout.files]


def _run_identity(plan: Plan) -> str:
    """What a run to be resumed must have in common with this one: the plan, and the state of the source."""
    state = [
        [name, file.name, file.header.file_bytes, file.mtime_ns]
        for name in plan.streamed
        for file in plan.checkpoints[name].files
    ]
    return f"{plan.digest} {version('model-surgery')} {json.dumps(state)}"


class _Journal:
    """The weight files that are finished, with their evidence: what `resume` need not do again."""

    def __init__(self, path: Path, run: str) -> None:
        self._path = path
        self._run = run

    def has_entries(self) -> bool:
        """Whether there is anything to resume from."""
        return self._path.exists() and self._path.read_text().count("\n") > 1

    def finished(self, directory: Path) -> dict[str, FileRecord]:
        """Files of an earlier run of the same plan whose bytes still have their hash."""
        if not self._path.exists():
            return {}
        run, *lines = self._path.read_text().split("\n")
        if run != self._run:
            what = (
                "was begun by another run: the spec, the source or surgery's version differ, or the source was touched"
            )
            fix = "run without --resume to begin anew, or with the spec and source of the run to be resumed"
            raise OutputError(Problem(what, str(directory), fix))
        records = [_decode_record(line) for line in lines[:-1]]  # the last is empty, or cut short by a kill
        return {record.name: record for record in records if _hash_file(directory / record.name) == record.sha256}

    def start(self, finished: Mapping[str, FileRecord]) -> None:
        """Begin the journal with what is finished already."""
        self._path.write_text(self._run + "\n")
        for record in finished.values():
            self.add(record)

    def add(self, record: FileRecord) -> FileRecord:
        """Note a finished file."""
        tensors = [[item.name, item.sha256, item.max_error, item.rms_error] for item in record.tensors]
        entry = {"name": record.name, "bytes": record.num_bytes, "sha256": record.sha256, "tensors": tensors}
        with self._path.open("a") as file:
            file.write(json.dumps(entry) + "\n")
            file.flush()
            os.fsync(file.fileno())
        return record


def _decode_record(line: str) -> FileRecord:
    entry = cast("dict[str, object]", json.loads(line))
    tensors = cast("list[tuple[str, str, float | None, float | None]]", entry["tensors"])
    records = tuple(TensorRecord(*tensor) for tensor in tensors)
    return FileRecord(cast(str, entry["name"]), cast(int, entry["bytes"]), cast(str, entry["sha256"]), records)


def _hash_file(path: Path) -> str:
    if not path.is_file():
        return ""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _write_others(plan: Plan, directory: Path) -> list[FileRecord]:
    """Index, config and side files, sorted by name."""
    contents = {INDEX_NAME: plan.layout.index, plan.config_name: plan.config}
    contents |= {f"{adapter.directory}/{ADAPTER_CONFIG}": adapter.config for adapter in plan.adapters}
    records = [_write_synced(directory, name, [content]) for name, content in contents.items() if content]
    for name in plan.side_files:
        records.append(_write_synced(directory, name, plan.checkpoint.home.pieces(name)))
    return sorted(records, key=lambda record: record.name)


def _write_synced(directory: Path, name: str, pieces: Iterable[bytes]) -> FileRecord:
    digest = hashlib.sha256()
    (directory / name).parent.mkdir(parents=True, exist_ok=True)
    with (directory / name).open("wb") as file:
        for piece in pieces:
            digest.update(piece)
            file.write(piece)
        num_bytes = file.tell()
        file.flush()
        os.fsync(file.fileno())
    return FileRecord(name, num_bytes, digest.hexdigest())
