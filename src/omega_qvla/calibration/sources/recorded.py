"""A folder of recorded observations: one safetensors or npz file per episode."""

from __future__ import annotations

import json
import os
import re
import zipfile
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open

from omega_qvla.calibration.samples import (
    FORMAT_NAME,
    ObservationSet,
    SampleMeta,
    read_observations,
)
from omega_qvla.calibration.sources.mapping import ObservationMap, join_state, map_cameras
from omega_qvla.errors import CalibrationError
from omega_qvla.policies.observation import Observation

_DAMAGE = (
    OSError, EOFError, ValueError, KeyError, SafetensorError, zipfile.BadZipFile, zlib.error
)  # fmt: skip
SUFFIXES = (".safetensors", ".npz")
_PREFIX = "images."


@dataclass(frozen=True)
class _Recording:
    """One file: the shapes of its arrays, and the prompt and the origin of every step."""

    path: Path
    shapes: dict[str, tuple[int, ...]]
    prompts: tuple[str, ...]
    meta: tuple[SampleMeta, ...]

    @property
    def cameras(self) -> list[str]:
        return [name.removeprefix(_PREFIX) for name in self.shapes if name.startswith(_PREFIX)]


class RecordedFolder:
    """Episodes recorded by other programs (or by ours), a file each.

    A file holds `images.<camera>` uint8 [n, height, width, 3], `state` float [n, d] (or the
    keys of the mapping) and `prompt`, one for all steps or n of them; optionally `episode`,
    `task` and `step` (int [n], 0 to n-1 otherwise). In safetensors the words are metadata, n
    prompts as a JSON list. Files of observations that omega-qvla wrote fit as well.
    An episode without a number gets the number at the end of its file's name, or else the
    file's place in the sorted folder. Files may lie in sub-folders.

    Attributes:
        meta: every step of every file, in the order of the names. source: in words.
    """

    def __init__(self, recordings: Sequence[_Recording], mapping: ObservationMap, name: str):
        """Raises CalibrationError: two files hold the same step of one episode."""
        self.mapping = mapping
        self.source = f"recorded observations {name}; {mapping}"
        self._recordings = tuple(recordings)
        self._places = [(r, row) for r in recordings for row in range(len(r.meta))]
        self.meta = tuple(r.meta[row] for r, row in self._places)
        seen: dict[tuple[str, int, int], Path] = {}
        for (recording, _), m in zip(self._places, self.meta, strict=True):
            other = seen.setdefault((m.task, m.episode, m.step), recording.path)
            if other != recording.path:
                raise CalibrationError(
                    f"{recording.path} and {other.name} both hold step {m.step} of episode "
                    f"{m.episode} of {m.task!r}; number the episodes (`episode`) differently"
                )

    @classmethod
    def open(
        cls, path: str | os.PathLike[str], cameras: Sequence[str], mapping: ObservationMap
    ) -> RecordedFolder:
        """Read what the files of a folder announce.

        Args:
            cameras: the policy's; those that `mapping` leaves out go by their own names.

        Raises:
            CalibrationError: no such files, one that is damaged, or a camera that is missing.
        """
        root = Path(path).resolve()
        files = sorted(f for f in root.rglob("*") if f.suffix in SUFFIXES) if root.is_dir() else []
        if not files:
            raise CalibrationError(f"{root}: no folder with {' or '.join(SUFFIXES)} files")
        recordings = [_announce(file, place) for place, file in enumerate(files)]
        found: dict[str, str] = {}
        for recording in recordings:
            own = map_cameras(cameras, mapping.cameras, recording.cameras, str(recording.path))
            found = found or own
        return cls(recordings, ObservationMap(found, mapping.state), root.name)

    def take(self, indices: Sequence[int]) -> ObservationSet:
        """Read the steps at `indices` of `meta`, in that order.

        Raises:
            CalibrationError: a file is truncated, an image is not uint8 [h, w, 3], or a state
                is not finite; file and step are named.
        """
        rows: dict[Path, list[int]] = {}
        for index in indices:
            recording, row = self._places[index]
            rows.setdefault(recording.path, []).append(row)
        found: dict[tuple[Path, int], Observation] = {}
        for recording in self._recordings:
            wanted = sorted(set(rows.get(recording.path, ())))
            if wanted:
                read = zip(wanted, self._read(recording, wanted), strict=True)
                found |= {(recording.path, row): observation for row, observation in read}
        observations = tuple(
            found[recording.path, row] for recording, row in (self._places[i] for i in indices)
        )
        return ObservationSet(observations, tuple(self.meta[i] for i in indices), self.source)

    def _read(self, recording: _Recording, rows: list[int]) -> list[Observation]:
        where = str(recording.path)
        state_keys = [_state_key(part.key, recording.shapes) for part in self.mapping.state]
        missing = [k for k in state_keys if len(recording.shapes.get(k, ())) != 2]
        if missing:
            raise CalibrationError(
                f"{where}: no state {missing[0]!r} [n, d]; it has: {', '.join(recording.shapes)}"
            )
        names = {camera: f"{_PREFIX}{key}" for camera, key in self.mapping.cameras.items()}
        arrays = _rows(recording.path, [*names.values(), *state_keys], rows)
        for name in names.values():
            array = arrays[name]
            if array.dtype != np.uint8 or array.ndim != 4 or array.shape[-1] != 3:
                raise CalibrationError(
                    f"{where}: {name} is {array.dtype} {list(recording.shapes[name])}, wanted "
                    "uint8 [n, height, width, 3]"
                )
        parts = [
            part.of(arrays[key], where)
            for part, key in zip(self.mapping.state, state_keys, strict=True)
        ]
        states = join_state(parts, [recording.meta[row].step for row in rows], where)
        return [
            Observation(
                {camera: arrays[name][i] for camera, name in names.items()},
                states[i],
                recording.prompts[row],
            )
            for i, row in enumerate(rows)
        ]


