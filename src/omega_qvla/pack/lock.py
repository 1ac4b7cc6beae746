"""One writer per output: a lock that the operating system drops when its owner dies."""

from __future__ import annotations

import errno
import fcntl
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from omega_qvla.errors import OmegaError, PackError
from omega_qvla.files import leftovers


@contextmanager
def output_lock(
    path: str | os.PathLike[str], error: type[OmegaError] = PackError
) -> Iterator[None]:
    """Be the only one who builds `path` (a file or a folder to be) while the body runs.

    The lock is `flock` on `.<name>.lock` beside `path`: it ends with the process, however that
    ends, so a lock file that a crash left behind locks nothing. Who has the lock owns all
    temporary files of that name; those that a killed writer left are removed.

    Raises:
        error: somebody else is writing it; or the folder cannot be written or locked.
    """
    path = Path(path)
    file = path.with_name(f".{path.name}.lock")
    try:
        descriptor = _take(file)
    except BlockingIOError as busy:
        raise error(
            f"{path}: another build{_owner(file)} is writing it; let it finish, or choose "
            "another output"
        ) from busy
    except OSError as failure:
        raise error(f"{path}: cannot be locked for writing: {failure}") from failure
    try:
        _remove_leftovers(path)
        yield
    finally:
        file.unlink(missing_ok=True)  # before the lock is dropped, see `_take`
        os.close(descriptor)


def _take(file: Path) -> int:
    """Open and lock. Raises BlockingIOError where another process has it.

    A former owner may unlink the file between our opening and our locking it; the lock would
    then be on a file that nobody else can find. So the name must still lead to what we locked.
    """
    file.parent.mkdir(parents=True, exist_ok=True)
    while True:
        descriptor = os.open(file, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if _is(file, descriptor):
                with suppress(OSError):  # a full disk: the lock holds without the number
                    os.ftruncate(descriptor, 0)
                    os.write(descriptor, f"{os.getpid()}\n".encode())
                return descriptor
        except OSError as failure:
            os.close(descriptor)
            if failure.errno in (errno.EACCES, errno.EAGAIN):
                raise BlockingIOError(failure.errno, "locked") from failure
            raise
        os.close(descriptor)


def _is(file: Path, descriptor: int) -> bool:
    try:
        return os.path.samestat(os.stat(file), os.fstat(descriptor))
    except FileNotFoundError:
        return False


def _owner(file: Path) -> str:
    """In words, as far as the owner has written its number."""
    try:
        return f" (pid {int(file.read_text())})"
    except (OSError, ValueError):
        return ""


def _remove_leftovers(path: Path) -> None:
    for leftover in leftovers(path):
        if leftover.is_dir():
            shutil.rmtree(leftover, ignore_errors=True)
        else:
            leftover.unlink(missing_ok=True)
