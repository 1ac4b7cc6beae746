"""How long a policy takes, arm beside arm: the arms take turns, so that they share the weather.

Stages of one inference: `backbone` (vision and prefix, once per observation), `step` (one
denoising step, the mean over the loop), `chunk` (everything, images to raw actions).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
import torch

from omega_qvla.policies.base import Policy
from omega_qvla.policies.observation import Observation

STAGES = ("backbone", "step", "chunk")


@dataclass(frozen=True)
class Latency:
    """Milliseconds over all rounds."""

    p50: float
    p95: float

    @classmethod
    def of(cls, seconds: list[float]) -> Latency:
        """From the seconds of each round."""
        low, high = np.percentile(np.asarray(seconds) * 1e3, [50, 95])
        return cls(float(low), float(high))


def measure(
    arms: Mapping[str, Policy],
    observation: Observation,
    rounds: int,
    tick: Callable[[int, int], None] = lambda done, total: None,
) -> dict[str, dict[str, Latency]]:
    """arm -> stage -> latency of chunks for one observation, after two rounds to warm up.

    All arms run on the CPU or all on one CUDA device, with the same noise.
    """
    seconds: dict[str, dict[str, list[float]]] = {
        name: {stage: [] for stage in STAGES} for name in arms
    }
    for done in range(-2, rounds):
        for name, policy in arms.items():
            took = _one(policy, observation)
            if done >= 0:
                for stage, value in took.items():
                    seconds[name][stage].append(value)
        tick(max(0, done + 1), rounds)
    return {
        name: {stage: Latency.of(values) for stage, values in stages.items()}
        for name, stages in seconds.items()
    }


@torch.inference_mode()
def _one(policy: Policy, observation: Observation) -> dict[str, float]:
    """Seconds of each stage of one inference."""
    noise = policy.draw_noise(1, seed=0)
    times = [_now(policy)]
    inputs = policy.prepare([observation])
    times.append(_now(policy))
    prefix = policy.encode(inputs)
    times.append(_now(policy))
    actions = policy.sample(prefix, noise)
    times.append(_now(policy))
    policy.finish(actions, inputs)
    end = _now(policy)
    return {
        "backbone": times[2] - times[1],
        "step": (times[3] - times[2]) / policy.num_steps,
        "chunk": end - times[0],
    }


def _now(policy: Policy) -> float:
    if policy.device.type == "cuda":
        torch.cuda.synchronize(policy.device)
    return time.perf_counter()
