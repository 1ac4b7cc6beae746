"""One writer per output, and no lock that outlives its owner."""

from __future__ import annotations

import fcntl
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from omega_qvla.errors import BundleError, PackError
from omega_qvla.pack import lock
from omega_qvla.pack.lock import output_lock

HOLD = """
import sys
from omega_qvla.pack.lock import output_lock
with output_lock(sys.argv[1]):
    print("locked", flush=True)
    sys.stdin.read()
"""


def test_a_second_writer_is_told_who_the_first_is(tmp_path: Path) -> None:
    with output_lock(tmp_path / "p"):
        with (
            pytest.raises(BundleError, match=rf"pid {os.getpid()}.*choose another output"),
            output_lock(tmp_path / "p", BundleError),
        ):
            raise AssertionError("two owners")
        with output_lock(tmp_path / "q"):
            pass
    with output_lock(tmp_path / "p"):
        pass
    assert not list(tmp_path.iterdir())


def test_the_lock_of_a_killed_process_locks_nothing(tmp_path: Path) -> None:
    out = tmp_path / "p"
    with subprocess.Popen(
        [sys.executable, "-c", HOLD, str(out)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == b"locked\n"
        with pytest.raises(PackError, match=f"pid {other.pid}"), output_lock(out):
            raise AssertionError("two owners")
        other.send_signal(signal.SIGKILL)
        other.wait()
    assert (tmp_path / ".p.lock").exists()  # it could not tidy up
    with output_lock(out):
        pass
    assert not list(tmp_path.iterdir())


def test_a_failure_inside_frees_it(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt), output_lock(tmp_path / "p"):
        raise KeyboardInterrupt
    with output_lock(tmp_path / "p"):
        pass


def test_a_file_that_its_owner_has_just_removed_is_not_the_lock(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The former owner unlinks between our opening and our locking; a third one comes."""
    file, taken = tmp_path / ".p.lock", fcntl.flock
    calls: list[int] = []

    def flock(descriptor: int, operation: int) -> None:
        calls.append(descriptor)
        if len(calls) == 1:
            file.unlink()
            file.touch()
        taken(descriptor, operation)

    monkeypatch.setattr(lock.fcntl, "flock", flock)
    with output_lock(tmp_path / "p"):
        assert len(calls) == 2
        monkeypatch.setattr(lock.fcntl, "flock", taken)
        with pytest.raises(PackError), output_lock(tmp_path / "p"):
            raise AssertionError("two owners")


def test_what_a_killed_writer_left_is_removed(tmp_path: Path) -> None:
    mine = [".p.7.tmp", ".p.7-0123abcd.tmp", ".p.8-0123abcd.tmp/inside"]
    others = [".p2.7.tmp", "p", ".p.tmp", ".q.7-0123abcd.tmp", ".p.7-0123.tmp"]
    others.append(".p.safetensors.7.tmp")  # of a pack that is being written beside a bundle
    for name in [*mine, *others]:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"half")
    with output_lock(tmp_path / "p"):
        pass
    assert sorted(f.name for f in tmp_path.iterdir()) == sorted(others)


def test_where_nothing_can_be_locked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(PackError, match="cannot be locked"), output_lock(tmp_path / "file" / "p"):
        raise AssertionError

    def flock(*_: Any) -> None:
        raise OSError(37, "No locks available")

    monkeypatch.setattr(lock.fcntl, "flock", flock)
    with pytest.raises(PackError, match="No locks available"), output_lock(tmp_path / "p"):
        raise AssertionError
