"""Open-loop trajectories on invented signals and on the toy policy."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from calibration.helpers import tiny_samples
from evaluation.toy import ToyPolicy, observations, quantized
from omega_qvla.errors import EvaluationError
from omega_qvla.evaluation.open_loop import predict_chunks
from omega_qvla.evaluation.report.open_loop_page import write_open_loop_page
from omega_qvla.evaluation.trajectory import (
    compare_trajectories,
    gripper_middle,
    predict_trajectory,
    switch_rate,
    trajectory_figures,
)
from policies.tiny import TINY

SEEDS = [5, 6, 7]


def test_a_trajectory_is_the_chunks_up_to_the_next_look() -> None:
    policy, seen = ToyPolicy(), observations(3)
    chunks = predict_chunks(policy, seen, SEEDS)
    trajectory = predict_trajectory(policy, seen, [0, 2, 6], SEEDS)
    expected = np.concatenate([chunks[0][:2], chunks[1][:4], chunks[2][:4]])
    np.testing.assert_array_equal(trajectory, expected)
    assert trajectory.dtype == np.float64


@pytest.mark.parametrize("steps", [[0, 2, 9], [0, 0, 2], [0], []])
def test_looks_that_chunks_cannot_join_are_refused(steps: list[int]) -> None:
    seen = observations(3)[: len(steps)]
    with pytest.raises(EvaluationError, match=r"chunks of 6 actions|two observations"):
        predict_trajectory(ToyPolicy(), seen, steps, SEEDS[: len(steps)])


def test_figures_of_known_signals() -> None:
    time = np.arange(10.0)
    reference = np.stack([time, time**3 / 6, np.where(time % 4 < 2, 1.0, -1.0)], 1)
    moved = reference + np.array([0.3, 0.0, 0.0])
    recorded = reference[:8] - [0.0, 0.0, 0.2]
    found = trajectory_figures(moved, reference, recorded)
    assert found.error == pytest.approx(0.3)
    assert [j.error for j in found.joints] == pytest.approx([0.3, 0, 0])
    assert found.recorded_error == pytest.approx(np.hypot(0.3, 0.2))
    assert [j.recorded_error for j in found.joints] == pytest.approx([0.3, 0, 0.2])
    # Third difference: 0 of a line, 1 of t^3 / 6; steps of 1 of the line.
    assert found.joints[0].jerk == pytest.approx(0, abs=1e-9)
    assert found.joints[1].jerk == pytest.approx(1)
    assert found.joints[0].delta == pytest.approx(1)
    assert found.gripper_switches == pytest.approx(100 * 4 / 9)
    alone = trajectory_figures(reference, reference, None, None)
    assert (alone.error, alone.recorded_error, alone.gripper_switches) == (0, None, None)
    short = trajectory_figures(reference[:1], reference[:1])
    assert (short.jerk, short.delta_norm, short.gripper_switches) == (None, None, 0)


def test_a_gripper_at_rest_does_not_switch() -> None:
    flutter = np.array([0.51, 0.49] * 5)
    assert switch_rate(flutter) == 0  # open all the while
    assert switch_rate(flutter, 0.5) == 100
    assert switch_rate(flutter[:1]) == 0


@pytest.mark.parametrize("family", TINY)
def test_the_middle_is_the_normalizations(family: str) -> None:
    policy = TINY[family]()
    observation = tiny_samples().observations[0]
    inputs = policy.prepare([observation])
    shape = policy.draw_noise(1, 0).shape
    ends = [policy.finish(torch.full(shape, end), inputs)[0, 0] for end in (-1.0, 1.0)]
    for joint in range(policy.action_dim):
        middle = gripper_middle(policy, observation, joint)
        assert middle == pytest.approx((ends[0][joint] + ends[1][joint]) / 2, abs=1e-5)


def test_other_shapes_are_refused() -> None:
    with pytest.raises(EvaluationError, match="do not compare"):
        trajectory_figures(np.zeros((4, 3)), np.zeros((5, 3)))
    with pytest.raises(EvaluationError, match="--action-key"):
        trajectory_figures(np.zeros((4, 3)), np.zeros((4, 3)), np.zeros((4, 2)))


def test_the_page_shows_every_joint(tmp_path: Path) -> None:
    policy, seen = ToyPolicy(), observations(3)
    twin, _ = quantized(policy)
    arms = {"full-precision": policy, "rtn": twin}
    paths = {arm: predict_trajectory(p, seen, [0, 3, 6], SEEDS) for arm, p in arms.items()}
    figures = compare_trajectories(paths, "full-precision")
    assert figures["full-precision"].error == 0 < figures["rtn"].error
    assert len(figures["rtn"].joints) == 3
    table = ("Arms", ("arm", "error"), [["rtn", "1 < 2"]])
    page = write_open_loop_page(
        tmp_path / "p.html", "Open <loop>", paths, paths["rtn"] + 1, [table], ["note"]
    )
    text = page.read_text()
    assert "Open &lt;loop&gt;" in text and "1 &lt; 2" in text and "recorded" in text
    assert text.count("<svg") == 1 and "rtn" in text
