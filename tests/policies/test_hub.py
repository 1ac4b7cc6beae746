from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from omega_qvla.errors import CheckpointError
from omega_qvla.policies.hub import locate
from omega_qvla.policies.registry import load_policy
from policies.layouts import wide_pi05, write_lerobot_pi05

hub = pytest.importorskip("huggingface_hub")
COMMIT = "0123456789012345678901234567890123456789"


def test_an_id_is_read_from_the_cache_offline(tmp_path: Path) -> None:
    """The cache is laid out by hand as huggingface_hub has it; the library itself reads it."""
    repository = tmp_path / "models--someone--a-policy"
    folder = write_lerobot_pi05(wide_pi05(state_dim=4), repository / "snapshots" / COMMIT)
    (repository / "refs").mkdir()
    (repository / "refs/main").write_text(COMMIT)
    found = load_policy("someone/a-policy", offline=True, cache=tmp_path)
    assert locate("someone/a-policy", offline=True, cache=tmp_path) == folder
    same = load_policy(folder)
    for name, tensor in found.module.state_dict().items():
        np.testing.assert_array_equal(tensor.numpy(), same.module.state_dict()[name].numpy())
    with pytest.raises(CheckpointError, match="nor in the Hugging Face cache, and offline"):
        locate("someone/another", offline=True, cache=tmp_path)


def test_what_is_no_id_is_never_asked_for(tmp_path: Path) -> None:
    for path in (tmp_path / "nowhere", "nowhere", "a/b/c"):
        with pytest.raises(CheckpointError, match="not a directory"):
            locate(path)


def test_failures_are_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    errors = hub.errors
    cases: list[tuple[Exception, str]] = [
        (ConnectionError("reset by peer"), "run it again to go on"),
        (OSError(28, "No space left on device"), "No space left"),
        (errors.LocalEntryNotFoundError("no"), "the Hub cannot be reached"),
        (
            errors.RepositoryNotFoundError.__new__(errors.RepositoryNotFoundError),
            "nor a repository",
        ),
        (errors.GatedRepoError.__new__(errors.GatedRepoError), "gated"),
    ]
    for error, message in cases:

        def fail(*_args: Any, error: Exception = error, **_kwargs: Any) -> str:
            raise error

        monkeypatch.setattr(hub, "snapshot_download", fail)
        with pytest.raises(CheckpointError, match=message):
            locate("someone/a-policy", cache=tmp_path)


def test_the_library_is_optional(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(CheckpointError, match=r"omega-qvla\[checkpoints\]"):
        locate("someone/a-policy")
