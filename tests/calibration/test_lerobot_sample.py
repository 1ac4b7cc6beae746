"""A real dataset that nobody here wrote; skipped where it does not lie beside the repository."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("pyarrow", reason="needs the extra `lerobot`")
pytest.importorskip("av", reason="needs the extra `lerobot`")

from omega_qvla.calibration.sources import LeRobotDataset, ObservationMap, StateColumns, draw
from omega_qvla.errors import CalibrationError

SAMPLE = Path(__file__).resolve().parents[3] / "shared" / "lerobot_sample" / "robot_sim.PickNPlace"
EGO = "observation.images.ego_view"
pytestmark = pytest.mark.skipif(
    not SAMPLE.is_dir(), reason="../shared/lerobot_sample is not beside the repository"
)


@pytest.fixture(scope="module")
def source() -> LeRobotDataset:
    return LeRobotDataset.open(SAMPLE, ObservationMap({"base": EGO}))


def test_ten_samples_are_two_of_each_episode(source: LeRobotDataset) -> None:
    assert len(source.meta) == 2096
    samples = draw(source, 10)
    assert Counter(m.episode for m in samples.meta) == dict.fromkeys(range(5), 2)
    for observation, meta in zip(samples.observations, samples.meta, strict=True):
        assert observation.images["base"].shape == (256, 256, 3)
        assert observation.state.shape == (44,)
        assert np.abs(observation.state).max() < 5
        assert observation.prompt == meta.task
        assert observation.prompt.startswith("pick the ")  # not "valid", the annotation


def test_seeking_finds_what_decoding_from_the_start_finds(source: LeRobotDataset) -> None:
    import av

    steps = [0, 1, 249, 250, 251, 327]  # the second key frame is number 250
    first = next(i for i, m in enumerate(source.meta) if m.episode == 4)
    found = source.take([first + step for step in steps])
    path = SAMPLE / f"videos/chunk-000/{EGO}/episode_000004.mp4"
    with av.open(str(path)) as container:
        frames = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
    assert len(frames) == 328
    for step, observation in zip(steps, found.observations, strict=True):
        np.testing.assert_array_equal(observation.images["base"], frames[step])


def test_states_are_the_statistics_own(source: LeRobotDataset) -> None:
    """The dataset's stats.json was computed by its authors from the same columns."""
    import json

    stats = json.loads((SAMPLE / "meta/stats.json").read_text())["observation.state"]
    samples = draw(source, 40)
    states = np.stack([o.state for o in samples.observations])
    low, high = np.array(stats["min"]) - 1e-5, np.array(stats["max"]) + 1e-5
    assert ((states >= low) & (states <= high)).all()
    arm = StateColumns.parse("observation.state=22:29")
    part = LeRobotDataset.open(SAMPLE, ObservationMap({"base": EGO}, (arm,)))
    np.testing.assert_array_equal(draw(part, 3).observations[0].state.shape, (7,))


def test_a_camera_that_is_announced_but_not_there() -> None:
    """info.json lists `egoview`, of which there are no videos."""
    source = LeRobotDataset.open(SAMPLE, ObservationMap({"base": "observation.images.egoview"}))
    with pytest.raises(CalibrationError, match=r"egoview/episode_\d+.mp4: no such file"):
        draw(source, 1)
    with pytest.raises(CalibrationError, match=r"it has: observation.images.egoview, .*ego_view"):
        LeRobotDataset.open(SAMPLE, ObservationMap({"base": "wrist"}))


def test_recorded_actions_are_the_statistics_own(source: LeRobotDataset) -> None:
    import json

    stats = json.loads((SAMPLE / "meta/stats.json").read_text())["action"]
    found = np.concatenate([source.actions(e, [StateColumns("action")]) for e in range(5)])
    assert found.shape == (2096, len(stats["mean"]))
    np.testing.assert_allclose(found.mean(0), stats["mean"], atol=1e-4)
    np.testing.assert_allclose(found.max(0), stats["max"], atol=1e-6)
    columns = [StateColumns.parse("action=22:29"), StateColumns.parse("action=0")]
    part = source.actions(1, columns)
    length = sum(meta.episode == 1 for meta in source.meta)
    whole = source.actions(1, [StateColumns("action")])
    np.testing.assert_array_equal(part, whole[:, [*range(22, 29), 0]])
    assert len(part) == length
    with pytest.raises(CalibrationError, match=r"no 'observation\.nothing'"):
        source.actions(0, [StateColumns("observation.nothing")])
    with pytest.raises(CalibrationError, match="no episode 5"):
        source.actions(5, [StateColumns("action")])
