"""LeRobot datasets that the test itself writes: every frame can be told from every other."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("pyarrow", reason="needs the extra `lerobot`")
pytest.importorskip("av", reason="needs the extra `lerobot`")

from calibration.lerobot_files import (
    CAMERAS,
    FPS,
    TASKS,
    DatasetSpec,
    colour,
    edit_info,
    state,
    write_table,
    write_v21,
    write_v30,
    write_video,
)
from omega_qvla.calibration.sources import LeRobotDataset, ObservationMap, StateColumns, draw
from omega_qvla.errors import CalibrationError

SPEC = DatasetSpec()
MAP = ObservationMap({"base": CAMERAS[0], "wrist": CAMERAS[1]})
WRITERS = {"v2.1": write_v21, "v3.0": write_v30}


@pytest.fixture(scope="module", params=[*WRITERS, "v2.1 images", "v3.0 images"])
def dataset(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    version, _, images = request.param.partition(" ")
    spec = dataclasses.replace(SPEC, dtype="image") if images else SPEC
    root: Path = WRITERS[version](tmp_path_factory.mktemp("lerobot") / "demo", spec)
    return root


def test_every_observation_is_the_right_one(dataset: Path) -> None:
    source = LeRobotDataset.open(dataset, MAP)
    assert [(m.episode, m.step) for m in source.meta] == [
        (e, s) for e, (_, length) in enumerate(SPEC.episodes) for s in range(length)
    ]
    order = np.random.default_rng(0).permutation(len(source.meta))
    found = source.take([int(i) for i in order])
    for observation, meta in zip(found.observations, found.meta, strict=True):
        for name, camera in MAP.cameras.items():
            image = observation.images[name]
            assert image.shape == (*SPEC.size, 3)
            assert image.dtype == np.uint8
            error = np.abs(image - np.array(colour(camera, meta.episode, meta.step), float))
            assert error.max() <= 5, (name, meta)  # neighbours in time are 12 apart
        expected = state(SPEC, meta.episode, meta.step)
        np.testing.assert_allclose(observation.state, expected, rtol=1e-6)
        assert observation.state.dtype == np.float32
        assert observation.prompt == TASKS[SPEC.episodes[meta.episode][0]] == meta.task


def test_the_source_says_what_was_read(dataset: Path) -> None:
    source = LeRobotDataset.open(dataset, MAP)
    assert source.source.startswith("LeRobot v")
    assert "dataset demo; cameras base=observation.images.front" in source.source
    assert str(dataset) not in source.source
    assert draw(source, 3).source == source.source


def test_parts_share_no_episode_whatever_the_seeds(dataset: Path) -> None:
    source = LeRobotDataset.open(dataset, MAP)
    seen, held = (
        {m.episode for seed in range(3) for m in draw(source, 6, seed, which=which).meta}
        for which in ("calibration", "held-out")
    )
    assert len(seen) == len(held) == 2  # one episode of each of the two tasks
    assert not seen & held
    assert draw(source, 6, 1).digest() == draw(source, 6, 1).digest()
    assert draw(source, 6, 1).digest() != draw(source, 6, 2).digest()
    with pytest.raises(CalibrationError, match=r"99 .* in its held-out episodes"):
        draw(source, 99, which="held-out")


def test_columns_of_the_state(dataset: Path) -> None:
    mapping = ObservationMap(MAP.cameras, (StateColumns.parse("observation.state=2:4,0"),))
    (observation,) = LeRobotDataset.open(dataset, mapping).take([3])
    whole = state(SPEC, 0, 3)
    np.testing.assert_allclose(observation.state, [whole[2], whole[3], whole[0]], rtol=1e-6)
    with pytest.raises(CalibrationError, match=r"4 columns, column 9"):
        mapping = ObservationMap(MAP.cameras, (StateColumns.parse("observation.state=9"),))
        LeRobotDataset.open(dataset, mapping).take([3])
    with pytest.raises(CalibrationError, match=r"no state 'nope'; its keys: observation.state"):
        LeRobotDataset.open(dataset, ObservationMap(MAP.cameras, (StateColumns("nope"),)))


def test_only_what_is_sampled_is_decoded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import av

    spec = dataclasses.replace(SPEC, episodes=((0, 12),) * 3, gop=4)
    source = LeRobotDataset.open(write_v30(tmp_path / "d", spec), MAP)
    decoded: list[int] = []
    opened = av.open

    class Counting:
        def __init__(self, inner: Any) -> None:
            self.inner = inner

        def __enter__(self) -> Counting:
            return self

        def __exit__(self, *_: Any) -> None:
            self.inner.close()

        def __getattr__(self, name: str) -> Any:
            return getattr(self.inner, name)

        def decode(self, stream: Any) -> Any:
            for frame in self.inner.decode(stream):
                decoded.append(frame.pts)
                yield frame

    monkeypatch.setattr(av, "open", lambda *a, **k: Counting(opened(*a, **k)))
    source.take([2 * 12 + 5])
    assert 2 <= len(decoded) <= 2 * 4  # of each camera's 36, at most one group of pictures


@pytest.mark.parametrize("version", WRITERS)
def test_a_camera_that_is_not_there(version: str, tmp_path: Path) -> None:
    root = WRITERS[version](tmp_path / "d")
    with pytest.raises(CalibrationError, match=r"no camera 'top' .*it has: .*front, .*wrist"):
        LeRobotDataset.open(root, ObservationMap({"base": "top"}))


def test_what_is_no_dataset(tmp_path: Path) -> None:
    with pytest.raises(CalibrationError, match="not a LeRobot dataset"):
        LeRobotDataset.open(tmp_path, MAP)
    root = write_v21(tmp_path / "d")
    for version in ("v1.6", "v4.0"):
        edit_info(root, codebase_version=version)
        with pytest.raises(CalibrationError, match=rf"layout {version}; v2.0"):
            LeRobotDataset.open(root, MAP)
    edit_info(root, codebase_version="v2.1", data_path="../x")
    with pytest.raises(CalibrationError, match="out of the dataset"):
        LeRobotDataset.open(root, MAP)
    (root / "meta/info.json").write_text("{")
    with pytest.raises(CalibrationError, match=r"info.json: damaged"):
        LeRobotDataset.open(root, MAP)


def _cut(path: Path, keep: float) -> None:
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * keep)])


@pytest.mark.parametrize("version", WRITERS)
@pytest.mark.parametrize("keep", [0.0, 0.5, 0.95])
@pytest.mark.parametrize("kind", ["parquet", "mp4"])
def test_truncated_files_are_named(version: str, keep: float, kind: str, tmp_path: Path) -> None:
    root = WRITERS[version](tmp_path / "d")
    source = LeRobotDataset.open(root, MAP)
    path = sorted((root / ("data" if kind == "parquet" else "videos")).rglob(f"*.{kind}"))[0]
    _cut(path, keep)
    with pytest.raises(CalibrationError, match=f"{path.name}: truncated"):
        source.take([5])
    path.unlink()
    with pytest.raises(CalibrationError, match=f"{path.name}: no such file"):
        source.take([5])


def test_truncated_meta_data(tmp_path: Path) -> None:
    root = write_v30(tmp_path / "d")
    path = root / "meta/episodes/chunk-000/file-000.parquet"
    _cut(path, 0.7)
    with pytest.raises(CalibrationError, match=r"file-000.parquet: truncated"):
        LeRobotDataset.open(root, MAP)
    root = write_v21(tmp_path / "e")
    _cut(root / "meta/episodes.jsonl", 0.9)
    with pytest.raises(CalibrationError, match=r"episodes.jsonl, line 4: damaged"):
        LeRobotDataset.open(root, MAP)


@pytest.mark.parametrize("version", WRITERS)
def test_wrong_rates(version: str, tmp_path: Path) -> None:
    root = WRITERS[version](tmp_path / "d", dataclasses.replace(SPEC, video_fps=15))
    with pytest.raises(CalibrationError, match=r"15 frames per second, but .* says 10"):
        LeRobotDataset.open(root, MAP).take([0])
    edit_info(root, fps=30)
    with pytest.raises(CalibrationError, match=r"0.1 s apart, but info.json says 30"):
        LeRobotDataset.open(root, MAP).take([0])
    edit_info(root, fps=0)
    with pytest.raises(CalibrationError, match=r"says 0.0 frames|meta data"):
        LeRobotDataset.open(root, MAP)


@pytest.mark.parametrize("version", WRITERS)
def test_wrong_counts(version: str, tmp_path: Path) -> None:
    root = WRITERS[version](tmp_path / "d")
    source = LeRobotDataset.open(root, MAP)
    video = sorted((root / "videos").rglob("*.mp4"))[0]
    table = sorted((root / "data").rglob("*.parquet"))[0]
    short = dataclasses.replace(SPEC, episodes=((0, 10),))
    write_video(video, short, CAMERAS[0], [0])
    with pytest.raises(CalibrationError, match=r"mp4: 10 frames, but its episodes announce"):
        source.take([0])
    write_table(table, short, [0])
    with pytest.raises(CalibrationError, match=r"parquet: 10 rows of episode 0, .* say 12"):
        source.take([0])
    edit_info(root, total_frames=7)
    with pytest.raises(CalibrationError, match=r"total_frames = 7, its episodes are 46"):
        LeRobotDataset.open(root, MAP)


def test_frames_behind_the_end_are_missed(tmp_path: Path) -> None:
    from omega_qvla.calibration.sources.video import read_frames

    path = tmp_path / "v.mp4"
    write_video(path, SPEC, CAMERAS[0], [0])
    assert set(read_frames(path, [11, 0], FPS, exactly=12)) == {0, 11}
    with pytest.raises(CalibrationError, match=r"no frame 12 \(1.2 s\)"):
        read_frames(path, [12], FPS)


@pytest.mark.parametrize("version", WRITERS)
def test_wrong_image_size(version: str, tmp_path: Path) -> None:
    root = WRITERS[version](tmp_path / "d")
    video = sorted((root / "videos").rglob("*.mp4"))[0]
    episodes = [0] if version == "v2.1" else [0, 1, 2]
    write_video(video, dataclasses.replace(SPEC, size=(48, 48)), CAMERAS[0], episodes)
    with pytest.raises(CalibrationError, match=r"images of \[48, 48\].* says \[32, 48\]"):
        LeRobotDataset.open(root, MAP).take([0])


@pytest.mark.parametrize("version", WRITERS)
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_states_that_are_not_finite(
    version: str, bad: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def spoilt(spec: DatasetSpec, episode: int, step: int) -> list[float]:
        values = state(spec, episode, step)
        return [*values[:2], bad, values[3]] if (episode, step) == (0, 7) else values

    monkeypatch.setattr("calibration.lerobot_files.state", spoilt)
    source = LeRobotDataset.open(WRITERS[version](tmp_path / "d"), MAP)
    with pytest.raises(CalibrationError, match=r"episode 0: the state of step 7 .*column\(s\) 2"):
        source.take([3, 7])
    source.take([3, 8])  # only what is used must be good


def test_a_missing_package_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = LeRobotDataset.open(write_v21(tmp_path / "d"), MAP)

    def refuse(name: str, *args: Any, **kwargs: Any) -> Any:
        raise ImportError(f"No module named {name!r}")

    monkeypatch.setattr("omega_qvla.calibration.sources.base.importlib.import_module", refuse)
    with pytest.raises(CalibrationError, match=r"needs pyarrow .*omega-qvla\[lerobot\]"):
        source.take([0])