def _state_key(key: str, shapes: dict[str, tuple[int, ...]]) -> str:
    """Recordings call the default key of datasets, `observation.state`, plainly `state`."""
    short = key.removeprefix("observation.")
    return short if key not in shapes and short in shapes else key


def _announce(path: Path, place: int) -> _Recording:
    """What a file holds, without its pixels."""
    shapes, words = _header(path)
    if words.get("format") == FORMAT_NAME:
        whole = read_observations(path)
        prompts = tuple(observation.prompt for observation in whole)
        return _Recording(path, shapes, prompts, whole.meta)
    lengths = {name: shape[0] if shape else 0 for name, shape in shapes.items()}
    if len(set(lengths.values())) != 1 or not min(lengths.values()):
        raise CalibrationError(
            f"{path}: its arrays must have one length, the number of steps; they have "
            f"{', '.join(f'{name} {length}' for name, length in lengths.items()) or 'no steps'}"
        )
    (count,) = set(lengths.values())
    prompts = _prompts(path, words.get("prompt"), count)
    number = re.search(r"(\d+)$", path.stem)
    try:
        episode = int(words["episode"] if "episode" in words else number[1] if number else place)
        steps = [int(step) for step in words.get("step", range(count))]
    except (TypeError, ValueError) as error:
        raise CalibrationError(f"{path}: episode and steps must be integers: {error}") from error
    if len(steps) != count or len(set(steps)) != count:
        raise CalibrationError(f"{path}: {count} steps, but `step` holds {len(set(steps))} numbers")
    tasks = [str(words.get("task", prompt)) for prompt in prompts]
    meta = tuple(SampleMeta(episode, s, t) for s, t in zip(steps, tasks, strict=True))
    return _Recording(path, shapes, prompts, meta)


def _prompts(path: Path, found: Any, count: int) -> tuple[str, ...]:
    if isinstance(found, str):
        return (found,) * count
    if isinstance(found, list) and len(found) == count and all(isinstance(p, str) for p in found):
        return tuple(found)
    raise CalibrationError(f"{path}: `prompt` must be one instruction or {count} of them")


#: Arrays of an npz file (entries of a safetensors' metadata) that are words and numbers.
_WORDS = ("prompt", "episode", "step", "task")


def _header(path: Path) -> tuple[dict[str, tuple[int, ...]], dict[str, Any]]:
    """Shapes of the arrays, and prompt, episode, step, task as far as they are there."""
    try:
        if path.suffix == ".npz":
            with np.load(path, allow_pickle=False) as file:
                words = {name: file[name].tolist() for name in _WORDS if name in file.files}
                rest = [name for name in file.files if name not in _WORDS]
                return {name: _npz_shape(file, name) for name in rest}, words
        with safe_open(path, "np") as file:
            words = dict(file.metadata() or {})
            if words.get("format") != FORMAT_NAME:
                for name in ("prompt", "step"):
                    if str(words.get(name, "")).startswith("["):
                        words[name] = json.loads(words[name])
            shapes = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
            if "step" in shapes and "step" not in words:
                words["step"] = file.get_tensor("step").tolist()
            return {name: shape for name, shape in shapes.items() if name != "step"}, words
    except _DAMAGE as error:
        raise CalibrationError(f"{path}: truncated or damaged: {error}") from error


def _npz_shape(file: Any, name: str) -> tuple[int, ...]:
    """The shape of an array from its own header: its data stay compressed."""
    with file.zip.open(f"{name}.npy") as member:
        version = np.lib.format.read_magic(member)
        reader = np.lib.format.read_array_header_1_0
        if version != (1, 0):
            reader = np.lib.format.read_array_header_2_0
        shape: tuple[int, ...] = reader(member)[0]
        return shape


def _rows(path: Path, names: Sequence[str], rows: Sequence[int]) -> dict[str, np.ndarray]:
    """Rows of the named arrays."""
    try:
        if path.suffix == ".npz":
            with np.load(path, allow_pickle=False) as file:
                return {name: file[name][list(rows)] for name in names}
        with safe_open(path, "np") as file:
            parts = {name: file.get_slice(name) for name in names}
            return {name: np.stack([part[row] for row in rows]) for name, part in parts.items()}
    except _DAMAGE as error:
        raise CalibrationError(f"{path}: truncated or damaged: {error}") from error
