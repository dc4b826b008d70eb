"""Runs that are killed: `python -m crash JOB` forks one after the other, and prints what became of them as JSON.

Why a process of its own: a fork of one that has imported torch, and used no thread yet, is a run that begins at once,
so that hundreds can be killed in the time that a dozen command lines take to import it.
"""

import json
import os
import random
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import surgery
import surgery.write  # and with it torch

CALLS = ("fsync", "rename", "write", "pwrite", "unlink", "rmdir", "mkdir", "ftruncate", "close")
MOST_KILLS = 3  # of one output


def main() -> None:
    job = json.loads(sys.argv[1])
    print(json.dumps(JOBS[job.pop("kind")](**job)))


def random_moments(spec: dict[str, Any], home: str, kills: int, seed: int) -> dict[str, Any]:
    """Kill runs at random moments, and resume each output until it is done, killing some of those runs too."""
    chance = random.Random(seed)
    whole = Path(home) / "whole"
    start = time.monotonic()
    assert _ended(_fork(_apply, spec, whole)) == 0
    duration = time.monotonic() - start
    found: dict[str, Any] = {"kills": 0, "differ": [], "half": [], "resumed": 0, "duration": duration}
    while found["kills"] < kills:
        out = Path(home) / f"out-{found['kills']}"
        for number in range(MOST_KILLS + 1):
            is_last = number == MOST_KILLS or (number > 0 and chance.random() < 0.5)
            first = Path(home) / "first"
            run = _fork(_apply, spec, out, first)
            if not is_last:
                time.sleep(chance.uniform(0, duration))
                os.kill(run, signal.SIGKILL)
            code = _ended(run)
            found["resumed"] += number > 0 and first.exists() and int(first.read_text() or 0) > 0
            first.unlink(missing_ok=True)
            if code == 0:
                break
            assert code == -signal.SIGKILL, code
            found["kills"] += 1
            _note(found, whole, out, is_killed=True)
        _note(found, whole, out, is_killed=False)
        _remove(out)
    return found


def every_call(spec: dict[str, Any], home: str, at_most: int, *, overwrite: bool) -> dict[str, Any]:
    """Kill a run before each of the calls that change the disk (`at_most` of them), and resume it.

    With `overwrite` there is an OUT already, which is there until the new one is.
    """
    whole = Path(home) / "whole"
    counted = Path(home) / "counted"
    assert _ended(_fork(_counting, spec, whole, counted)) == 0
    num_calls = int(counted.read_text())
    last = range(max(0, num_calls - at_most // 2), num_calls)
    moments = sorted({*last, *range(0, num_calls, max(1, 2 * num_calls // at_most))})
    found: dict[str, Any] = {"kills": 0, "differ": [], "half": [], "calls": num_calls}
    for moment in moments:
        out = Path(home) / f"out-{moment}"
        if overwrite:
            out.mkdir()
            (out / "old").write_text("as it was")
        code = _ended(_fork(_until, spec, out, moment))
        found["kills"] += code == -signal.SIGKILL
        if not overwrite or (out.exists() and not (out / "old").exists()):
            _note(found, whole, out, is_killed=True)
        elif sorted(out.iterdir()) != [out / "old"]:
            found["half"].append(out.name)
        if overwrite or not out.exists():
            assert _ended(_fork(_apply, spec, out)) == 0
        _note(found, whole, out, is_killed=False)
        _remove(out)
    return found


JOBS: dict[str, Callable[..., dict[str, Any]]] = {"random_moments": random_moments, "every_call": every_call}


def _apply(spec: dict[str, Any], out: Path, first: Path | None = None) -> None:
    """`first`: where the bytes are noted that were there when the run began."""

    def report(done: int, total: int) -> None:
        del total
        if first and not first.exists():
            first.write_text(str(done))

    plan = surgery.plan(spec)
    overwrite = out.exists()  # as it was before, or by a run that was killed after its rename
    surgery.apply(plan, out, resume=True, overwrite=overwrite, memory="128MiB", workers=2, device="cpu", report=report)


def _counting(spec: dict[str, Any], out: Path, counted: Path) -> None:
    with _each_call(lambda: None) as counter:
        _apply(spec, out)
    counted.write_text(str(counter[0]))


def _until(spec: dict[str, Any], out: Path, moment: int) -> None:
    def kill() -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    with _each_call(kill, moment):
        _apply(spec, out)


@contextmanager
def _each_call(do: Callable[[], None], moment: int = -1) -> Iterator[list[int]]:
    """Count the calls, and `do` before that of number `moment`."""
    counter = [0]

    def wrapped(call: Callable[..., Any]) -> Callable[..., Any]:
        def run(*arguments: Any, **named: Any) -> Any:
            if counter[0] == moment:
                do()
            counter[0] += 1
            return call(*arguments, **named)

        return run

    calls = {name: getattr(os, name) for name in CALLS}
    for name, call in calls.items():
        setattr(os, name, wrapped(call))
    try:
        yield counter
    finally:
        for name, call in calls.items():
            setattr(os, name, call)


def _fork(do: Callable[..., None], *arguments: Any) -> int:
    process = os.fork()
    if process:
        return process
    code = 1
    try:
        do(*arguments)
        code = 0
    except BaseException as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr, flush=True)
    finally:
        os._exit(code)


def _ended(process: int) -> int:
    _, status = os.waitpid(process, 0)
    return os.waitstatus_to_exitcode(status)


def _note(found: dict[str, Any], whole: Path, out: Path, *, is_killed: bool) -> None:
    """OUT is absent or whole after a kill, and whole at the end."""
    if not out.exists() and is_killed:
        return
    if _bytes_of(out) != _bytes_of(whole):
        found["half" if is_killed else "differ"].append(out.name)


def _bytes_of(directory: Path) -> dict[str, bytes]:
    return {str(path.relative_to(directory)): path.read_bytes() for path in directory.rglob("*") if path.is_file()}


def _remove(out: Path) -> None:
    for path in (out, out.with_name(f".{out.name}.surgery-partial")):
        if path.exists():
            for below in sorted(path.rglob("*"), reverse=True):
                below.rmdir() if below.is_dir() else below.unlink()
            path.rmdir()


if __name__ == "__main__":
    main()
