"""Whatever happens to a bundle's files is named; whatever interrupts a writing leaves nothing."""

from __future__ import annotations

import errno
import json
import shutil
from pathlib import Path

import pytest

from bundle.conftest import Built
from omega_qvla.bundle import read_bundle, write_bundle
from omega_qvla.errors import BundleError
from omega_qvla.runtime.engine import Engine


@pytest.fixture(scope="module")
def whole(built: Built, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("whole") / "bundle"
    write_bundle(built.checkpoint, built.packs["omega"], out)
    return out


@pytest.fixture
def bundle(whole: Path, tmp_path: Path) -> Path:
    """A copy to damage."""
    return Path(shutil.copytree(whole, tmp_path / "bundle"))


def test_every_file_is_needed_and_proved(bundle: Path) -> None:
    names = list(read_bundle(bundle).files)
    assert {"config.json", "tokenizer.json", "pack.safetensors", "rest.safetensors"} < set(names)
    for name in names:
        file = bundle / name
        good = file.read_bytes()
        flipped = bytearray(good)
        flipped[len(good) // 2] ^= 1
        for damage, message in (
            (None, "is missing"),
            (good[:-1], "is truncated"),
            (good + b" ", "is altered"),
            (bytes(flipped), "is altered"),
        ):
            file.unlink()
            if damage is not None:
                file.write_bytes(damage)
            with pytest.raises(BundleError, match=message) as caught:
                Engine.load(bundle)
            assert str(file) in str(caught.value)
            file.write_bytes(good)
    assert Engine.load(bundle).policy.num_steps > 0


def test_the_manifest_is_proved_too(bundle: Path) -> None:
    file = bundle / "bundle.json"
    good = file.read_text()
    whole = json.loads(good)
    for change in (
        {"num_steps": 99},
        {"files": {}},
        {"files": {**whole["manifest"]["files"], "../x": {"bytes": 1, "sha256": ""}}},
    ):
        altered = {**whole, "manifest": {**whole["manifest"], **change}}
        file.write_text(json.dumps(altered))
        with pytest.raises(BundleError, match="altered"):
            Engine.load(bundle)
    for text in ("", good[: len(good) // 2], "[]", "{}"):
        file.write_text(text)
        with pytest.raises(BundleError, match=r"bundle\.json"):
            Engine.load(bundle)


def test_a_full_disk_or_a_crash_leaves_nothing(
    built: Built, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "bundle"
    for fault, raised in (
        (OSError(errno.ENOSPC, "No space left on device"), BundleError),
        (KeyboardInterrupt(), KeyboardInterrupt),
    ):

        def fail(*_: object, fault: BaseException = fault) -> None:
            raise fault

        with monkeypatch.context() as patch:
            patch.setattr("omega_qvla.bundle.writer.write_tensors", fail)
            with pytest.raises(raised):
                write_bundle(built.checkpoint, built.packs["omega"], out)
        assert not list(tmp_path.iterdir())
    write_bundle(built.checkpoint, built.packs["omega"], out)
    assert [path.name for path in tmp_path.iterdir()] == ["bundle"]
    with pytest.raises(BundleError, match="holds its pack"):
        Engine.load(out, built.packs["omega"])
