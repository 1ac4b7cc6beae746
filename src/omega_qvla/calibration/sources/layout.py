"""Where a LeRobot dataset (v2.0, v2.1, v3.0) keeps what: read from its `meta` folder.

v2: one parquet file and one video per camera for every episode; `meta/episodes.jsonl` and
`meta/tasks.jsonl`. v3: many episodes in one file; `meta/episodes/**/*.parquet` says in which
file and from which second on an episode lies; `meta/tasks.parquet`.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from omega_qvla.calibration.sources.tables import columns_of, read_table
from omega_qvla.errors import CalibrationError

#: Name of the column that holds the words in `meta/tasks.parquet`: pandas' index, or its name.
_TASK_COLUMNS = ("task", "__index_level_0__")


@dataclass(frozen=True)
class Feature:
    """A dataset's key: dtype (`video`, `image`, `float32`, ...), shape, names of its axes."""

    dtype: str
    shape: tuple[int, ...]
    names: tuple[str, ...] = ()

    @property
    def is_camera(self) -> bool:
        """Whether it holds images."""
        return self.dtype in ("video", "image")

    @property
    def size(self) -> tuple[int, int]:
        """(height, width) of a camera, whatever the order of its axes."""
        axes = [name.rstrip("s") for name in self.names]
        if "height" in axes and "width" in axes:
            return self.shape[axes.index("height")], self.shape[axes.index("width")]
        first = len(self.shape) == 3 and self.shape[0] in (1, 3) and self.shape[2] not in (1, 3)
        height, width = self.shape[1:3] if first else self.shape[:2]
        return height, width


@dataclass(frozen=True)
class Episode:
    """One episode and where it lies.

    task:   its first task; single steps may have others (`task_index` in the table).
    data:   the parquet file with its rows, perhaps among other episodes' rows.
    videos: camera key -> (file, number in the file of the episode's first frame).
    """

    index: int
    length: int
    task: str
    data: Path
    videos: Mapping[str, tuple[Path, int]]


@dataclass(frozen=True)
class Layout:
    """A dataset's meta data. shared: several episodes may lie in one file (v3)."""

    root: Path
    version: str
    fps: float
    features: Mapping[str, Feature]
    tasks: Mapping[int, str]
    episodes: tuple[Episode, ...]

    @property
    def shared(self) -> bool:
        """Whether one file may hold several episodes."""
        return self.version.startswith("v3")

    @property
    def cameras(self) -> tuple[str, ...]:
        """The keys that hold images."""
        return tuple(key for key, feature in self.features.items() if feature.is_camera)


def read_layout(root: Path) -> Layout:
    """Read `root/meta`; no table of observations and no video is opened.

    Raises:
        CalibrationError: no LeRobot dataset, one of an unknown version, or damaged meta data.
    """
    path = root / "meta" / "info.json"
    try:
        info = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise CalibrationError(
            f"{root}: not a LeRobot dataset: meta/info.json cannot be read ({error.strerror})"
        ) from error
    except ValueError as error:
        raise CalibrationError(f"{path}: damaged: {error}") from error
    try:
        version = str(info["codebase_version"])
        if not version.startswith(("v2.", "v3.")):
            raise CalibrationError(
                f"{root}: LeRobot layout {version}; v2.0, v2.1 and v3.0 can be read. Convert it "
                "with lerobot's own scripts"
            )
        features = {key: _feature(value) for key, value in info["features"].items()}
        read = _read_v3 if version.startswith("v3.") else _read_v2
        tasks, episodes = read(root, info, [k for k, f in features.items() if f.dtype == "video"])
        layout = Layout(root, version, float(info["fps"]), features, tasks, tuple(episodes))
    except (KeyError, IndexError, TypeError, ValueError, AttributeError) as error:
        raise CalibrationError(f"{root}: its meta data are damaged: {error!r}") from error
    _check(layout, info)
    return layout


