"""What an evaluation needs from a simulator, and nothing else."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np

from omega_qvla.policies.observation import Observation


@dataclass(frozen=True)
class StepResult:
    """Outcome of one control step.

    success: the task is fulfilled at this step.
    done:    the episode is over: success, or `max_steps` steps taken.
    """

    success: bool
    done: bool


class Env(Protocol):
    """One task in one simulator, stepped by one process.

    Stepping and observing are apart on purpose: a policy that executes a chunk
    of ten actions needs one observation in ten, and rendering is what costs.

    Two more are used where a class has them. `reset_state(seed) -> None` is `reset` without
    rendering. The classmethod `fingerprint(**options)` says what the results of an environment
    with these options depend on, JSON-ready, without making a simulator.
    """

    @property
    def action_dim(self) -> int:
        """Length of an action; its entries lie in [-1, 1]."""
        ...

    @property
    def state_dim(self) -> int:
        """Length of `Observation.state`."""
        ...

    @property
    def cameras(self) -> tuple[str, ...]:
        """Keys of `Observation.images`."""
        ...

    @property
    def max_steps(self) -> int:
        """Steps after which an episode counts as failed."""
        ...

    def reset(self, seed: int) -> Observation:
        """Start the episode that `seed` determines, the same one in every process."""
        ...

    def step(self, action: np.ndarray) -> StepResult:
        """Execute one action, float [action_dim], clipped to [-1, 1]."""
        ...

    def observe(self) -> Observation:
        """Render the cameras and read the state as they are now."""
        ...

    def frame(self, size: int) -> np.ndarray:
        """A picture for people, uint8 [size, size, 3]; the policy never sees it."""
        ...

    def close(self) -> None:
        """Free the renderer. The environment cannot be used afterwards."""
        ...
