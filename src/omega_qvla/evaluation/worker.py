"""The process that plays episodes: loads an arm once, keeps its simulators."""

from __future__ import annotations

import traceback
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from omega_qvla.evaluation.plan import Plan, resolve
from omega_qvla.evaluation.records import Arm, ArmKey, Episode, EpisodeRecord
from omega_qvla.evaluation.rollout import run_episode


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


class Player:
    """Plays jobs one after another with what it has loaded."""

    def __init__(self, plan: Plan) -> None:
        self._plan = plan
        self._load, self._make_env = resolve(plan.loader), resolve(plan.env)
        self._envs: dict[str, Any] = {}
        self._loaded: tuple[ArmKey, Any] | None = None

    def play(self, job: Job) -> EpisodeRecord:
        """Play one job; its trace, if wanted, is on the disk when this returns."""
        env = self._env(job.episode.task)
        record, trace = run_episode(
            self._policy(job.arm),
            env,
            job.arm,
            job.episode,
            self._plan.protocol,
            record_frames=job.trace is not None,
        )
        if job.trace is not None:
            trace.save(job.trace)
        return record

    def close(self) -> None:
        """Free the simulators."""
        for env in self._envs.values():
            env.close()
        self._envs.clear()

    def _policy(self, arm: Arm) -> Any:
        # One at a time: jobs come sorted by arm, and a real policy fills the memory.
        if self._loaded is None or self._loaded[0] != arm.key:
            self._loaded = None
            self._loaded = (arm.key, self._load(arm))
        return self._loaded[1]

    def _env(self, task: str) -> Any:
        if task not in self._envs:
            self._envs[task] = self._make_env(task, **self._plan.env_options)
        return self._envs[task]


def work(connection: Connection, plan: Plan) -> None:
    """Main function of a worker process: answer each job until the pipe closes."""
    import torch

    torch.set_num_threads(1)  # parallelism is one process per core
    player: Player | None = None
    while True:
        try:
            job = connection.recv()
        except EOFError:
            break
        answer: EpisodeRecord | Failure
        try:
            player = player or Player(plan)
            answer = player.play(job)
        except Exception as error:  # sent to the parent, which raises it
            summary = f"{type(error).__name__}: {error}"
            answer = Failure(summary, traceback.format_exc())
        connection.send(answer)
    if player is not None:
        player.close()
