"""The two kinds of Ray actors: one has a policy, the other plays episodes with it."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import numpy as np

from omega_qvla.errors import ActionError, EvaluationError
from omega_qvla.evaluation.plan import Plan
from omega_qvla.evaluation.policies import arm_fingerprint, is_local, load_policy
from omega_qvla.evaluation.records import Arm, EpisodeRecord, Trace
from omega_qvla.evaluation.results import differences
from omega_qvla.evaluation.worker import Failure, Job, Player, one_thread
from omega_qvla.policies.observation import Observation


@dataclass(frozen=True)
class BadAction:
    """The policy's `ActionError`, as a value: the episode has failed, nothing is broken."""

    reason: str


@dataclass(frozen=True)
class PolicyLost:
    """The policy's actor died under an episode."""

    reason: str


class PolicyLostError(EvaluationError):
    """Raised through an episode whose policy's actor died; the episode is played again."""


class PolicyWorker:
    """Holds one policy for the episodes of many simulators.

    Methods return failures as values: Ray would wrap exceptions in its own.
    """

    def __init__(self, plan: Plan, arm: Arm, fingerprint: Mapping[str, str]) -> None:
        """`fingerprint`: the arm's as the driver sees it."""
        self._plan, self._arm, self._fingerprint = plan, arm, fingerprint
        self._policy: Any = None
        self._threads = ExitStack()  # left open: it ends with the process

    def ready(self) -> Failure | None:
        """Load; None once the policy can act.

        The files behind the arm must be those of the machine that started the evaluation,
        at the same paths: a checkpoint of the same name elsewhere is refused.
        """
        try:
            self._threads.enter_context(one_thread())
            here = arm_fingerprint(self._arm, self._plan.env, {})
            other = differences(self._fingerprint, here)
            if other:
                raise EvaluationError(
                    f"arm {self._arm.key} is not the same on this machine: {'; '.join(other)}"
                )
            self._policy = load_policy(self._arm, self._plan.env, self._plan.loader)
        except Exception as error:
            return Failure.of(error)
        return None

    def infer(
        self, observation: Observation, options: Mapping[str, int]
    ) -> np.ndarray | BadAction | Failure:
        """One chunk, float32 [H, action_dim]. `options`: seed, perhaps num_steps."""
        try:
            chunk: np.ndarray = self._policy.infer(observation, **options)
        except ActionError as error:
            return BadAction(str(error))
        except Exception as error:
            return Failure.of(error)
        return chunk


class RemoteActor:
    """A policy that asks a `PolicyWorker`, as `run_episode` wants it."""

    def __init__(self) -> None:
        self.handle: Any = None

    def infer(self, observation: Observation, **options: int) -> np.ndarray:
        """One chunk. `options`: seed, perhaps num_steps.

        Raises:
            ActionError: the policy produced a non-finite action.
            PolicyLostError: its actor died.
            EvaluationError: the policy raised.
        """
        import ray

        try:
            answer = ray.get(self.handle.infer.remote(observation, options))
        except ray.exceptions.RayError as error:
            raise PolicyLostError(f"{type(error).__name__}: {error}".splitlines()[0]) from error
        if isinstance(answer, BadAction):
            raise ActionError(answer.reason)
        if isinstance(answer, Failure):
            raise EvaluationError(f"{answer.summary}\n{answer.traceback}")
        chunk: np.ndarray = answer
        return chunk


class EnvWorker:
    """Plays episodes: has the simulators, asks a policy's actor for actions."""

    def __init__(self, plan: Plan, settings: Mapping[str, Any]) -> None:
        """`settings`: the plan's as the driver sees them."""
        self._plan, self._settings = plan, settings
        self._remote = RemoteActor()
        self._player: Player | None = None
        self._threads = ExitStack()

    def ready(self) -> Failure | None:
        """None if this machine plays what the driver's would: same versions, same assets."""
        try:
            self._threads.enter_context(one_thread())
            other = differences(self._settings, self._plan.settings())
            if other:
                raise EvaluationError(f"this machine differs from the driver's: {'; '.join(other)}")
            self._player = Player(self._plan, load=self._load)
        except Exception as error:
            return Failure.of(error)
        return None

    def play(
        self, job: Job, policy: Any
    ) -> tuple[EpisodeRecord, Trace | None] | Failure | PolicyLost:
        """Play one job; `policy` is the handle of a `PolicyWorker`, None for a local arm."""
        self._remote.handle = policy
        try:
            assert self._player is not None
            return self._player.run(job)
        except PolicyLostError as error:
            return PolicyLost(str(error))
        except Exception as error:
            return Failure.of(error)

    def _load(self, arm: Arm) -> Any:
        if is_local(arm):
            return load_policy(arm, self._plan.env, self._plan.loader)
        return self._remote
