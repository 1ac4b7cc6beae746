"""Small LeRobot datasets in the v2.1 and v3.0 layouts, each frame of its own colour.

from calibration.lerobot_files import DatasetSpec, colour, write_v21, write_v30
"""

from __future__ import annotations

import io
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

FPS = 10
CAMERAS = ("observation.images.front", "observation.images.wrist")
TASKS = ("open the drawer", "press the red button from above")


@dataclass(frozen=True)
class DatasetSpec:
    """episodes: (task, length) of each. dtype: `video`, or `image` for PNGs in the table."""

    episodes: tuple[tuple[int, int], ...] = ((0, 12), (1, 9), (0, 14), (1, 11))
    size: tuple[int, int] = (32, 48)
    state_dim: int = 4
    dtype: str = "video"
    video_fps: int = FPS
    gop: int = 5


def colour(camera: str, episode: int, step: int) -> tuple[int, int, int]:
    """The colour of a frame: no two frames of a dataset have the same."""
    return 20 + 12 * step, 40 + 40 * episode, 60 if camera == CAMERAS[0] else 200


def state(spec: DatasetSpec, episode: int, step: int) -> list[float]:
    """The state of a step."""
    return [episode + 0.01 * step + 0.1 * i for i in range(spec.state_dim)]


def write_v21(root: Path, spec: DatasetSpec | None = None) -> Path:
    """One parquet file and one video per camera for each episode."""
    spec = spec or DatasetSpec()
    episodes = []
    for number, (task, length) in enumerate(spec.episodes):
        write_table(root / f"data/chunk-000/episode_{number:06d}.parquet", spec, [number])
        episodes.append({"episode_index": number, "tasks": [TASKS[task]], "length": length})
        if spec.dtype == "video":
            for camera in CAMERAS:
                path = root / f"videos/chunk-000/{camera}/episode_{number:06d}.mp4"
                write_video(path, spec, camera, [number])
    tasks = [{"task_index": i, "task": task} for i, task in enumerate(TASKS)]
    _info(
        root,
        spec,
        codebase_version="v2.1",
        chunks_size=1000,
        data_path="data/chunk-{episode_chunk:03d}/episode_{episode_index:06d}.parquet",
        video_path="videos/chunk-{episode_chunk:03d}/{video_key}/episode_{episode_index:06d}.mp4",
    )
    for name, rows in (("episodes", episodes), ("tasks", tasks)):
        text = "".join(json.dumps(row) + "\n" for row in rows)
        (root / f"meta/{name}.jsonl").write_text(text)
    return root


def write_v30(root: Path, spec: DatasetSpec | None = None, per_file: int = 3) -> Path:
    """`per_file` episodes in one parquet file and one video."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    spec = spec or DatasetSpec()
    rows: list[dict[str, Any]] = []
    for file, first in enumerate(range(0, len(spec.episodes), per_file)):
        own = list(range(first, min(first + per_file, len(spec.episodes))))
        write_table(root / f"data/chunk-000/file-{file:03d}.parquet", spec, own)
        if spec.dtype == "video":
            for camera in CAMERAS:
                path = root / f"videos/{camera}/chunk-000/file-{file:03d}.mp4"
                write_video(path, spec, camera, own)
        start = 0
        for number in own:
            task, length = spec.episodes[number]
            row = {"episode_index": number, "tasks": [TASKS[task]], "length": length}
            row |= {"data/chunk_index": 0, "data/file_index": file}
            for camera in CAMERAS if spec.dtype == "video" else ():
                row[f"videos/{camera}/chunk_index"], row[f"videos/{camera}/file_index"] = 0, file
                row[f"videos/{camera}/from_timestamp"] = start / FPS
                row[f"videos/{camera}/to_timestamp"] = (start + length) / FPS
            rows.append(row)
            start += length
    _info(
        root,
        spec,
        codebase_version="v3.0",
        data_path="data/chunk-{chunk_index:03d}/file-{file_index:03d}.parquet",
        video_path="videos/{video_key}/chunk-{chunk_index:03d}/file-{file_index:03d}.mp4",
    )
    (root / "meta/episodes/chunk-000").mkdir(parents=True)
    pq.write_table(pa.Table.from_pylist(rows), root / "meta/episodes/chunk-000/file-000.parquet")
    tasks = {"task_index": [0, 1], "__index_level_0__": list(TASKS)}  # as pandas writes it
    pq.write_table(pa.table(tasks), root / "meta/tasks.parquet")
    return root


def write_table(path: Path, spec: DatasetSpec, episodes: Sequence[int]) -> None:
    """The rows of some episodes."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    rows = []
    for number in episodes:
        task, length = spec.episodes[number]
        for step in range(length):
            row: dict[str, Any] = {"observation.state": state(spec, number, step)}
            row |= {"action": [0.0, 0.0], "timestamp": step / FPS, "frame_index": step}
            row |= {"episode_index": number, "task_index": task}
            for camera in CAMERAS if spec.dtype == "image" else ():
                row[camera] = {"bytes": png(frame(spec, camera, number, step)), "path": None}
            rows.append(row)
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pylist(rows), path)


def write_video(path: Path, spec: DatasetSpec, camera: str, episodes: Sequence[int]) -> None:
    """The frames of some episodes, one after the other; a key frame every `spec.gop`."""
    import av

    path.parent.mkdir(parents=True, exist_ok=True)
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=spec.video_fps)
        stream.height, stream.width = spec.size
        stream.pix_fmt, stream.options = "yuv420p", {"crf": "5", "threads": "1"}
        stream.gop_size = spec.gop
        for number in episodes:
            for step in range(spec.episodes[number][1]):
                image = frame(spec, camera, number, step)
                container.mux(stream.encode(av.VideoFrame.from_ndarray(image, format="rgb24")))
        container.mux(stream.encode())


def frame(spec: DatasetSpec, camera: str, episode: int, step: int) -> np.ndarray:
    """uint8 [height, width, 3] of one colour."""
    return np.full((*spec.size, 3), colour(camera, episode, step), np.uint8)


def png(image: np.ndarray) -> bytes:
    """An image as PNG."""
    import av

    buffer = io.BytesIO()
    with av.open(buffer, "w", format="image2pipe") as container:
        stream = container.add_stream("png")
        stream.height, stream.width, stream.pix_fmt = *image.shape[:2], "rgb24"
        container.mux(stream.encode(av.VideoFrame.from_ndarray(image, format="rgb24")))
        container.mux(stream.encode())
    return buffer.getvalue()


def edit_info(root: Path, **changes: Any) -> None:
    """Change values of info.json."""
    path = root / "meta/info.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def _info(root: Path, spec: DatasetSpec, **values: Any) -> None:
    camera = {
        "dtype": spec.dtype,
        "shape": [*spec.size, 3],
        "names": ["height", "width", "channels"],
    }
    features = dict.fromkeys(CAMERAS, camera)
    features["observation.state"] = {"dtype": "float32", "shape": [spec.state_dim], "names": None}
    info = {
        "fps": FPS,
        "total_episodes": len(spec.episodes),
        "total_frames": sum(length for _, length in spec.episodes),
        "features": features,
        **values,
    }
    (root / "meta").mkdir(parents=True)
    (root / "meta/info.json").write_text(json.dumps(info))
