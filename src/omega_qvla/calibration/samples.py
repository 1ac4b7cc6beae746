"""Observation sets: what a policy is calibrated on and what its drift is measured on."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from omega_qvla.errors import CalibrationError
from omega_qvla.pack.files import (
    check_replaceable,
    read_header,
    tensor_bytes,
    why_not_written,
    write_tensors,
)
from omega_qvla.pack.reader import load_tensors
from omega_qvla.policies.observation import Observation

FORMAT_NAME = "omega-qvla observations"
#: The published calibration uses ten observations.
DEFAULT_SAMPLES = 10
_GOLDEN = (5**0.5 - 1) / 2


@dataclass(frozen=True)
class SampleMeta:
    """Where an observation comes from: episode id, step within it, task name."""

    episode: int
    step: int
    task: str = ""


@dataclass(frozen=True)
class ObservationSet:
    """Observations with their origin; `source` says in words where they were recorded."""

    observations: tuple[Observation, ...]
    meta: tuple[SampleMeta, ...]
    source: str = ""

    def __post_init__(self) -> None:
        if len(self.observations) != len(self.meta):
            raise CalibrationError(
                f"{len(self.observations)} observations with {len(self.meta)} records of origin"
            )

    def __len__(self) -> int:
        return len(self.observations)

    def __iter__(self) -> Iterator[Observation]:
        return iter(self.observations)

    def take(self, indices: Sequence[int]) -> ObservationSet:
        """The observations at `indices`, in that order."""
        return ObservationSet(
            tuple(self.observations[i] for i in indices),
            tuple(self.meta[i] for i in indices),
            self.source,
        )

    def digest(self) -> str:
        """sha256 over every image, state, prompt and origin, in order."""
        tensors, meta = _pack(self)
        digest = hashlib.sha256(json.dumps(meta, sort_keys=True).encode())
        for name in sorted(tensors):
            digest.update(name.encode())
            digest.update(tensor_bytes(tensors[name]))
        return digest.hexdigest()


def write_observations(
    path: str | os.PathLike[str],
    observations: Sequence[Observation],
    meta: Sequence[SampleMeta],
    source: str = "",
) -> Path:
    """Write one safetensors file, atomically.

    It holds `images.<camera>` uint8 [n, H, W, 3], `state` float32 [n, d], and prompts and
    origins as JSON metadata.

    Raises:
        CalibrationError: no observations, or they differ in cameras, image or state size; the
            file cannot be written, or something else than observations is there.
    """
    check_replaceable(Path(path), FORMAT_NAME, CalibrationError)
    tensors, plain = _pack(ObservationSet(tuple(observations), tuple(meta), source))
    metadata = {"format": FORMAT_NAME, "samples": json.dumps(plain, sort_keys=True)}
    try:
        write_tensors(Path(path), tensors, metadata)
    except OSError as error:
        raise CalibrationError(
            f"{os.fspath(path)}: cannot be written: {why_not_written(error)}"
        ) from error
    return Path(path)


def read_observations(path: str | os.PathLike[str]) -> ObservationSet:
    """Read what `write_observations` wrote.

    Raises:
        CalibrationError: no such file, truncated, or not a file of observations.
    """
    path = Path(path)
    header = read_header(path, CalibrationError)
    if header.metadata.get("format") != FORMAT_NAME:
        raise CalibrationError(f"{path}: not a file of observations")
    tensors = load_tensors(path, header.entries, CalibrationError)
    try:
        plain = json.loads(header.metadata["samples"])
        arrays = {name: tensor.numpy() for name, tensor in tensors.items()}
        state = arrays.pop("state")
        observations = tuple(
            Observation(
                images={name.removeprefix("images."): a[i] for name, a in arrays.items()},
                state=state[i],
                prompt=prompt,
            )
            for i, prompt in enumerate(plain["prompts"])
        )
        meta = tuple(SampleMeta(*origin) for origin in plain["origins"])
        lengths = {len(array) for array in (state, *arrays.values())}
        if lengths != {len(meta)} or len(meta) != len(observations) or not meta:
            raise ValueError(f"{len(meta)} origins for arrays of {sorted(lengths)}")
        return ObservationSet(observations, meta, str(plain["source"]))
    except (KeyError, IndexError, TypeError, ValueError) as error:
        raise CalibrationError(f"{path}: a damaged file of observations: {error!r}") from error


def _pack(samples: ObservationSet) -> tuple[dict[str, Tensor], dict[str, Any]]:
    if not len(samples):
        raise CalibrationError("a set of observations needs at least one")
    first = samples.observations[0]
    tensors: dict[str, Tensor] = {}
    try:
        for camera in sorted(first.images):
            stacked = np.stack([o.images[camera] for o in samples])
            tensors[f"images.{camera}"] = torch.from_numpy(stacked)
        states = np.stack([np.asarray(o.state, dtype=np.float32) for o in samples])
    except (KeyError, ValueError) as error:
        raise CalibrationError(
            f"observations of one set must agree in cameras and sizes: {error}"
        ) from error
    for observation in samples:
        if set(observation.images) != set(first.images):
            raise CalibrationError(
                f"observations of one set must have the same cameras: {sorted(first.images)} "
                f"against {sorted(observation.images)}"
            )
    tensors["state"] = torch.from_numpy(states)
    plain = {
        "prompts": [o.prompt for o in samples],
        "origins": [[m.episode, m.step, m.task] for m in samples.meta],
        "source": samples.source,
    }
    return tensors, plain


def select_samples(
    samples: ObservationSet, n: int = DEFAULT_SAMPLES, seed: int = 0
) -> ObservationSet:
    """Choose `n` observations, balanced over tasks, then episodes, then time; see `pick`.

    Raises:
        CalibrationError: fewer than `n` observations, or n < 1.
    """
    return samples.take(pick(samples.meta, n, seed))


def pick(
    meta: Sequence[SampleMeta],
    n: int = DEFAULT_SAMPLES,
    seed: int = 0,
    among: Sequence[int] | None = None,
) -> list[int]:
    """Indices of `n` steps of `meta`, looking at their origins alone.

    Every task gets its share (to within one), every episode of a task likewise, and within an
    episode the picks are spread over its length with a seeded offset. Where there are more
    tasks than picks, the seed chooses among the tasks. The result is ordered by task, episode
    and step, so equal arguments give equal sets, and a larger `n` contains a smaller one.

    Args:
        among: choose from these indices only (default: all).

    Raises:
        CalibrationError: fewer than `n` steps, or n < 1.
    """
    chosen = range(len(meta)) if among is None else among
    if not 1 <= n <= len(chosen):
        raise CalibrationError(f"cannot choose {n} observations out of {len(chosen)}")
    rng = np.random.default_rng(seed)
    tasks = [
        _interleave(_picking_orders(list(episodes.values()), rng))
        for episodes in _by_task(meta, chosen).values()
    ]
    # A stream of its own: with a share for every task, the order of tasks decides nothing.
    order = np.random.default_rng([seed, len(tasks)]).permutation(len(tasks))
    return _in_order(meta, _interleave([tasks[task] for task in order])[:n])


def split(
    samples: ObservationSet, held_out: float = 0.5, seed: int = 0
) -> tuple[ObservationSet, ObservationSet]:
    """Part a set into (calibration, held-out) that share no episode; see `part`."""
    kept, held = part(samples.meta, held_out, seed)
    return samples.take(kept), samples.take(held)


def part(
    meta: Sequence[SampleMeta], held_out: float = 0.5, seed: int = 0
) -> tuple[list[int], list[int]]:
    """Indices of `meta` for (calibration, held-out), which share no episode.

    Of every task, the fraction `held_out` of its episodes (at least one, never all) is held
    out, chosen by `seed`. Tasks with a single episode are treated as one task together; if
    there is only one such task beside others, its episode is for calibration.

    Raises:
        CalibrationError: there is a single episode, or the fraction is not in (0, 1).
    """
    if not 0 < held_out < 1:
        raise CalibrationError(f"the held-out fraction must lie in (0, 1), not {held_out}")
    rng = np.random.default_rng(seed)
    tasks = {task: list(found.values()) for task, found in _by_task(meta, range(len(meta))).items()}
    groups = [episodes for episodes in tasks.values() if len(episodes) > 1]
    single = [episodes[0] for episodes in tasks.values() if len(episodes) == 1]
    if len(single) == 1 and not groups:
        (task,) = tasks
        raise CalibrationError(
            f"task {task!r} has one episode; splitting needs two or more (or none held out)"
        )
    if single:
        groups.append(single)
    parts: tuple[list[int], list[int]] = ([], [])
    for episodes in groups:
        count = min(max(round(held_out * len(episodes)), 1), len(episodes) - 1)
        for rank, episode in enumerate(rng.permutation(len(episodes))):
            parts[rank < count].extend(episodes[episode])
    return _in_order(meta, parts[0]), _in_order(meta, parts[1])


def _by_task(meta: Sequence[SampleMeta], indices: Iterable[int]) -> dict[str, dict[int, list[int]]]:
    """Task -> episode -> indices by step; tasks and episodes in sorted order."""
    tasks: dict[str, dict[int, list[int]]] = {}
    for index in _in_order(meta, indices):
        tasks.setdefault(meta[index].task, {}).setdefault(meta[index].episode, []).append(index)
    return tasks


def _in_order(meta: Sequence[SampleMeta], indices: Iterable[int]) -> list[int]:
    def key(index: int) -> tuple[str, int, int, int]:
        origin = meta[index]
        return origin.task, origin.episode, origin.step, index

    return sorted(indices, key=key)


def _picking_orders(episodes: list[list[int]], rng: np.random.Generator) -> list[list[int]]:
    """Episodes in random order, each as an order whose every prefix is spread over its length."""
    orders = []
    for episode in rng.permutation(len(episodes)):
        indices = episodes[episode]
        # Indices whose multiple of the golden ratio has a small fraction lie evenly apart.
        fractions = (rng.random() + _GOLDEN * np.arange(len(indices))) % 1.0
        orders.append([indices[i] for i in np.argsort(fractions, kind="stable")])
    return orders


def _interleave(queues: list[list[int]]) -> list[int]:
    """First of every queue, second of every queue, ..."""
    longest = max(len(queue) for queue in queues)
    return [queue[turn] for turn in range(longest) for queue in queues if turn < len(queue)]
