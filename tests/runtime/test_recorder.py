"""What a running robot saw, kept without ever being in its way."""

from __future__ import annotations

import dataclasses
import errno
import os
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from calibration.helpers import all_targets
from disks import disk_with, small_disk
from omega_qvla.calibration import calibrate
from omega_qvla.calibration.sources import ObservationMap, RecordedFolder, draw
from omega_qvla.errors import ConfigError, ObservationError, RecordingError
from omega_qvla.policies.observation import Observation
from omega_qvla.runtime import recording
from omega_qvla.runtime.engine import Engine
from omega_qvla.runtime.recorder import Recorder, RecorderOptions
from policies.tiny import CAMERAS, PROMPTS, TINY, tiny_observation

ACTIONS = np.zeros((5, 4), np.float32)
SMALL = RecorderOptions(steps_per_file=4)


def read(folder: Path) -> RecordedFolder:
    return RecordedFolder.open(folder, CAMERAS, ObservationMap({}))


def fill(recorder: Recorder, count: int, first: int = 0) -> None:
    for i in range(first, first + count):
        assert recorder.record(tiny_observation(i), ACTIONS + i)


@pytest.mark.parametrize("family", TINY)
def test_what_was_recorded_is_what_is_read(family: str, tmp_path: Path) -> None:
    """Through the engine, with episodes; calibration takes it like any other source."""
    engine = Engine(TINY[family](num_steps=2))
    with Recorder(tmp_path / "r", SMALL) as engine.recorder:
        seen = []
        for episode in range(3):
            engine.recorder.begin(task="open" if episode else None)
            for i in range(5 + episode):
                observation = tiny_observation(10 * episode + i, PROMPTS[episode % 2])
                seen.append((observation, engine.infer(observation, seed=i)))
    report = engine.recorder.report()
    assert (report.written, report.pending, report.lost, report.files) == (18, 0, 0, 6)
    source = read(tmp_path / "r")
    assert [(m.episode, m.step) for m in source.meta] == [
        (episode, step) for episode in range(3) for step in range(5 + episode)
    ]
    assert [m.task for m in source.meta] == [PROMPTS[0]] * 5 + ["open"] * 13
    back = source.take(range(18))
    for (observation, _), found in zip(seen, back, strict=True):
        assert found.prompt == observation.prompt
        np.testing.assert_array_equal(found.state, observation.state)
        for camera in CAMERAS:
            np.testing.assert_array_equal(found.images[camera], observation.images[camera])
    from safetensors.numpy import load_file

    files = [load_file(f)["actions"] for f in sorted((tmp_path / "r").iterdir())]
    np.testing.assert_array_equal(np.concatenate(files), np.stack([chunk for _, chunk in seen]))
    samples = draw(source, 6, which="calibration", held_out=0.3)
    held = draw(source, 3, which="held-out", held_out=0.3)
    assert not {m.episode for m in samples.meta} & {m.episode for m in held.meta}
    calibration = calibrate(engine.policy, samples, all_targets(engine.policy)[:2])
    assert calibration.provenance["samples"] == [[m.task, m.episode, m.step] for m in samples.meta]


def test_arrays_are_copied_at_once(tmp_path: Path) -> None:
    observation = tiny_observation(0)
    expected = {name: image.copy() for name, image in observation.images.items()}
    with Recorder(tmp_path) as recorder:
        recorder.record(observation, ACTIONS)
        for image in observation.images.values():
            image[:] = 0  # as a camera driver that uses its buffer again
    for name, image in read(tmp_path).take([0]).observations[0].images.items():
        np.testing.assert_array_equal(image, expected[name])


def test_a_later_recorder_goes_on(tmp_path: Path) -> None:
    for run in range(3):
        with Recorder(tmp_path, SMALL) as recorder:
            fill(recorder, 6, first=10 * run)
    assert sorted({m.episode for m in read(tmp_path).meta}) == [0, 1, 2]
    assert len(read(tmp_path).meta) == 18


