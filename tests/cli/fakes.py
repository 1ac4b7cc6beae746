"""A simulator for the tiny policies; importable by worker processes."""

from __future__ import annotations

import numpy as np

from omega_qvla.envs.base import StepResult
from omega_qvla.policies.observation import Observation
from policies.tiny import ACTION_DIM, CAMERAS, IMAGE_SIZE, PROMPTS

TASKS = ("push", "pull")


class DriftEnv:
    """Solved once the executed actions, summed, have carried the point far enough."""

    action_dim, state_dim, cameras, max_steps = ACTION_DIM, 4, CAMERAS, 20

    def __init__(self, task: str) -> None:
        self.prompt = PROMPTS[TASKS.index(task)]

    def reset(self, seed: int) -> Observation:
        self.rng = np.random.default_rng(seed)
        self.position, self.steps = self.rng.normal(size=ACTION_DIM) * 0.1, 0
        return self.observe()

    def observe(self) -> Observation:
        shape = (IMAGE_SIZE, IMAGE_SIZE, 3)
        images = {name: self.rng.integers(0, 256, shape, dtype=np.uint8) for name in CAMERAS}
        return Observation(images, self.position.astype(np.float32), self.prompt)

    def step(self, action: np.ndarray) -> StepResult:
        self.position = self.position + 0.1 * action
        self.steps += 1
        success = bool(np.abs(self.position).max() > 0.6)
        return StepResult(success, success or self.steps >= self.max_steps)

    def frame(self, size: int) -> np.ndarray:
        return np.full((size, size, 3), 10 * self.steps, np.uint8)

    def close(self) -> None:
        pass


def collect(task: str, seed: int) -> list[tuple[int, Observation]]:
    """Random motion, looked at every second step."""
    env = DriftEnv(task)
    found = [(0, env.reset(seed))]
    for step in range(2, 13, 2):
        for _ in range(2):
            env.step(env.rng.uniform(-1, 1, ACTION_DIM))
        found.append((step, env.observe()))
    return found
