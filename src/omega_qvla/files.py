"""Whole files or none, written beside the target and given its name; whole lines or none."""

from __future__ import annotations

import errno
import fcntl
import glob
import os
import re
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

# What stands between name and `.tmp`: the writer's process, and what sets apart two writers with
# the same number (threads, machines on one file system). Once it was the number alone.
_WRITER = re.compile(r"\d+(-[0-9a-f]{8})?")


@contextmanager
def replacing(path: Path, *, parents: bool = False) -> Iterator[Path]:
    """The name of a file to be written beside `path`; it becomes `path` if the body succeeds.

    Its bytes are on the disk (fsync of file and folder) before the name changes; after a
    failure nothing is left behind and an older file of that name is untouched.

    parents: make the folder where it is missing. Without, a folder that went away (a drive that
    was pulled) is an error.

    Raises:
        OSError: it cannot be written, or the body wrote no file.
    """
    if parents:
        path.parent.mkdir(parents=True, exist_ok=True)
    temporary = temporary_of(path)
    try:
        yield temporary
        sync(temporary)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    sync(path.parent)


@contextmanager
def atomic_file(path: Path, *, parents: bool = False) -> Iterator[BinaryIO]:
    """A binary stream whose contents become `path` if the body succeeds, see `replacing`."""
    # Not `tempfile`: its files are private, and these are for everybody the umask allows.
    with replacing(path, parents=parents) as temporary, open(temporary, "xb") as file:
        yield file


def write_text(path: Path, text: str) -> None:
    """The file `path` with this text in UTF-8, see `replacing`; its folder is made."""
    with atomic_file(path, parents=True) as file:
        file.write(text.encode())


def append_line(path: Path, line: bytes, *, create: bool = False) -> None:
    """Add a line to a file that several processes share: one system call, on the disk at the end.

    create: make the file where there is none. Without, a file that is gone is an error.

    Raises:
        OSError: the disk did not take all of it; then nothing of it is left there.
    """
    flags = os.O_WRONLY | os.O_APPEND | (os.O_CREAT if create else 0)
    handle = os.open(path, flags, 0o666)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX)  # or a part taken back could be of another's line
        before = os.fstat(handle).st_size
        if os.write(handle, line) != len(line):
            os.ftruncate(handle, before)
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        os.fsync(handle)
    finally:
        os.close(handle)


def temporary_of(path: Path) -> Path:
    """A name beside `path` that nobody else uses."""
    return path.with_name(f".{path.name}.{os.getpid()}-{secrets.token_hex(4)}.tmp")


def leftovers(path: Path) -> list[Path]:
    """What writers of `path` left that were killed, or are writing. Of `path` alone: what is
    being written of a neighbour `<name>.<more>` is not among it."""
    found = path.parent.glob(f".{glob.escape(path.name)}.*.tmp")
    start, end = len(f".{path.name}."), -len(".tmp")
    return [file for file in found if _WRITER.fullmatch(file.name[start:end])]


def sync(path: Path) -> None:
    """Wait until a file or a folder is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