def test_only_every_nth(tmp_path: Path) -> None:
    with Recorder(tmp_path, RecorderOptions(every=3)) as recorder:
        kept = [recorder.record(tiny_observation(i), ACTIONS) for i in range(8)]
    assert kept == [True, False, False, True, False, False, True, False]
    assert [m.step for m in read(tmp_path).meta] == [0, 3, 6]


def test_another_shape_begins_another_file(tmp_path: Path) -> None:
    with Recorder(tmp_path) as recorder:
        fill(recorder, 2)
        recorder.record(tiny_observation(2), ACTIONS[:3])
        fill(recorder, 1, first=3)
        assert recorder.flush(10)
    assert recorder.report().files == 3
    assert len(read(tmp_path).meta) == 4


def test_the_disk_is_bounded_and_the_oldest_go(tmp_path: Path) -> None:
    with Recorder(tmp_path / "one", SMALL) as recorder:
        fill(recorder, 4)
    (file,) = (tmp_path / "one").iterdir()
    size = file.stat().st_size + 4096
    options = dataclasses.replace(SMALL, max_bytes=3 * size)
    folder = tmp_path / "r"
    folder.mkdir()
    (folder / "notes.txt").write_text("somebody's")
    for _run in range(2):  # what a former run left counts, and goes first
        with Recorder(folder, options) as recorder:
            for _ in range(3):
                fill(recorder, 4)
                assert recorder.flush(10)
    report = recorder.report()
    assert (report.written, report.removed_files, report.lost) == (12, 3, 0)
    assert {m.episode for m in read(folder).meta} == {1}
    assert (folder / "notes.txt").exists()
    with Recorder(tmp_path / "none", dataclasses.replace(SMALL, max_bytes=1000)) as recorder:
        fill(recorder, 5)
    report = recorder.report()
    assert (report.failed, report.files) == (5, 0)
    assert "max_bytes" in str(report.last_error)


def test_a_full_disk_does_not_stop_the_robot(tmp_path: Path) -> None:
    engine = Engine(TINY["pi05"](num_steps=2))
    expected = engine.infer(tiny_observation(0))
    with Recorder(tmp_path, SMALL) as engine.recorder:
        with disk_with(20_000):
            for _ in range(9):
                np.testing.assert_array_equal(engine.infer(tiny_observation(0)), expected)
            assert engine.recorder.flush(10)
        report = engine.recorder.report()
        assert report.failed == 9 and report.written == 0
        assert "No space left on device" in str(report.last_error)
        assert not list(tmp_path.iterdir())  # nothing half
        engine.recorder.begin()
        engine.infer(tiny_observation(0))  # somebody has made room
    assert engine.recorder.report().written == 1
    assert len(read(tmp_path).meta) == 1


def test_a_small_disk_in_earnest(tmp_path: Path) -> None:
    with small_disk(tmp_path / "disk", 120_000) as disk:
        with Recorder(disk / "r", SMALL) as recorder:
            fill(recorder, 40)
            assert recorder.flush(20)
            report = recorder.report()
            assert report.written > 0 and report.failed > 0
            assert report.written + report.failed == 40
        assert len(read(disk / "r").meta) == report.written


def test_a_slow_disk_costs_observations_not_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    going, write = threading.Event(), recording.write_tensors

    def slow(*arguments: Any) -> None:
        going.wait()
        write(*arguments)

    monkeypatch.setattr(recording, "write_tensors", slow)
    one = recording.Step.copy(tiny_observation(0), ACTIONS, 0, 0, None).nbytes
    options = RecorderOptions(steps_per_file=2, pending_bytes=5 * one)
    with Recorder(tmp_path, options) as recorder:
        start = time.monotonic()
        kept = [recorder.record(tiny_observation(i), ACTIONS) for i in range(30)]
        assert time.monotonic() - start < 5  # and not for ever
        assert 5 <= sum(kept) <= 9  # what waits, and the file that is being written
        assert recorder.report().dropped == 30 - sum(kept)
        going.set()
    assert recorder.report().written == sum(kept)
    assert [m.step for m in read(tmp_path).meta] == [i for i, k in enumerate(kept) if k]


