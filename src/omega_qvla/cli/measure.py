"""Measurements that more than one verb takes."""

from __future__ import annotations

from omega_qvla.calibration.samples import ObservationSet
from omega_qvla.evaluation.rollout import noise_seed


def drift_seeds(samples: ObservationSet) -> list[int]:
    """The noise seed of every observation: by its episode and step, so equal for all arms."""
    return [noise_seed(meta.episode, meta.step) for meta in samples.meta]
