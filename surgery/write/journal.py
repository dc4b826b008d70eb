"""What a run has written so far, so that one that comes after it need not do that again.

A line for each evaluation whose outputs are written, and one for each file that is finished and synced. Nothing of it
is taken on trust: the bytes that a line speaks of are hashed before they are kept, so a line that is lost, or that
says more than has reached the disk, costs work and never a wrong byte.
"""

from __future__ import annotations

import hashlib
import json
import os
import time
import zlib
from collections.abc import Collection, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import cast

from surgery.checkpoint.paths import open_regular
from surgery.errors import CheckpointError, OutputError, Problem
from surgery.evidence import FileRecord, TensorRecord
from surgery.layout import OutputFile, Placed
from surgery.plan import Plan
from surgery.stream import Begun

__all__ = ["Done", "Journal", "identify", "verified"]

READ_BYTES = 1 << 20
SUCCESSION = 0.05  # seconds
_EMPTY = hashlib.sha256().hexdigest()

Records = dict[str, TensorRecord]  # by name
Run = dict[str, object]


@dataclass(slots=True)
class Done:
    """What is written: `tensors` by file, and the sha256 of each file that is finished."""

    tensors: dict[str, Records] = field(default_factory=dict[str, Records])
    sha256: dict[str, str] = field(default_factory=dict[str, str])
    checked: set[str] = field(default_factory=set[str])  # files on the Hub that were what it lists
    hashed: dict[str, list[Begun]] = field(default_factory=dict[str, list[Begun]])  # of others, how far, in order

    def file(self, file: OutputFile) -> FileRecord | None:
        """The evidence of a file, if it is finished."""
        records = self.tensors.get(file.name, {})
        tensors = [records.get(placed.name) or _empty(placed) for placed in file.tensors]
        if file.name not in self.sha256 or None in tensors:
            return None
        return FileRecord(file.name, file.num_bytes, self.sha256[file.name], tuple(filter(None, tensors)))


def _empty(placed: Placed) -> TensorRecord | None:
    """The evidence of a tensor without elements, which nobody writes."""
    return TensorRecord(placed.name, _EMPTY, None, None) if placed.start == placed.stop else None


def identify(plan: Plan) -> Run:
    """What a run must have in common with one that it goes on from: all that its bytes depend on."""
    sources = {
        name: [
            plan.checkpoints[name].identity,
            [[file.name, file.header.file_bytes, file.changed_ns] for file in plan.checkpoints[name].files],
            hashlib.sha256(json.dumps(plan.checkpoints[name].config).encode()).hexdigest(),
        ]
        for name in plan.streamed
    }
    return {"surgery": version("model-surgery"), "torch": version("torch"), "sources": sources, "plan": plan.digest}


class Journal:
    """The file that notes what is written. Close it when done."""

    def __init__(self, path: Path, run: Run) -> None:
        """`run`: as `identify` has it."""
        self._path = path
        self._run = cast(Run, json.loads(json.dumps(run)))
        self._fd = -1
        self._lines = bytearray()
        self._written_at = 0.0
        self.has_entries = False

    def read(self) -> Done:
        """What an earlier run noted. Raises OutputError, saying what differs, if it was not a run of the same plan."""
        at = str(self._path.parent)
        try:
            with open_regular(self._path) as file:
                first, *others = file.read().split(b"\n")
        except (CheckpointError, OSError) as error:
            reason = str(error) if isinstance(error, OSError) else error.problems[0].what
            raise OutputError(Problem(f"has a journal that {reason}", at, "remove it to begin anew")) from None
        before = _decode(first)
        if before != self._run:
            fix = "run without --resume to begin anew, or with what the run to be resumed was begun with"
            raise OutputError(Problem(f"was begun by another run: {_difference(before, self._run)}", at, fix))
        done = Done()
        for line in others[:-1]:  # the last is empty, or cut short by a kill
            _take(_decode(line), done)
        return done

    def start(self, done: Done) -> None:
        """Begin anew with what is done; until that is noted, the journal stays as it was."""
        self.has_entries = bool(done.tensors)
        new = self._path.with_name(f"{self._path.name}-new")
        new.unlink(missing_ok=True)
        self._fd = os.open(new, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_APPEND, 0o666)
        self._add(self._run)
        for file, records in done.tensors.items():
            self.add_tensors(file, list(records.values()))
        for file, sha256 in done.sha256.items():
            self._add({"file": file, "sha256": sha256})
        self.add_checked(done.checked)
        for file, states in done.hashed.items():
            for begun in states:
                self.add_hashed(file, begun)
        self._write()
        os.fsync(self._fd)
        new.rename(self._path)

    def add_tensors(self, file: str, records: Sequence[TensorRecord]) -> None:
        """Note tensors of `file` that were written, or will be in a moment."""
        tensors = [[item.name, item.sha256, item.max_error, item.rms_error] for item in records]
        self._add({"file": file, "tensors": tensors})
        self.has_entries = True

    def add_file(self, record: FileRecord) -> None:
        """Note a file that is finished, and on the disk. Its tensors are noted already."""
        self._add({"file": record.name, "sha256": record.sha256})
        self._write()
        os.fsync(self._fd)

    def add_checked(self, files: Collection[str]) -> None:
        """Note files on the Hub that were read whole, and are what it lists."""
        if files:
            self._add({"checked": sorted(files)})

    def add_hashed(self, file: str, begun: Begun) -> None:
        """Note how far a file on the Hub is hashed, as a hash to go on from."""
        self._add({"hashed": file, "begun": begun})

    def add_damage(self) -> None:
        """Note that one of these hashes was not what the Hub lists: none of them is gone on from."""
        self._add({"damaged": True})

    def _add(self, entry: Mapping[str, object]) -> None:
        """Lines that come in quick succession are written together."""
        self._lines += _encode(entry)
        if time.monotonic() - self._written_at > SUCCESSION:
            self._write()

    def _write(self) -> None:
        lines = memoryview(self._lines)
        while lines:
            lines = lines[os.write(self._fd, lines) :]
        self._lines = bytearray()
        self._written_at = time.monotonic()

    def close(self) -> None:
        """Close the file; what cannot be noted on a full disk is made again."""
        fd, self._fd = self._fd, -1
        if fd >= 0:
            with suppress(OSError):
                os.write(fd, self._lines)
            os.close(fd)


