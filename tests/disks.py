"""Disks that are full: in earnest (a small file system, a limit of the kernel) and played."""

from __future__ import annotations

import builtins
import errno
import resource
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest


@contextmanager
def small_disk(folder: Path, size: int) -> Iterator[Path]:
    """A file system of `size` bytes, mounted on `folder`; the test is skipped where none can be."""
    folder.mkdir()
    words = ["mount", "-t", "tmpfs", "-o", f"size={size}", "none", str(folder)]
    try:
        done = subprocess.run(words, capture_output=True, check=False).returncode == 0
    except FileNotFoundError:
        done = False
    if not done:
        pytest.skip("mounting a file system is not allowed here")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


@contextmanager
def file_limit(size: int) -> Iterator[None]:
    """The kernel refuses to let any file grow beyond `size` bytes (`ulimit -f`)."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


class _Full:
    """A binary file that takes as many bytes as the disk has left."""

    def __init__(self, file: Any, left: list[int]) -> None:
        self._file, self._left = file, left

    def write(self, data: Any) -> int:
        room = min(len(memoryview(data).cast("B")), self._left[0])
        self._left[0] -= room
        self._file.write(memoryview(data).cast("B")[:room])
        if room < len(memoryview(data).cast("B")):
            self._file.flush()
            raise OSError(errno.ENOSPC, "No space left on device")
        return room

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)

    def __enter__(self) -> _Full:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()


@contextmanager
def disk_with(left: int) -> Iterator[None]:
    """Whatever `omega_qvla.files` writes shares `left` bytes; then the disk is full."""
    from omega_qvla import files

    budget = [left]

    def opened(path: Any, mode: str = "r", *rest: Any, **options: Any) -> Any:
        file = builtins.open(path, mode, *rest, **options)  # noqa: SIM115
        return _Full(file, budget) if "x" in mode else file

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(files, "open", opened, raising=False)
        yield
