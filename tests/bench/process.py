"""Running a command as a process of its own, and what it took.

Why this module imports so little: on Linux a child's `ru_maxrss` begins with the memory of the
process it was forked from, so whoever measures must be smaller than whatever it measures.
"""

import os
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

POLL_S = 0.01


@dataclass(frozen=True, slots=True)
class Usage:
    """What one process took, from its start to its end."""

    wall_s: float
    cpu_s: float
    peak_bytes: int  # resident, as the kernel accounts it: mapped files count too
    peak_anonymous_bytes: int  # sampled: without mapped files, which can be dropped under pressure


def run(*arguments: str, python: str = sys.executable, prefix: Sequence[str] = ()) -> Usage:
    """Run `python` with `arguments` to its end. Its output is shown only if it fails."""
    command = [*prefix, python, *arguments]
    os.sync()  # else one run's written pages are another's waiting
    start = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, env=_environment())
    output = _Drain(process)
    peak_anonymous = 0
    while True:
        peak_anonymous = max(peak_anonymous, _anonymous_bytes(process.pid))
        pid, status, usage = os.wait4(process.pid, os.WNOHANG)
        if pid:
            break
        output.read()
        time.sleep(POLL_S)
    wall_s = time.perf_counter() - start
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise SystemExit(f"{' '.join(command)} failed\n{output.read()}")
    return Usage(wall_s, usage.ru_utime + usage.ru_stime, usage.ru_maxrss << 10, peak_anonymous)


def _environment() -> dict[str, str]:
    """Ours, with bytecode: what is installed has it, a source tree would else be compiled anew in every run."""
    return {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}


class _Drain:
    """What a process has written so far, taken without waiting, so that its pipe never fills."""

    def __init__(self, process: "subprocess.Popen[bytes]") -> None:
        assert process.stdout is not None
        self._pipe = process.stdout
        self._text = ""
        os.set_blocking(self._pipe.fileno(), False)

    def read(self) -> str:
        self._text += (self._pipe.read() or b"").decode(errors="replace")
        return self._text


def _anonymous_bytes(pid: int) -> int:
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return 0
    return sum(int(line.split()[1]) << 10 for line in lines if line.startswith("RssAnon:"))


def import_footprint(statement: str, python: str = sys.executable) -> Usage:
    """What a process takes that runs `statement` and nothing else."""
    return run("-c", statement, python=python)


def warm(directory: Path) -> None:
    """Read every file once, so that no run waits for a disk that another did not."""
    for path in sorted(directory.iterdir()):
        with path.open("rb", buffering=0) as file:
            while file.read(1 << 20):
                pass
