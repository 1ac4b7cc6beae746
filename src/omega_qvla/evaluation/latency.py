"""How long a policy takes, arm beside arm: the arms take turns, so that they share the weather.

A turn is two inferences, of which the second counts: a policy that runs by itself finds its
weights in the caches, not those of the arm before it.

Stages of one inference: `vision` (the image encoder), `prefix` (the rest of the backbone),
`step` (one denoising step, the mean over the loop), `chunk` (everything, images to raw actions).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn

from omega_qvla.evaluation.bench_arms import vision_of
from omega_qvla.policies.base import Policy
from omega_qvla.policies.observation import Observation

STAGES = ("vision", "prefix", "step", "chunk")
Tick = Callable[[int, int], None]


@dataclass(frozen=True)
class Latency:
    """Milliseconds over all rounds; spread: half the distance of the quartiles over p50."""

    p50: float
    p95: float
    spread: float

    @classmethod
    def of(cls, seconds: list[float]) -> Latency:
        """From the seconds of each round."""
        low, middle, high, rare = np.percentile(np.asarray(seconds) * 1e3, [25, 50, 75, 95])
        return cls(float(middle), float(rare), float((high - low) / 2 / middle))


def _no_tick(done: int, total: int) -> None:
    pass


def alternate(
    calls: Mapping[str, Callable[[], Any]], rounds: int, warm: int = 2, tick: Tick = _no_tick
) -> dict[str, Latency]:
    """Time every call once a round, `rounds` times, after `warm` rounds that do not count."""
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for done in range(-warm, rounds):
        for name, call in calls.items():
            call()
            start = time.perf_counter()
            call()
            took = time.perf_counter() - start
            if done >= 0:
                seconds[name].append(took)
        tick(max(0, done + 1), rounds)
    return {name: Latency.of(values) for name, values in seconds.items()}


def measure(
    arms: Mapping[str, Policy], observation: Observation, rounds: int, tick: Tick = _no_tick
) -> dict[str, dict[str, Latency]]:
    """arm -> stage -> latency of chunks for one observation, after two rounds to warm up.

    All arms run on the CPU or all on one CUDA device, with the same noise.
    """
    seconds: dict[str, dict[str, list[float]]] = {
        name: {stage: [] for stage in STAGES} for name in arms
    }
    for done in range(-2, rounds):
        for name, policy in arms.items():
            _stages(policy, observation)
            took = _stages(policy, observation)
            took["vision"] = _vision(policy, observation)
            took["prefix"] -= took["vision"]
            if done >= 0:
                for stage, value in took.items():
                    seconds[name][stage].append(value)
        tick(max(0, done + 1), rounds)
    return {
        name: {stage: Latency.of(values) for stage, values in stages.items()}
        for name, stages in seconds.items()
    }


class _Watch:
    """Seconds inside one module's forward, while it is open."""

    def __init__(self, module: nn.Module, policy: Policy) -> None:
        self.seconds, self._start, self._policy = 0.0, 0.0, policy
        self._handles = [
            module.register_forward_pre_hook(self._begin),
            module.register_forward_hook(self._end),
        ]

    def _begin(self, *_: object) -> None:
        self._start = _now(self._policy)

    def _end(self, *_: object) -> None:
        self.seconds += _now(self._policy) - self._start

    def close(self) -> None:
        for handle in self._handles:
            handle.remove()


@torch.inference_mode()
def _stages(policy: Policy, observation: Observation) -> dict[str, float]:
    """Seconds of each stage of one inference; `prefix` with the image encoder in it."""
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
        "prefix": times[2] - times[1],
        "step": (times[3] - times[2]) / policy.num_steps,
        "chunk": end - times[0],
    }


@torch.inference_mode()
def _vision(policy: Policy, observation: Observation) -> float:
    """Seconds of the image encoder, in an inference of its own: what is watched is not
    repeated from a list (`modules.captured`)."""
    inputs = policy.prepare([observation])
    watch = _Watch(vision_of(policy), policy)
    policy.encode(inputs)
    watch.close()
    return watch.seconds


def _now(policy: Policy) -> float:
    if policy.device.type == "cuda":
        torch.cuda.synchronize(policy.device)
    return time.perf_counter()
