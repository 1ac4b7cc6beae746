"""How jerky the executed motion is: third differences, and their ratio between arms."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from omega_qvla.errors import EvaluationError
from omega_qvla.evaluation.records import EpisodeRecord


def jerk(signal: np.ndarray) -> float | None:
    """Root mean square of the third difference of `signal` [steps, dims].

    In units of the signal per step^3 (Euclidean norm over dims, mean over time). None
    for fewer than four steps, which have no third difference.
    """
    values = np.asarray(signal, dtype=np.float64)
    if values.ndim != 2:
        raise EvaluationError(f"jerk needs [steps, dims], got shape {values.shape}")
    if len(values) < 4:
        return None
    third = np.diff(values, n=3, axis=0)
    return float(np.sqrt(np.mean(np.sum(third**2, axis=1))))


def action_jerk(actions: np.ndarray) -> float | None:
    """Jerk of the executed actions [steps, dims] themselves."""
    return jerk(actions)


def path_jerk(actions: np.ndarray) -> float | None:
    """Jerk of the commanded path: the running sum of displacement actions [steps, dims].

    What the arm is asked to follow when actions are displacements, as in Meta-World.
    """
    return jerk(np.cumsum(np.asarray(actions, dtype=np.float64), axis=0))


@dataclass(frozen=True)
class JerkRatio:
    """Jerk of an arm relative to the reference arm's on the same episodes.

    Above 1: the arm moves less smoothly. Both are geometric means over the pairs, so
    that the ratio of A to B is the inverse of that of B to A.
    """

    actions: float
    path: float
    episodes: int


def jerk_ratio(
    reference: Sequence[EpisodeRecord], other: Sequence[EpisodeRecord]
) -> JerkRatio | None:
    """Compare the episodes that both arms played and that are long enough.

    None if there is no such pair (for instance nothing ever moves).
    """
    by_episode = {(record.task, record.seed): record for record in reference}
    logs_actions, logs_path = [], []
    for record in other:
        partner = by_episode.get((record.task, record.seed))
        if partner is None:
            continue
        values = (record.action_jerk, partner.action_jerk, record.path_jerk, partner.path_jerk)
        if not all(values):  # too short (None), or a policy that stands still (0)
            continue
        a, a_ref, p, p_ref = (float(value) for value in values if value)
        logs_actions.append(math.log(a / a_ref))
        logs_path.append(math.log(p / p_ref))
    if not logs_actions:
        return None
    count = len(logs_actions)
    return JerkRatio(math.exp(sum(logs_actions) / count), math.exp(sum(logs_path) / count), count)
