"""Folders of recorded observations."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

from omega_qvla.calibration import SampleMeta, write_observations
from omega_qvla.calibration.sources import ObservationMap, RecordedFolder, StateColumns, draw
from omega_qvla.errors import CalibrationError, ConfigError
from omega_qvla.policies.observation import Observation

ANY = ObservationMap({})
CAMERAS = ("base",)


def arrays(episode: int, count: int = 5, **changes: Any) -> dict[str, np.ndarray]:
    """A recording whose pixels and states tell episode and step."""
    images = np.zeros((count, 4, 6, 3), np.uint8)
    images += (20 * episode + np.arange(count, dtype=np.uint8))[:, None, None, None]
    state = episode + np.arange(count)[:, None] * np.ones((1, 3))
    return {"images.base": images, "state": state} | changes


def write(folder: Path, kind: str, name: str, values: dict[str, Any], **words: Any) -> Path:
    """One file of either kind."""
    folder.mkdir(exist_ok=True)
    path = folder / f"{name}.{kind}"
    if kind == "npz":
        np.savez_compressed(path, **values, **{k: np.array(v) for k, v in words.items()})
    else:
        text = {k: v if isinstance(v, str) else json.dumps(v) for k, v in words.items()}
        save_file({k: np.ascontiguousarray(v) for k, v in values.items()}, path, text)
    return path


@pytest.fixture(params=["npz", "safetensors"])
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def test_every_observation_is_the_right_one(kind: str, tmp_path: Path) -> None:
    for episode in (7, 3):
        write(tmp_path / "r", kind, f"run{episode}", arrays(episode), prompt="push")
    source = RecordedFolder.open(tmp_path / "r", CAMERAS, ANY)
    assert [(m.episode, m.step, m.task) for m in source.meta[:6]] == [
        *((3, step, "push") for step in range(5)), (7, 0, "push"),
    ]  # fmt: skip
    found = source.take([9, 0, 4])
    assert [(m.episode, m.step) for m in found.meta] == [(7, 4), (3, 0), (3, 4)]
    for observation, meta in zip(found.observations, found.meta, strict=True):
        assert (observation.images["base"] == 20 * meta.episode + meta.step).all()
        assert observation.state.tolist() == [meta.episode + meta.step] * 3
        assert observation.state.dtype == np.float32
    held = {m.episode for m in draw(source, 2, which="held-out").meta}
    assert held | {m.episode for m in draw(source, 5, which="calibration").meta} == {3, 7}


def test_words_of_a_recording(kind: str, tmp_path: Path) -> None:
    words = {"prompt": ["a", "b", "b"], "episode": 12, "step": [0, 10, 20], "task": "both"}
    write(tmp_path / "r", kind, "x", arrays(1, 3), **words)
    source = RecordedFolder.open(tmp_path / "r", CAMERAS, ANY)
    assert source.meta == tuple(SampleMeta(12, step, "both") for step in (0, 10, 20))
    assert [o.prompt for o in source.take([0, 2]).observations] == ["a", "b"]
    assert source.source == "recorded observations r; cameras base=base; state observation.state"


def test_other_names(kind: str, tmp_path: Path) -> None:
    values = arrays(1, 3)
    values = {"images.ego": values["images.base"], "joints": values["state"]}
    write(tmp_path / "r", kind, "x", values, prompt="push")
    with pytest.raises(CalibrationError, match=r"no camera 'base'; it has: ego.*--camera base="):
        RecordedFolder.open(tmp_path / "r", CAMERAS, ANY)
    mapping = ObservationMap({"base": "ego"}, (StateColumns("joints", (1, 0)),))
    source = RecordedFolder.open(tmp_path / "r", CAMERAS, mapping)
    assert source.take([1]).observations[0].state.tolist() == [2, 2]
    with pytest.raises(ConfigError, match=r"policy has no camera top; its cameras: base"):
        RecordedFolder.open(tmp_path / "r", CAMERAS, ObservationMap({"top": "ego"}))


def test_our_own_files_fit(tmp_path: Path) -> None:
    images = {"base": np.zeros((4, 6, 3), np.uint8)}
    observations = [Observation(images, np.ones(3, np.float32), f"p{i}") for i in range(2)]
    (tmp_path / "r").mkdir()
    meta = [SampleMeta(4, 0, "t"), SampleMeta(5, 2, "t")]
    write_observations(tmp_path / "r/a.safetensors", observations, meta)
    source = RecordedFolder.open(tmp_path / "r", CAMERAS, ANY)
    assert list(source.meta) == meta
    assert [o.prompt for o in source.take([1, 0]).observations] == ["p1", "p0"]
    write_observations(tmp_path / "r/b.safetensors", observations, meta)
    with pytest.raises(CalibrationError, match=r"both hold step 0 of episode 4"):
        RecordedFolder.open(tmp_path / "r", CAMERAS, ANY)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"state": np.full((5, 3), np.nan)}, r"state of step 0 .*column\(s\) 0, 1, 2"),
        ({"state": np.zeros(5)}, r"no state 'state' \[n, d\]"),
        ({"state": np.zeros((4, 3))}, "must have one length"),
        ({"images.base": np.zeros((5, 4, 6, 3), np.float32)}, r"float32 .* wanted uint8"),
        ({"images.base": np.zeros((5, 4, 6, 1), np.uint8)}, r"\[5, 4, 6, 1\], wanted uint8"),
    ],
)
def test_unusable_recordings(
    kind: str, changes: dict[str, np.ndarray], message: str, tmp_path: Path
) -> None:
    write(tmp_path / "r", kind, "x", arrays(1, **changes), prompt="push")
    with pytest.raises(CalibrationError, match=message):
        RecordedFolder.open(tmp_path / "r", CAMERAS, ANY).take([0, 1])


def test_unusable_files(kind: str, tmp_path: Path) -> None:
    with pytest.raises(CalibrationError, match="no folder with"):
        RecordedFolder.open(tmp_path, CAMERAS, ANY)
    path = write(tmp_path / "r", kind, "x", arrays(1), prompt=["only", "two"])
    with pytest.raises(CalibrationError, match=r"one instruction or 5 of them"):
        RecordedFolder.open(tmp_path / "r", CAMERAS, ANY)
    for keep in (0.9, 0.3, 0.0):
        data = path.read_bytes()
        path.write_bytes(data[: int(keep * len(data))])
        with pytest.raises(CalibrationError, match=rf"x.{kind}: truncated"):
            RecordedFolder.open(tmp_path / "r", CAMERAS, ANY)
