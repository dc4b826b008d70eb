"""The directory an output grows in, and its one appearance under its own name."""

from __future__ import annotations

import ctypes
import ctypes.util
import errno
import fcntl
import os
import shutil
from collections.abc import Collection
from contextlib import suppress
from pathlib import Path

from surgery.errors import OutputError, Problem, SurgeryError
from surgery.plan import Plan
from surgery.sizes import format_decimal

__all__ = ["Workplace"]

LOCK_NAME = "lock"
JOURNAL_NAME = "journal"
OUTPUT_NAME = "output"
AT_FDCWD = -100
RENAME_EXCHANGE = 2  # linux/fs.h


class Workplace:
    """A hidden sibling of OUT, locked while a run is at work in it: the output grows there, beside the journal."""

    def __init__(self, out: Path, *, overwrite: bool) -> None:
        self.out = Path(os.path.abspath(out))  # noqa: PTH100 - links stay, `..` goes
        self.path = self.out.parent / f".{self.out.name}.surgery-partial"
        self.output = self.path / OUTPUT_NAME
        self.journal = self.path / JOURNAL_NAME
        self._overwrite = overwrite
        self._lock_fd = -1

    def check(self, plan: Plan) -> None:
        """Raises OutputError for what can be known before a byte is written."""
        try:
            for checkpoint in plan.checkpoints.values():
                if checkpoint.home.path:
                    self._check_apart(checkpoint.home.path.resolve())
            self._check_free()
            self._check_room(plan)
        except (OSError, ValueError, RuntimeError) as error:
            if isinstance(error, SurgeryError):
                raise
            raise OutputError(Problem(f"cannot be a directory: {error}", str(self.out), "name another one")) from None

    def _check_apart(self, source: Path) -> None:
        out = self.out.resolve()
        inside = source.is_dir() and out.is_relative_to(source)
        if self.out.name in ("", "..") or inside or source.is_relative_to(out):
            what = "is the source, holds it, or lies in it"
            raise OutputError(Problem(what, str(self.out), "name another directory: the source is never written"))

    def _check_free(self) -> None:
        if os.path.lexists(self.out) and not self._overwrite:
            fix = "name another directory, or give --overwrite to replace it"
            raise OutputError(Problem("exists already", str(self.out), fix))
        if os.path.lexists(self.out) and not (self.out.is_symlink() or self.out.is_dir() or self.out.is_file()):
            raise OutputError(Problem("is a device, a pipe or a socket", str(self.out), "name another directory"))
        if os.path.lexists(self.out) and Path.cwd().is_relative_to(self.out.resolve()):
            raise OutputError(Problem("is where you are: it cannot be replaced", str(self.out), "go elsewhere"))

    def _check_room(self, plan: Plan) -> None:
        parent = next(path for path in self.out.parents if path.exists())
        if not parent.is_dir() or not os.access(parent, os.W_OK | os.X_OK):
            raise OutputError(Problem("cannot be written to", str(parent), "name a directory that you may write to"))
        free = shutil.disk_usage(parent).free
        if self.path.exists():
            free += sum(file.lstat().st_blocks * 512 for file in self.path.rglob("*"))
        needed = plan.cost.bytes_written + _side_bytes(plan)
        if free < needed:
            have, need = format_decimal(free), format_decimal(needed)
            raise OutputError(Problem(f"has {have} free, the output takes {need}", str(parent), "free some space"))

    def open(self) -> None:
        """Make the directory, if there is none, and lock it. Raises OutputError if another run is at work in it."""
        if self.path.is_symlink():
            raise OutputError(Problem("is a link, where the output was to grow", str(self.path), "remove it"))
        self.path.mkdir(parents=True, exist_ok=True)
        self._lock_fd = os.open(self.path / LOCK_NAME, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            fcntl.flock(self._lock_fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            self.close()
            what = "is being written by another run of surgery"
            raise OutputError(Problem(what, str(self.out), "wait for it, or name another directory")) from None

    def keep(self, names: Collection[str]) -> None:
        """Throw away everything in the output but the files of these names."""
        if self.output.is_symlink():
            self.output.unlink()
        self.output.mkdir(exist_ok=True)
        for parent, directories, files in os.walk(self.output, topdown=False):
            for name in [*files, *directories]:
                path = Path(parent, name)
                if path.is_symlink() or (name in files and path.relative_to(self.output).as_posix() not in names):
                    path.unlink()
                elif name in directories:
                    with suppress(OSError):  # of a directory that holds something
                        path.rmdir()

    def remove(self) -> None:
        """Throw away what was written."""
        shutil.rmtree(self.path, ignore_errors=True)

    def publish(self) -> None:
        """Sync, and let the output appear as OUT by one rename. What OUT was before goes then."""
        for directory, _, _ in os.walk(self.output):
            _sync(Path(directory))
        if os.path.lexists(self.out):
            _exchange(self.output, self.out)
        else:
            self.output.rename(self.out)
        _sync(self.out.parent)
        self.remove()

    def close(self) -> None:
        """Release the lock."""
        fd, self._lock_fd = self._lock_fd, -1
        if fd >= 0:
            os.close(fd)


def _sync(directory: Path) -> None:
    fd = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def _exchange(new: Path, old: Path) -> None:
    """Swap two paths in one step; where the system cannot, `old` is absent for a moment."""
    libc = ctypes.CDLL(ctypes.util.find_library("c"), use_errno=True)
    if hasattr(libc, "renameat2"):
        arguments = (AT_FDCWD, os.fsencode(new), AT_FDCWD, os.fsencode(old), RENAME_EXCHANGE)
        if libc.renameat2(*arguments) == 0:
            return
        if ctypes.get_errno() not in (errno.EINVAL, errno.ENOSYS, errno.ENOTSUP):
            raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()), str(old))
    aside = new.with_name(f"{new.name}-replaced")
    old.rename(aside)
    new.rename(old)
    aside.rename(new)


def _side_bytes(plan: Plan) -> int:
    """Of the files that are copied along: a hostile one takes no room where it lies, and terabytes in a copy."""
    return sum(plan.checkpoint.home.size(name) for name in plan.side_files)
