"""Downloads by the real library, from a Hub on this machine; each command is a process."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from policies.hub_server import hub
from policies.layouts import wide_pi05, write_lerobot_pi05
from policies.tiny import CAMERAS

pytest.importorskip("huggingface_hub")


def info(url: str, cache: Path, *words: str) -> subprocess.CompletedProcess[str]:
    """`omega-qvla info someone/a-policy`, with an empty configuration of the library."""
    settings = ("hf_", "http_proxy", "https_proxy", "all_proxy")
    mine = {k: v for k, v in os.environ.items() if not k.lower().startswith(settings)}
    env = {**mine, "HF_ENDPOINT": url, "HF_HOME": str(cache), "HF_HUB_DISABLE_XET": "1"}
    command = [sys.executable, "-m", "omega_qvla.cli", "info", "someone/a-policy", *words]
    return subprocess.run(command, env=env, capture_output=True, text=True, check=False)


def test_a_broken_download_goes_on_and_is_not_repeated(tmp_path: Path) -> None:
    folder = write_lerobot_pi05(
        wide_pi05(state_dim=4), tmp_path / "repository", (*CAMERAS, "empty_camera_0")
    )
    (folder / "training_state.safetensors").write_bytes(b"gigabytes")
    (folder / "modeling.py").write_text("raise SystemExit")
    # An unused tensor makes the file larger than the 10 MiB that the library writes at a time.
    weights = folder / "model.safetensors"
    head = "model.paligemma_with_expert.gemma_expert.lm_head.weight"
    save_file({**load_file(weights), head: torch.zeros(8 << 20)}, weights)
    size = weights.stat().st_size
    with hub(folder, breaks="model.safetensors") as server:
        done = info(server.url, tmp_path / "cache", "--json")
        assert done.returncode == 0, done.stderr
        assert json.loads(done.stdout)["cameras"] == list(CAMERAS)
        assert "%|" in done.stderr  # a progress bar
        (first,) = server.ranges  # it went on with what it had written
        assert 0 < first <= 2 * size // 5
        assert server.sent["model.safetensors"] == size + 2 * size // 5 - first
        assert not {"training_state.safetensors", "modeling.py"} & set(server.sent)
        before = dict(server.sent)
        again = info(server.url, tmp_path / "cache", "--json", "--quiet")
        assert json.loads(again.stdout) == json.loads(done.stdout)
        assert "%|" not in again.stderr
        files = {k: v for k, v in server.sent.items() if k}
        assert files == {k: v for k, v in before.items() if k}
        url = server.url
    offline = info(url, tmp_path / "cache", "--json", "--offline")  # nobody answers there now
    assert json.loads(offline.stdout) == json.loads(done.stdout)
    lost = info(url, tmp_path / "other", "--json")
    assert lost.returncode == 2
    assert "CheckpointError" in lost.stderr
