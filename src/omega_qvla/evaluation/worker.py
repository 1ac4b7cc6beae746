"""The process that plays episodes: loads an arm once, keeps its simulators."""

from __future__ import annotations

import contextlib
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from omega_qvla.evaluation.plan import Plan, resolve
from omega_qvla.evaluation.policies import load_policy
from omega_qvla.evaluation.records import Arm, ArmKey, Episode, EpisodeRecord, Trace
from omega_qvla.evaluation.rollout import run_episode

Loader = Callable[[Arm], Any]
#: Simulators that a player keeps: LIBERO's take some 700 MB each.
MAX_ENVS = 3


@dataclass(frozen=True)
class Job:
    """One episode of one arm. trace: where to write its trace with frames, or None."""

    arm: Arm
    episode: Episode
    trace: Path | None = None

    def __str__(self) -> str:
        return f"{self.arm.key} on {self.episode.task}, seed {self.episode.seed}"


@dataclass(frozen=True)
class Failure:
    """A job raised: the error in one line, and where it came from."""

    summary: str
    traceback: str

    @classmethod
    def of(cls, error: Exception) -> Failure:
        """Of the exception that is being handled."""
        return cls(f"{type(error).__name__}: {error}", traceback.format_exc())


class Player:
    """Plays jobs one after another with what it has loaded."""

    def __init__(self, plan: Plan, device: str | None = None, load: Loader | None = None) -> None:
        """
        Args:
            device: where this player's policies run; None: where their arms say.
            load: turns an arm into a policy; None: as the plan says.
        """
        self._plan, self._device = plan, device
        self._load = load or (lambda arm: load_policy(arm, plan.env, plan.loader))
        self._make_env = resolve(plan.env)
        self._envs: dict[str, Any] = {}
        self._loaded: tuple[ArmKey, Any] | None = None

    def play(self, job: Job) -> EpisodeRecord:
        """Play one job; its trace, if wanted, is on the disk when this returns."""
        record, trace = self.run(job)
        if trace is not None and job.trace is not None:
            trace.save(job.trace)
        return record

    def run(self, job: Job) -> tuple[EpisodeRecord, Trace | None]:
        """Play one job; its trace if one is wanted."""
        record, trace = run_episode(
            self._policy(job.arm),
            self._env(job.episode.task),
            job.arm,
            job.episode,
            self._plan.protocol,
            record_frames=job.trace is not None,
        )
        return record, None if job.trace is None else trace

    def close(self) -> None:
        """Free the simulators."""
        for env in self._envs.values():
            env.close()
        self._envs.clear()

    def _policy(self, arm: Arm) -> Any:
        # One at a time: jobs come sorted by arm, and a real policy fills the memory.
        if self._loaded is None or self._loaded[0] != arm.key:
            self._loaded = None
            placed = arm if self._device is None else replace(arm, device=self._device)
            self._loaded = (arm.key, self._load(placed))
        return self._loaded[1]

    def _env(self, task: str) -> Any:
        env = self._envs.pop(task, None)
        while env is None and len(self._envs) >= MAX_ENVS:
            self._envs.pop(next(iter(self._envs))).close()
        # Put in last place: the first is the one that was not used for longest.
        self._envs[task] = self._make_env(task, **self._plan.env_options) if env is None else env
        return self._envs[task]


@contextlib.contextmanager
def one_thread() -> Iterator[None]:
    """torch on one thread, as in every executor: parallelism is one process per core, and
    other threads would add numbers up in another order."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def work(connection: Connection, plan: Plan, device: str | None = None) -> None:
    """Main function of a worker process: answer each job until the pipe closes."""
    with one_thread():
        _work(connection, plan, device)


def _work(connection: Connection, plan: Plan, device: str | None) -> None:
    player: Player | None = None
    while True:
        try:
            job = connection.recv()
        except EOFError:
            break
        answer: EpisodeRecord | Failure
        try:
            player = player or Player(plan, device)
            answer = player.play(job)
        except Exception as error:  # sent to the parent, which raises it
            answer = Failure.of(error)
        try:
            connection.send(answer)
        except BrokenPipeError:  # the parent was killed; it will ask for the episode again
            break
    if player is not None:
        player.close()
