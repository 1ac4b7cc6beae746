"""Policies without a network: they act from the simulator's state, one action a step."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from omega_qvla.errors import EvaluationError

if TYPE_CHECKING:
    from omega_qvla.envs.base import Env
    from omega_qvla.evaluation.records import Arm

#: Keeps the random policy's stream apart from every other use of an episode's seed.
_RANDOM_STREAM = 0x52414E44


class SimulatorPolicy(ABC):
    """Acts without observations: nothing is rendered for it."""

    @abstractmethod
    def begin(self, env: Env, seed: int) -> None:
        """An episode begins: `env` has just been reset to `seed`."""

    @abstractmethod
    def act(self) -> np.ndarray:
        """The next action, float [action_dim]; called once a control step."""


class Oracle(Protocol):
    """What an environment's package offers: a scripted solution, bound to one environment."""

    def begin(self) -> None:
        """An episode begins; everything about the one before is to be forgotten."""
        ...

    def act(self) -> np.ndarray:
        """The next action, float [action_dim]."""
        ...


class OraclePolicy(SimulatorPolicy):
    """Plays an environment's oracle."""

    def __init__(self, make: Callable[[Any], Oracle]) -> None:
        """`make` takes the environment."""
        self._make = make
        self._bound: tuple[Env, Oracle] | None = None

    def begin(self, env: Env, seed: int) -> None:
        """Bind to `env`, unless that was done before."""
        if self._bound is None or self._bound[0] is not env:
            self._bound = (env, self._make(env))
        self._bound[1].begin()

    def act(self) -> np.ndarray:
        """The oracle's action."""
        if self._bound is None:
            raise EvaluationError("the oracle has no environment: call begin first")
        return self._bound[1].act()


class RandomPolicy(SimulatorPolicy):
    """Uniform in [-1, 1], decided by the episode's seed: the floor of every success rate."""

    def __init__(self) -> None:
        self._width = 0
        self._generator = np.random.default_rng()

    def begin(self, env: Env, seed: int) -> None:
        """Start the stream of `seed`."""
        self._width = env.action_dim
        self._generator = np.random.default_rng([_RANDOM_STREAM, seed])

    def act(self) -> np.ndarray:
        """float64 [action_dim]."""
        return self._generator.uniform(-1.0, 1.0, self._width)


def random_policy(arm: Arm) -> RandomPolicy:
    """The policy "random" of an arm."""
    return RandomPolicy()


class _MetaWorldOracle:
    def __init__(self, env: Any) -> None:
        self._env = env

    def begin(self) -> None:
        from omega_qvla.envs.metaworld import scripted_expert

        # Anew for every episode: some of the scripts remember what they did.
        self._act = scripted_expert(self._env.task)

    def act(self) -> np.ndarray:
        return self._act(self._env.raw_observation)


def metaworld_oracle(env: Any) -> Oracle:
    """Meta-World's own scripted policy for the task of `env`, a `MetaWorldEnv`."""
    return _MetaWorldOracle(env)
