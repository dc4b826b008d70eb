"""The whole output of a plan, from the first header to the rename."""

from __future__ import annotations

import hashlib
import logging
import os
from collections.abc import Callable, Collection, Iterable
from pathlib import Path

from surgery.checkpoint import ADAPTER_CONFIG
from surgery.checkpoint.remote import Damaged
from surgery.errors import OutputError, Problem
from surgery.evidence import FileRecord
from surgery.layout import OutputFile
from surgery.manifest import MANIFEST_NAME, Manifest, check_bases, hashed_models, make_manifest
from surgery.plan import Plan
from surgery.stream import Earlier, Resources, Stream
from surgery.workplace import Workplace
from surgery.write.journal import Done, Journal, identify, verified
from surgery.write.vouched import vouched
from surgery.write.weights import WeightWriter

__all__ = ["ProgressReport", "write_output"]

_log = logging.getLogger(__name__)
UNCHECKED = "note: %s was not read in one go, and so not held against its sha256; --hash-sources does"
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

    What a run of the same plan was stopped in is gone on with; with `resume` a run of another plan is refused, instead
    of thrown away. Raises OutputError before anything is written if OUT cannot be, CheckpointError and OpError while
    streaming; what was written by then is kept for the next run.
    """
    workplace = Workplace(out, overwrite=overwrite)
    workplace.check(plan)
    resources.fitted(plan.cost)
    journal = Journal(workplace.journal, identify(plan))
    try:
        workplace.open()
        try:
            hashed = hashed_models(plan, hash_sources=hash_sources)
            done, earlier = _done(plan, workplace, journal, hashed, resources.workers, resume=resume)
            try:
                manifest = _fill(plan, workplace, resources, hashed, done, earlier, journal, report)
                workplace.publish()
            except BaseException as error:
                if isinstance(error, Damaged):
                    journal.add_damage()
                if not journal.has_entries:
                    workplace.remove()
                raise
        finally:
            journal.close()
            workplace.close()
    except OSError as error:
        if isinstance(error, OutputError):
            raise
        fix = "mend that, and run the same command with --resume"
        reason = f"{error.strerror or error}{f', at {error.filename}' if error.filename else ''}"
        raise OutputError(Problem(f"cannot be written: {reason}", str(out), fix)) from error
    return manifest


def _done(
    plan: Plan, workplace: Workplace, journal: Journal, hashed: Collection[str], workers: int, *, resume: bool
) -> tuple[Done, Earlier]:
    """What earlier runs of the same plan have written, and what they have seen of files on the Hub."""
    files = plan.layout.files
    noted = Done()
    if os.path.lexists(workplace.journal):
        try:
            noted = journal.read()
        except OutputError as error:
            if resume:
                raise
            _log.warning("note: begins anew: %s %s", error.problems[0].at, error.problems[0].what)
    workplace.keep([file.name for file in files if file.name in noted.tensors])
    done, earlier = vouched(verified(noted, files, workplace.output, workers), plan, hashed)
    journal.start(done)
    return done, earlier


def _fill(
    plan: Plan,
    workplace: Workplace,
    resources: Resources,
    hashed: Collection[str],
    done: Done,
    earlier: Earlier,
    journal: Journal,
    report: ProgressReport,
) -> Manifest:
    for file in plan.layout.files:
        (workplace.output / file.name).parent.mkdir(parents=True, exist_ok=True)
    checkpoints = {name: plan.checkpoints[name] for name in plan.streamed}
    stream = Stream(checkpoints, plan.cost, resources, hashed, workplace.path, earlier)
    try:
        weights = _write_weights(plan, workplace.output, stream, done, journal, report)
        source_hashes = stream.source_hashes()
        check_bases(plan, source_hashes)
        for file in stream.unchecked:
            _log.warning(UNCHECKED, file.place)
    finally:
        stream.close()
    del stream  # and its buffers: the manifest is the larger, the more tensors there are
    others = _write_others(plan, workplace.output)
    manifest = make_manifest(plan, source_hashes, [*weights, *others])
    _write_synced(workplace.output, MANIFEST_NAME, manifest.pieces())
    return manifest


def _write_weights(
    plan: Plan, directory: Path, stream: Stream, done: Done, journal: Journal, report: ProgressReport
) -> list[FileRecord]:
    files = plan.layout.files
    records = {file.name: record for file in files if (record := done.file(file))}
    there = {name: set(tensors) for name, tensors in done.tensors.items()}
    there |= {file.name: {placed.name for placed in file.tensors} for file in files if file.name in records}
    progress = _Progress(plan, done, report)

    def writer_of(file: OutputFile) -> WeightWriter:
        return WeightWriter(file, directory, stream.tensor_hashes, done.tensors.get(file.name, {}))

    def finish(writer: WeightWriter) -> None:
        record = writer.finish()
        journal.add_file(record)
        records[record.name] = record

    writer: WeightWriter | None = None
    try:
        for chunk in stream.chunks(files, there):
            if writer is None or writer.file is not chunk.file:
                if writer:
                    finish(writer)
                writer = writer_of(chunk.file)
            written = writer.write(chunk)
            if written:
                journal.add_tensors(chunk.file.name, written)
                journal.add_checked(stream.newly_checked())
                for file, begun in stream.newly_hashed():
                    journal.add_hashed(file, begun)
            progress.add(len(chunk.data))
        if writer:
            finish(writer)
        for file in [file for file in files if file.name not in records]:  # nothing of them was left to be written
            finish(writer := writer_of(file))
    finally:
        if writer:
            writer.close()
    return [records[file.name] for file in files]


class _Progress:
    """Bytes of weights that are written, and in all, to be reported."""

    def __init__(self, plan: Plan, done: Done, report: ProgressReport) -> None:
        placed = [(file.name, item) for file in plan.layout.files for item in file.tensors]
        self._total = sum(item.stop - item.start for _, item in placed)
        self._written = sum(item.stop - item.start for file, item in placed if item.name in done.tensors.get(file, {}))
        self._report = report
        self.add(0)

    def add(self, num_bytes: int) -> None:
        """So many more."""
        self._written += num_bytes
        self._report(self._written, self._total)


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
