"""The directory an output grows in, and its one appearance under its own name."""

from __future__ import annotations

import ctypes
import ctypes.util
import errno
import fcntl
import os
import shutil
import tempfile
from collections.abc import Collection, Generator
from contextlib import contextmanager, suppress
from pathlib import Path

from surgery.errors import OutputError, Problem, SurgeryError
from surgery.plan import Plan
from surgery.sizes import format_decimal

__all__ = ["Workplace", "remove_temporaries", "temporary_directory"]

LOCK_NAME = "lock"
JOURNAL_NAME = "journal"
OUTPUT_NAME = "output"
AT_FDCWD = -100
RENAME_NOREPLACE, RENAME_EXCHANGE = 1, 2  # linux/fs.h


_temporaries: set[Path] = set()


@contextmanager
def temporary_directory(parent: Path, prefix: str) -> Generator[Path]:
    """A directory that is gone afterwards."""
    path = Path(tempfile.mkdtemp(prefix=prefix, dir=parent))
    _temporaries.add(path)
    try:
        yield path
    finally:
        shutil.rmtree(path, ignore_errors=True)
        _temporaries.discard(path)


def remove_temporaries() -> None:
    """Remove all temporary directories: for a process that ends without unwinding, its threads still at work."""
    for path in list(_temporaries):
        with suppress(OSError):
            path = path.rename(path.with_name(f"{path.name}-gone"))  # where nobody makes files any more
        shutil.rmtree(path, ignore_errors=True)


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
            free += _taken(self.path)
        needed = plan.cost.bytes_written + _side_bytes(plan)
        if free < needed:
            have, need = format_decimal(free), format_decimal(needed)
            raise OutputError(Problem(f"has {have} free, the output takes {need}", str(parent), "free some space"))

    def open(self) -> None:
        """Make the directory, if there is none, and lock it. Raises OutputError if another run is at work in it."""
        if self.path.is_symlink():
            raise OutputError(Problem("is a link, where the output was to grow", str(self.path), "remove it"))
        self.path.mkdir(parents=True, exist_ok=True)
        self._lock_fd = os.open(self.path / LOCK_NAME, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o666)
        try:
            fcntl.flock(self._lock_fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if (self.path / LOCK_NAME).stat().st_ino != os.fstat(self._lock_fd).st_ino:
                raise BlockingIOError("the run that held it has ended meanwhile")
        except OSError:
            self.close()
            what = "is being written by another run of surgery"
            raise OutputError(Problem(what, str(self.out), "wait for it, or name another directory")) from None
        try:
            self._check_free()  # again: now no other run makes it
        except OutputError:
            if not self.journal.exists():
                self.remove()
            self.close()
            raise

    def keep(self, names: Collection[str]) -> None:
        """Throw away everything in the output but the files of these names."""
        if os.path.lexists(self.output) and (self.output.is_symlink() or not self.output.is_dir()):
            self.output.unlink()
        self.output.mkdir(exist_ok=True)
        for parent, directories, files in os.walk(self.output, topdown=False):
            for name in [*files, *directories]:
                path = Path(parent, name)
                is_kept = path.is_file() and path.relative_to(self.output).as_posix() in names
                if path.is_symlink() or (name in files and not is_kept):
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
        if self._overwrite and os.path.lexists(self.out):
            _rename(self.output, self.out, RENAME_EXCHANGE)
        else:
            _rename(self.output, self.out, RENAME_NOREPLACE)
        self.journal.unlink(missing_ok=True)  # nothing is left to go on with
        _sync(self.out.parent)
        self.remove()

    def close(self) -> None:
        """Release the lock."""
        fd, self._lock_fd = self._lock_fd, -1
        if fd >= 0:
            os.close(fd)


def _taken(directory: Path) -> int:
    """Bytes on the disk; another run may be at work there."""
    num_blocks = 0
    for parent, _, files in os.walk(directory):
        for name in files:
            with suppress(FileNotFoundError):
                num_blocks += Path(parent, name).lstat().st_blocks
    return num_blocks * 512


def _sync(directory: Path) -> None:
    fd = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def _rename(new: Path, old: Path, flag: int) -> None:
    """Swap two paths in one step, or move one to where nothing is. Raises OSError.

    Where the system cannot, `old` is absent for a moment, or looked for just before.
    """
    libc = ctypes.CDLL(ctypes.util.find_library("c"), use_errno=True)
    if hasattr(libc, "renameat2"):
        if libc.renameat2(AT_FDCWD, os.fsencode(new), AT_FDCWD, os.fsencode(old), flag) == 0:
            return
        if ctypes.get_errno() not in (errno.EINVAL, errno.ENOSYS, errno.ENOTSUP):
            raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()), str(old))
    if flag == RENAME_NOREPLACE:
        if os.path.lexists(old):
            raise OSError(errno.EEXIST, os.strerror(errno.EEXIST), str(old))
        new.rename(old)
        return
    aside = new.with_name(f"{new.name}-replaced")
    old.rename(aside)
    new.rename(old)
    aside.rename(new)


def _side_bytes(plan: Plan) -> int:
    """Of the files that are copied along: a hostile one takes no room where it lies, and terabytes in a copy."""
    return sum(plan.checkpoint.home.size(name) for name in plan.side_files)
