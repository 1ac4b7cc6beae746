"""One file of a recording: the steps in it, checked, and how they are written."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Self

import numpy as np
import torch

from omega_qvla.errors import RecordingError
from omega_qvla.pack.files import write_tensors
from omega_qvla.policies.observation import Observation

#: Name of a file: the episode, the first step in it.
NAME = r"episode-(\d+)-(\d+)\.safetensors"
FORMAT_NAME = "omega-qvla recording"


def episode_of(path: Path) -> int:
    """The number of the episode that a recording's file is named after."""
    found = re.fullmatch(NAME, path.name)
    assert found is not None  # only files of this name are looked at
    return int(found[1])


@dataclass(frozen=True)
class Step:
    """A copy of one observation and of the actions [horizon, action_dim] that followed."""

    images: dict[str, np.ndarray]
    state: np.ndarray
    prompt: str
    actions: np.ndarray
    episode: int
    index: int
    task: str | None

    @classmethod
    def copy(
        cls,
        observation: Observation,
        actions: np.ndarray,
        episode: int,
        index: int,
        task: str | None,
    ) -> Self:
        """Copy the arrays: robots reuse their camera buffers.

        Raises:
            RecordingError: images that are not uint8 [h, w, 3], a state or actions that are
                not finite numbers [d] and [h, d], an instruction that is no text.
        """
        images = {str(name): np.array(image) for name, image in observation.images.items()}
        state = np.array(observation.state, dtype=np.float32)
        chunk = np.array(actions, dtype=np.float32)
        for name, image in images.items():
            if image.dtype != np.uint8 or image.ndim != 3 or image.shape[-1] != 3:
                raise RecordingError(f"image {name} is {image.dtype} {list(image.shape)}")
        if not images:
            raise RecordingError("the observation has no images")
        for what, array, ndim in (("state", state, 1), ("actions", chunk, 2)):
            if array.ndim != ndim or not np.isfinite(array).all():
                raise RecordingError(f"{what} {list(array.shape)}: not {ndim}-d, or not finite")
        if not isinstance(observation.prompt, str):
            raise RecordingError(f"the instruction is a {type(observation.prompt).__name__}")
        return cls(images, state, observation.prompt, chunk, episode, index, task)

    def arrays(self) -> dict[str, np.ndarray]:
        """Name in the file -> this step's row."""
        named = {f"images.{name}": image for name, image in self.images.items()}
        return {**named, "state": self.state, "actions": self.actions}

    @property
    def nbytes(self) -> int:
        """Of the arrays."""
        return sum(array.nbytes for array in self.arrays().values())


class Steps:
    """Steps of one episode, of one shape, that will be one file.

    Rows are filled in one by one: to stack a whole file of images at once would hold up
    Python, and with it inference, for tens of milliseconds.
    """

    def __init__(self, first: Step, capacity: int) -> None:
        """Room for `capacity` steps like `first`, which is not added yet."""
        self._first, self._capacity = first, capacity
        self._arrays = {
            name: np.empty((capacity, *row.shape), row.dtype)
            for name, row in first.arrays().items()
        }
        self._prompts: list[str] = []
        self._indices: list[int] = []

    def __len__(self) -> int:
        return len(self._indices)

    @property
    def full(self) -> bool:
        """Whether nothing more fits."""
        return len(self) == self._capacity

    @property
    def nbytes(self) -> int:
        """About the size of the file."""
        return sum(array[: len(self)].nbytes for array in self._arrays.values()) + 4096

    def takes(self, step: Step) -> bool:
        """Whether a step can be of this file: same episode and task, same arrays."""
        shapes = {name: row.shape for name, row in step.arrays().items()}
        mine = {name: array.shape[1:] for name, array in self._arrays.items()}
        same = (step.episode, step.task) == (self._first.episode, self._first.task)
        return same and shapes == mine and not self.full

    def add(self, step: Step) -> None:
        """Copy a step that `takes` accepts into the next row."""
        for name, row in step.arrays().items():
            self._arrays[name][len(self)] = row
        self._prompts.append(step.prompt)
        self._indices.append(step.index)

    def write(self, folder: Path) -> Path:
        """Write the file, atomically, and return its path.

        Raises:
            RecordingError: a file of these steps is there already. OSError, PackError.
        """
        path = folder / f"episode-{self._first.episode:06d}-{self._indices[0]:06d}.safetensors"
        if path.exists():
            raise RecordingError(f"{path} exists: number the episodes differently")
        tensors = {name: torch.from_numpy(a[: len(self)]) for name, a in self._arrays.items()}
        metadata = {
            "format": FORMAT_NAME,
            "prompt": json.dumps(self._prompts),
            "episode": str(self._first.episode),
            "step": json.dumps(self._indices),
        }
        if self._first.task is not None:
            metadata["task"] = self._first.task
        write_tensors(path, tensors, metadata)
        return path
