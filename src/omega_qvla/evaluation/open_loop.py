"""Drift of the action chunk: same observation, same noise, two policies."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from omega_qvla.errors import ActionError, EvaluationError
from omega_qvla.policies.observation import Observation

if TYPE_CHECKING:
    from omega_qvla.policies.base import Policy


@dataclass(frozen=True)
class Drift:
    """How far action chunks moved, over `count` (observation, noise) pairs.

    cosine_mean, cosine_median, cosine_min: cosine between the flattened chunks.
    channel_nmse:   per action dimension, squared error over the reference's energy.
    worst_channel:  the dimension with the largest `channel_nmse`.
    relative_error: norm of the error over norm of the reference, all chunks together.
    """

    count: int
    cosine_mean: float
    cosine_median: float
    cosine_min: float
    channel_nmse: tuple[float, ...]
    worst_channel: int
    relative_error: float

    def cosine(self) -> dict[str, float]:
        """{"mean", "median", "min"}, as summaries have it."""
        return {"mean": self.cosine_mean, "median": self.cosine_median, "min": self.cosine_min}


def action_drift(
    reference: Policy,
    policy: Policy,
    observations: Sequence[Observation],
    seeds: Sequence[int],
    *,
    batch: int = 8,
) -> Drift:
    """Drift of `policy` against `reference`; see `predict_chunks` and `chunk_drift`."""
    expected = predict_chunks(reference, observations, seeds, batch=batch)
    return chunk_drift(expected, predict_chunks(policy, observations, seeds, batch=batch))


def predict_chunks(
    policy: Policy, observations: Sequence[Observation], seeds: Sequence[int], *, batch: int = 8
) -> np.ndarray:
    """The chunk for each observation, from the noise of its seed.

    Returns:
        float32 [n, action_horizon, action_dim], raw units.

    Raises:
        EvaluationError: no observations, or another number of seeds.
        ActionError: a chunk is not finite.
    """
    import torch

    chunks = []
    for inputs, noise in batches(policy, observations, seeds, batch):
        with torch.inference_mode():
            actions = policy.sample(policy.encode(inputs), noise)
        chunks.append(policy.finish(actions, inputs))
    result = np.concatenate(chunks)
    if not np.isfinite(result).all():
        bad = int(np.flatnonzero(~np.isfinite(result).all(axis=(1, 2)))[0])
        raise ActionError(f"the action chunk of observation {bad} is not finite")
    return result


def batches(
    policy: Policy, observations: Sequence[Observation], seeds: Sequence[int], size: int
) -> Iterator[tuple[Any, Any]]:
    """(prepared inputs, noise) of up to `size` observations at a time.

    Every observation keeps the noise of its own seed, whatever the batch.
    """
    import torch

    if not observations or len(observations) != len(seeds):
        raise EvaluationError(f"{len(observations)} observations with {len(seeds)} noise seeds")
    for start in range(0, len(observations), size):
        part = slice(start, start + size)
        noise = torch.cat([policy.draw_noise(1, seed) for seed in seeds[part]])
        yield policy.prepare(observations[part]), noise


def chunk_drift(reference: np.ndarray, chunks: np.ndarray) -> Drift:
    """Compare chunks [n, horizon, action_dim] with the reference's, pair by pair.

    A channel (or chunk) that the reference leaves at zero counts as NMSE (1 - cosine)
    0 where it was met exactly and as infinite (1) otherwise.

    Raises:
        EvaluationError: the shapes differ or nothing is there.
    """
    ref = np.asarray(reference, np.float64)
    out = np.asarray(chunks, np.float64)
    if ref.shape != out.shape or ref.ndim != 3 or ref.size == 0:
        raise EvaluationError(f"cannot compare chunks of shapes {ref.shape} and {out.shape}")
    cosine = chunk_cosines(ref, out)
    channels = tuple(
        _ratio(error, energy)
        for error, energy in zip(
            np.sum((out - ref) ** 2, axis=(0, 1)), np.sum(ref**2, axis=(0, 1)), strict=True
        )
    )
    return Drift(
        count=len(ref),
        cosine_mean=float(cosine.mean()),
        cosine_median=float(np.median(cosine)),
        cosine_min=float(cosine.min()),
        channel_nmse=channels,
        worst_channel=int(np.argmax(channels)),
        relative_error=float(np.sqrt(_ratio(np.sum((out - ref) ** 2), np.sum(ref**2)))),
    )


def chunk_cosines(reference: np.ndarray, chunks: np.ndarray) -> np.ndarray:
    """Cosine of each flattened chunk [n, horizon, action_dim] with the reference's, float64 [n].

    1 where both are zero, 0 where only one of them is.
    """
    ref = np.asarray(reference, np.float64).reshape(len(reference), -1)
    out = np.asarray(chunks, np.float64).reshape(len(chunks), -1)
    norms = np.linalg.norm(ref, axis=1) * np.linalg.norm(out, axis=1)
    equal = np.all(ref == out, axis=1).astype(np.float64)
    ratio = np.sum(ref * out, axis=1) / np.where(norms > 0, norms, 1.0)
    cosine: np.ndarray = np.clip(np.where(norms > 0, ratio, equal), -1, 1)
    return cosine


def _ratio(error: float, energy: float) -> float:
    if energy > 0:
        return float(error / energy)
    return 0.0 if error == 0 else float("inf")
