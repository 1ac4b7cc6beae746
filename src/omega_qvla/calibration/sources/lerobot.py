"""A LeRobot dataset as a source of observations."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from omega_qvla.calibration.samples import ObservationSet, SampleMeta
from omega_qvla.calibration.sources.layout import Episode, Layout, read_layout
from omega_qvla.calibration.sources.mapping import ObservationMap, StateColumns, join_state
from omega_qvla.calibration.sources.tables import columns_of, matrix, read_table
from omega_qvla.calibration.sources.video import read_frames, read_image
from omega_qvla.errors import CalibrationError
from omega_qvla.policies.observation import Observation

#: How far the time between rows may be from 1 / fps.
_TIME_TOLERANCE = 0.02


class LeRobotDataset:
    """A dataset in LeRobot's v2.0, v2.1 or v3.0 layout.

    Row i of an episode goes with frame i of its videos. (Timestamps are not used to find
    frames: in recorded datasets their first one is 0 or one period, as the recorder liked.)

    Attributes:
        meta: every step of every episode, in order; the task is the episode's first one.
        source: name, version and mapping, in words; it goes into packs.
    """

    def __init__(self, layout: Layout, mapping: ObservationMap) -> None:
        """Raises CalibrationError: the dataset lacks a camera or a part of the state."""
        self.layout, self.mapping = layout, mapping
        for camera, key in mapping.cameras.items():
            if key not in layout.cameras:
                have = ", ".join(layout.cameras) or "none"
                raise CalibrationError(
                    f"{layout.root} has no camera {key!r} (for {camera!r}); it has: {have}"
                )
        for part in mapping.state:
            if part.key not in layout.features or layout.features[part.key].is_camera:
                have = ", ".join(k for k in layout.features if k not in layout.cameras)
                raise CalibrationError(
                    f"{layout.root} has no state {part.key!r}; its keys: {have or 'none'}. Say "
                    "which one it is: --state-key KEY"
                )
        self.source = f"LeRobot {layout.version} dataset {layout.root.name}; {mapping}"
        self.meta = tuple(
            SampleMeta(episode.index, step, episode.task)
            for episode in layout.episodes
            for step in range(episode.length)
        )
        self._episodes = {episode.index: episode for episode in layout.episodes}

    @classmethod
    def open(cls, path: str | os.PathLike[str], mapping: ObservationMap) -> LeRobotDataset:
        """Read a dataset's meta data. Raises CalibrationError."""
        return cls(read_layout(Path(path).resolve()), mapping)

    def take(self, indices: Sequence[int]) -> ObservationSet:
        """Read the steps at `indices` of `meta`, in that order; only their frames are decoded.

        Raises:
            CalibrationError: a file is missing, truncated or disagrees with info.json in the
                frame rate, the number of frames or the size of the images; a state is not
                finite. Episode and step are named.
        """
        chosen = [self.meta[index] for index in indices]
        steps: dict[int, list[int]] = {}
        for origin in chosen:
            steps.setdefault(origin.episode, []).append(origin.step)
        found: dict[tuple[int, int], Observation] = {}
        for number, wanted in steps.items():
            own = sorted(set(wanted))
            for step, observation in zip(own, self._read(self._episodes[number], own), strict=True):
                found[number, step] = observation
        observations = tuple(found[origin.episode, origin.step] for origin in chosen)
        return ObservationSet(observations, tuple(chosen), self.source)

    def has(self, key: str) -> bool:
        """Whether the dataset has a column of that name."""
        return key in self.layout.features and not self.layout.features[key].is_camera

    def actions(self, number: int, keys: Sequence[StateColumns]) -> np.ndarray:
        """Recorded vectors of a whole episode, float64 [length, d], joined in the order of `keys`.

        Raises:
            CalibrationError: no such episode or key, or a file that is damaged.
        """
        if number not in self._episodes:
            raise CalibrationError(f"{self.layout.root} has no episode {number}")
        for part in keys:
            if not self.has(part.key):
                have = ", ".join(k for k in self.layout.features if self.has(k))
                raise CalibrationError(f"{self.layout.root} has no {part.key!r}; it has: {have}")
        episode = self._episodes[number]
        where = f"{self.layout.root.name}, episode {number}"
        table = self._rows(episode, list(dict.fromkeys(part.key for part in keys)))
        steps = range(episode.length)
        return np.concatenate(
            [self._part(part, table, steps, episode, where) for part in keys], axis=1
        )

    def _read(self, episode: Episode, steps: Sequence[int]) -> list[Observation]:
        """Observations of one episode at `steps`, ascending."""
        where = f"{self.layout.root.name}, episode {episode.index}"
        stored = {k for k in self.mapping.cameras.values() if self._dtype(k) == "image"}
        keys = dict.fromkeys([*(part.key for part in self.mapping.state), *sorted(stored)])
        table = self._rows(episode, list(keys))
        states = join_state(
            [self._part(part, table, steps, episode, where) for part in self.mapping.state],
            steps,
            where,
        )
        images = {
            camera: (
                self._stored_images(table, key, steps, where)
                if key in stored
                else self._frames(episode, key, steps)
            )
            for camera, key in self.mapping.cameras.items()
        }
        prompts = self._prompts(table, steps, episode)
        return [
            Observation({name: frames[i] for name, frames in images.items()}, states[i], prompts[i])
            for i in range(len(steps))
        ]

    def _dtype(self, key: str) -> str:
        return self.layout.features[key].dtype

    def _rows(self, episode: Episode, keys: list[str]) -> Any:
        """The episode's rows, in order, checked for their number and their rate."""
        have = columns_of(episode.data)
        extra = [k for k in ("task_index", "timestamp", "frame_index") if k in have]
        table = read_table(episode.data, [*keys, *extra], episode.index)
        if table.num_rows != episode.length:
            raise CalibrationError(
                f"{episode.data}: {table.num_rows} rows of episode {episode.index}, its meta data "
                f"say {episode.length}"
            )
        if "frame_index" in extra:
            order = np.argsort(table["frame_index"].to_numpy(), kind="stable")
            table = table.take(order)
        if "timestamp" in extra and episode.length > 1:
            times = matrix(table, "timestamp", range(episode.length), episode.data)[:, 0]
            period = float(np.median(np.diff(times)))
            if not abs(period * self.layout.fps - 1) <= _TIME_TOLERANCE:
                raise CalibrationError(
                    f"{episode.data}: rows are {period:.4g} s apart, but info.json says "
                    f"{self.layout.fps:g} frames per second"
                )
        return table

    def _part(
        self, part: StateColumns, table: Any, steps: Sequence[int], episode: Episode, where: str
    ) -> np.ndarray:
        return part.of(matrix(table, part.key, steps, episode.data), where)

    def _prompts(self, table: Any, steps: Sequence[int], episode: Episode) -> list[str]:
        if "task_index" not in table.column_names:
            return [episode.task] * len(steps)
        prompts = []
        for index in matrix(table, "task_index", steps, episode.data)[:, 0]:
            if int(index) not in self.layout.tasks:
                raise CalibrationError(
                    f"{episode.data}: task {int(index)} is not among the dataset's "
                    f"{len(self.layout.tasks)} tasks"
                )
            prompts.append(self.layout.tasks[int(index)])
        return prompts

    def _frames(self, episode: Episode, key: str, steps: Sequence[int]) -> list[np.ndarray]:
        path, first = episode.videos[key]
        frames: Mapping[int, np.ndarray] = read_frames(
            path,
            [first + step for step in steps],
            self.layout.fps,
            at_least=first + episode.length,
            exactly=None if self.layout.shared else episode.length,
        )
        return [self._sized(frames[first + step], key, str(path)) for step in steps]

    def _stored_images(
        self, table: Any, key: str, steps: Sequence[int], where: str
    ) -> list[np.ndarray]:
        """Images that lie in the table itself, as {"bytes": PNG or JPEG, "path": ...}."""
        images = []
        for step, cell in zip(steps, table[key].take(list(steps)).to_pylist(), strict=True):
            place = f"{where}, step {step}, {key}"
            data = cell.get("bytes") if isinstance(cell, dict) else None
            if not data:
                raise CalibrationError(f"{place}: the table holds no encoded image")
            images.append(self._sized(read_image(data, place), key, place))
        return images

    def _sized(self, image: np.ndarray, key: str, where: str) -> np.ndarray:
        size = self.layout.features[key].size
        if image.shape[:2] != size:
            raise CalibrationError(
                f"{where}: images of {list(image.shape[:2])} (height, width), info.json says "
                f"{list(size)} for {key}"
            )
        return image