def _check(layout: Layout, info: Mapping[str, Any]) -> None:
    if not layout.fps > 0:
        raise CalibrationError(f"{layout.root}: info.json says {layout.fps} frames per second")
    counts = {
        "total_episodes": len(layout.episodes),
        "total_frames": sum(episode.length for episode in layout.episodes),
    }
    for name, count in counts.items():
        if info.get(name, count) != count:
            raise CalibrationError(
                f"{layout.root}: info.json says {name} = {info[name]}, its episodes are {count}"
            )
    if not layout.episodes:
        raise CalibrationError(f"{layout.root}: the dataset has no episodes")


def _feature(value: Mapping[str, Any]) -> Feature:
    names = value.get("names")
    plain = isinstance(names, list) and all(isinstance(name, str) for name in names)
    return Feature(value["dtype"], tuple(value["shape"]), tuple(names or ()) if plain else ())


def _read_v2(
    root: Path, info: Mapping[str, Any], videos: Sequence[str]
) -> tuple[dict[int, str], list[Episode]]:
    tasks = {row["task_index"]: row["task"] for row in _lines(root / "meta" / "tasks.jsonl")}
    chunk_size = info["chunks_size"]
    place = _places(root, info)
    episodes = []
    for row in _lines(root / "meta" / "episodes.jsonl"):
        number = row["episode_index"]
        fields = {"episode_chunk": number // chunk_size, "episode_index": number}
        own = {key: (place("video_path", video_key=key, **fields), 0) for key in videos}
        data = place("data_path", **fields)
        episodes.append(Episode(number, row["length"], _first(row["tasks"]), data, own))
    return tasks, episodes


def _read_v3(
    root: Path, info: Mapping[str, Any], videos: Sequence[str]
) -> tuple[dict[int, str], list[Episode]]:
    path = root / "meta" / "tasks.parquet"
    words = next((name for name in _TASK_COLUMNS if name in columns_of(path)), _TASK_COLUMNS[0])
    rows = read_table(path, ["task_index", words]).to_pylist()
    tasks = {row["task_index"]: row[words] for row in rows}
    files = sorted((root / "meta" / "episodes").rglob("*.parquet"))
    if not files:
        raise CalibrationError(f"{root}: meta/episodes holds no parquet file")
    columns = ["episode_index", "length", "tasks", "data/chunk_index", "data/file_index"]
    for key in videos:
        columns += [f"videos/{key}/{name}" for name in ("chunk_index", "file_index")]
        columns.append(f"videos/{key}/from_timestamp")
    place, fps = _places(root, info), float(info["fps"])
    episodes = []
    for row in (row for file in files for row in read_table(file, columns).to_pylist()):
        own = {}
        for key in videos:
            part = {name: row[f"videos/{key}/{name}"] for name in ("chunk_index", "file_index")}
            first = round(row[f"videos/{key}/from_timestamp"] * fps)
            own[key] = (place("video_path", video_key=key, **part), first)
        data = place(
            "data_path", chunk_index=row["data/chunk_index"], file_index=row["data/file_index"]
        )
        task = _first(row["tasks"])
        episodes.append(Episode(row["episode_index"], row["length"], task, data, own))
    return tasks, sorted(episodes, key=lambda episode: episode.index)


def _first(tasks: Sequence[str]) -> str:
    return str(tasks[0]) if tasks else ""


def _places(root: Path, info: Mapping[str, Any]) -> Callable[..., Path]:
    """Fills in one of info.json's templates; what it names must lie in the dataset."""

    def place(template: str, **fields: Any) -> Path:
        relative = Path(str(info[template]).format(**fields))
        if relative.is_absolute() or ".." in relative.parts:
            raise CalibrationError(f"{root}: {template} leads out of the dataset: {relative}")
        return root / relative

    return place


def _lines(path: Path) -> Iterable[dict[str, Any]]:
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise CalibrationError(f"{path}: cannot be read: {error.strerror}") from error
    for number, line in enumerate(text.splitlines(), 1):
        if line.strip():
            try:
                yield json.loads(line)
            except ValueError as error:
                raise CalibrationError(f"{path}, line {number}: damaged: {error}") from error
