"""The verbs that use the simulator, with a tiny policy that sees 32 pixels."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from omega_qvla.calibration.samples import read_observations
from omega_qvla.cli.main import main
from omega_qvla.cli.sources import CALIBRATION_SEED, expert_episode
from omega_qvla.policies.registry import save_policy
from policies.tiny import tiny_pi05

pytestmark = pytest.mark.sim


def test_the_expert_is_looked_at_until_it_succeeds() -> None:
    found = expert_episode("drawer-close", CALIBRATION_SEED, size=32, stride=7)
    steps = [step for step, _ in found]
    assert steps == list(range(0, 7 * len(found), 7))
    assert 2 <= len(found) < 200 // 7
    _, first = found[0]
    assert {image.shape for image in first.images.values()} == {(32, 32, 3)}
    assert first.prompt == "close the drawer"


def test_calibrate_and_evaluate_in_the_simulator(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    checkpoint = str(save_policy(tiny_pi05(num_steps=2), tmp_path / "checkpoint"))
    kept = tmp_path / "observations.safetensors"
    words = ["--env", "metaworld", "--tasks", "drawer-close", "--num-samples", "4", "--json"]
    out = ["--save-observations", str(kept), "--out", str(tmp_path / "calibration.safetensors")]
    assert main(["calibrate", checkpoint, *words, *out, "--quiet"]) == 0
    assert json.loads(capsys.readouterr().out)["observations"] == 4
    assert {meta.task for meta in read_observations(kept).meta} == {"drawer-close"}

    words = ["--tasks", "drawer-close", "--episodes", "1", "--max-steps", "20", "--workers", "0"]
    assert main(["eval", checkpoint, *words, "--out", str(tmp_path / "r.jsonl"), "--json"]) == 0
    arm = json.loads(capsys.readouterr().out)["arms"]["pi05/plain/full-precision"]
    assert arm["episodes"] == 1


def test_an_unknown_task_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    checkpoint = str(save_policy(tiny_pi05(), tmp_path / "checkpoint"))
    words = ["--tasks", "juggle", "--out", str(tmp_path / "r.jsonl")]
    assert main(["eval", checkpoint, *words]) == 2
    assert "unknown task 'juggle'; one of button-press-topdown" in capsys.readouterr().err
