"""What several tests calibrate the tiny policies with."""

from __future__ import annotations

from omega_qvla.calibration import ObservationSet, SampleMeta
from omega_qvla.config import preset
from omega_qvla.policies.base import Policy
from omega_qvla.quantize import plan
from policies.tiny import tiny_observation


def tiny_samples(count: int = 3) -> ObservationSet:
    """Random observations, each of its own episode."""
    observations = tuple(tiny_observation(i) for i in range(count))
    return ObservationSet(observations, tuple(SampleMeta(i, 4, "t") for i in range(count)), "tiny")


def all_targets(policy: Policy) -> list[str]:
    """Every layer that a recipe quantizes by default."""
    return [job.name for job in plan(policy, preset("omega"), policy.num_steps)]