class _Strange:
    """No array, and it objects."""

    def __array__(self, *_: Any, **__: Any) -> np.ndarray:
        raise RuntimeError("no array")


@pytest.mark.parametrize(
    ("changes", "actions"),
    [
        ({"state": np.full(4, np.nan, np.float32)}, ACTIONS),
        ({"state": _Strange()}, ACTIONS),
        ({"images": {}}, ACTIONS),
        ({"images": {"base": np.zeros((4, 4, 3), np.float32)}}, ACTIONS),
        ({"images": None}, ACTIONS),
        ({"prompt": 7}, ACTIONS),
        ({}, np.full_like(ACTIONS, np.inf)),
        ({}, ACTIONS[0]),
    ],
)
def test_nothing_invalid_is_written_and_nothing_is_raised(
    changes: dict[str, Any], actions: np.ndarray, tmp_path: Path
) -> None:
    with Recorder(tmp_path) as recorder:
        bad = dataclasses.replace(tiny_observation(0), **changes)
        with np.errstate(invalid="ignore"):
            assert not recorder.record(bad, actions)
        fill(recorder, 1)
    report = recorder.report()
    assert (report.rejected, report.written) == (1, 1)
    assert report.last_error
    assert len(read(tmp_path).meta) == 1


def test_what_the_policy_refuses_is_not_recorded(tmp_path: Path) -> None:
    engine = Engine(TINY["pi05"](num_steps=2))
    with Recorder(tmp_path) as engine.recorder:
        blind = Observation({}, np.zeros(4, np.float32), "")
        with pytest.raises(ObservationError):
            engine.infer(blind)
    assert engine.recorder.report() == dataclasses.replace(engine.recorder.report(), written=0)
    assert not list(tmp_path.iterdir())


def test_what_cannot_be_opened(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(RecordingError, match="file"):
        Recorder(tmp_path / "file" / "r")
    with Recorder(tmp_path / "r"), pytest.raises(RecordingError, match=f"pid {os.getpid()}"):
        Recorder(tmp_path / "r")
    Recorder(tmp_path / "r").close()
    for name in ("every", "steps_per_file", "max_bytes", "pending_bytes"):
        with pytest.raises(ConfigError, match=name):
            RecorderOptions(**{name: 0})


def test_a_number_that_comes_twice_is_not_written_over(tmp_path: Path) -> None:
    with Recorder(tmp_path) as recorder:
        for _ in range(2):
            recorder.begin(7)
            fill(recorder, 2)
            recorder.flush(10)
    report = recorder.report()
    assert (report.written, report.failed) == (2, 2)
    assert "number the episodes differently" in str(report.last_error)


def test_after_the_end(tmp_path: Path) -> None:
    recorder = Recorder(tmp_path)
    fill(recorder, 3)
    assert recorder.close().written == 3
    assert not recorder.record(tiny_observation(0), ACTIONS)
    assert recorder.close().written == 3
    assert recorder.flush(0)


def test_side_by_side(tmp_path: Path) -> None:
    """Several threads may infer with one recorder; no observation is lost or doubled."""
    with Recorder(tmp_path, SMALL) as recorder:
        threads = [threading.Thread(target=fill, args=(recorder, 25)) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert recorder.report().written == 100
    assert sorted(m.step for m in read(tmp_path).meta) == list(range(100))


def test_an_error_that_is_new_is_logged_once(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any) -> None:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(recording, "write_tensors", fail)
    with Recorder(tmp_path, RecorderOptions(steps_per_file=1)) as recorder:
        fill(recorder, 5)
    assert recorder.report().failed == 5
    assert [r.getMessage() for r in caplog.records] == [
        f"1 observations are not recorded: {tmp_path}: Input/output error"
    ]