def _encode(entry: Mapping[str, object]) -> bytes:
    line = json.dumps(entry).encode()
    return b"%08x %s\n" % (zlib.crc32(line), line)


def _decode(line: bytes) -> Mapping[str, object]:
    """Nothing for what is no entry: a disk that lost its power may have left anything."""
    checksum, _, entry = line.partition(b" ")
    return json.loads(entry) if checksum == b"%08x" % zlib.crc32(entry) else {}


def _take(entry: Mapping[str, object], done: Done) -> None:
    if "sha256" in entry:
        done.sha256[str(entry["file"])] = str(entry["sha256"])
    elif "tensors" in entry:
        tensors = cast("list[tuple[str, str, float | None, float | None]]", entry["tensors"])
        done.tensors.setdefault(str(entry["file"]), {}).update({tensor[0]: TensorRecord(*tensor) for tensor in tensors})
    elif "checked" in entry:
        done.checked.update(cast("list[str]", entry["checked"]))
    elif "damaged" in entry:
        done.hashed.clear()
    elif "hashed" in entry:
        position, state = cast("tuple[int, str]", entry["begun"])
        done.hashed.setdefault(str(entry["hashed"]), []).append((position, state))


def _difference(before: Mapping[str, object], now: Mapping[str, object]) -> str:
    if not before:
        return "its journal is damaged"
    for package in ("surgery", "torch"):
        if before.get(package) != now[package]:
            return f"the version of {package} differs, it was {before.get(package)} and is {now[package]}"
    old, new = (cast("Mapping[str, list[object]]", run["sources"]) for run in (before, now))
    for name in [name for name in new if name in old and old[name] != new[name]]:
        identity, files, _ = old[name]
        if identity != new[name][0]:
            return f"`{name}` was {identity}, and is {new[name][0]}"
        if files != new[name][1]:
            return f"the files of `{name}` are others, or were written to since"
        return f"the config of `{name}` differs"
    return "the spec differs"


def verified(noted: Done, files: Sequence[OutputFile], directory: Path, workers: int) -> Done:
    """What of it is in `directory` as it was noted: finished files, and of the others whole evaluations."""
    done = Done(checked=noted.checked, hashed=noted.hashed)
    with ThreadPoolExecutor(workers, "surgery-verify") as executor:
        finished = [file for file in files if noted.file(file)]
        hashes = executor.map(partial(_sha256_of_file, directory), finished)
        for file, sha256 in zip(finished, hashes, strict=True):
            if sha256 == noted.sha256[file.name]:
                done.sha256[file.name] = sha256
                done.tensors[file.name] = noted.tensors.get(file.name, {})
        for file in files:
            records = noted.tensors.get(file.name, {})
            if records and file.name not in done.sha256:
                done.tensors[file.name] = _verified_tensors(file, records, directory / file.name, executor)
    return done


def _verified_tensors(file: OutputFile, records: Records, path: Path, executor: ThreadPoolExecutor) -> Records:
    def is_there(outputs: list[Placed]) -> bool:
        start = len(file.header)
        return all(
            placed.name in records
            and records[placed.name].sha256 == _sha256(path, start + placed.start, start + placed.stop)
            for placed in outputs
        )

    evaluations = list(file.by_call().values())
    there = executor.map(is_there, evaluations)
    kept = [outputs for outputs, is_kept in zip(evaluations, there, strict=True) if is_kept]
    return {placed.name: records[placed.name] for outputs in kept for placed in outputs}


def _sha256_of_file(directory: Path, file: OutputFile) -> str:
    path = directory / file.name
    return _sha256(path, 0, file.num_bytes) if path.is_file() and path.stat().st_size == file.num_bytes else ""


def _sha256(path: Path, start: int, stop: int) -> str:
    """Of bytes [start, stop); nothing where they cannot be read."""
    digest = hashlib.sha256()
    try:
        with open_regular(path) as file:
            file.seek(start)
            while start < stop and (data := file.read(min(READ_BYTES, stop - start))):
                digest.update(data)
                start += len(data)
    except (CheckpointError, OSError):
        return ""
    return digest.hexdigest() if start == stop else ""
