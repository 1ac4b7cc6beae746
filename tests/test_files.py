"""The one way to write a file: whole or not at all."""

from __future__ import annotations

import os
import stat
from pathlib import Path

import pytest

from omega_qvla import files
from omega_qvla.files import atomic_file, leftovers, replacing, temporary_of


def test_a_file_appears_whole_and_replaces_the_older(tmp_path: Path) -> None:
    path = tmp_path / "f"
    for content in (b"first", b"second"):
        with atomic_file(path) as file:
            file.write(content)
            file.flush()
            assert not path.exists() or path.read_bytes() == b"first"
        assert path.read_bytes() == content
    assert os.listdir(tmp_path) == ["f"]


def test_whoever_the_umask_allows_may_read_it(tmp_path: Path) -> None:
    before = os.umask(0o022)
    try:
        with atomic_file(tmp_path / "f") as file:
            file.write(b"")
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "f").stat().st_mode) == 0o644


@pytest.mark.parametrize("fault", [OSError("disk"), KeyboardInterrupt()])
def test_after_a_failure_the_older_file_stays_and_nothing_else(
    tmp_path: Path, fault: BaseException
) -> None:
    path = tmp_path / "f"
    path.write_bytes(b"older")
    with pytest.raises(type(fault)), atomic_file(path) as file:
        file.write(b"half")
        raise fault
    assert path.read_bytes() == b"older" and os.listdir(tmp_path) == ["f"]


def test_the_bytes_are_on_the_disk_before_the_name_changes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    done: list[str] = []
    sync, replace = files.sync, os.replace

    def synced(path: Path) -> None:
        done.append("folder" if path.is_dir() else f"{path.stat().st_size} bytes")
        sync(path)

    def replaced(*names: Path) -> None:
        done.append("name")
        replace(*names)

    monkeypatch.setattr(files, "sync", synced)
    monkeypatch.setattr(files.os, "replace", replaced)
    with replacing(tmp_path / "f") as temporary:
        temporary.write_bytes(b"12345")
    assert done == ["5 bytes", "name", "folder"]


def test_a_missing_folder_is_made_only_where_that_is_said(tmp_path: Path) -> None:
    path = tmp_path / "a" / "b" / "f"
    with pytest.raises(FileNotFoundError), atomic_file(path):
        pass
    assert not list(tmp_path.iterdir())
    with atomic_file(path, parents=True) as file:
        file.write(b"x")
    assert path.read_bytes() == b"x"


def test_two_writers_never_share_a_name(tmp_path: Path) -> None:
    path = tmp_path / "f"
    with atomic_file(path) as one, atomic_file(path) as other:
        one.write(b"one")
        other.write(b"other")
        assert len(leftovers(path)) == 2
    assert path.read_bytes() == b"one" and not leftovers(path)


def test_leftovers_are_of_this_file_alone(tmp_path: Path) -> None:
    path = tmp_path / "f[1]"
    mine = [temporary_of(path), tmp_path / ".f[1].12.tmp"]
    others = [temporary_of(tmp_path / "f[1].json"), tmp_path / ".f[1].tmp", tmp_path / ".f1.7.tmp"]
    for file in (*mine, *others):
        file.write_bytes(b"half")
    assert sorted(leftovers(path)) == sorted(mine)
