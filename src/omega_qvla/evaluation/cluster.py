"""Episodes on several machines: Ray actors with policies, Ray actors with simulators."""

from __future__ import annotations

import importlib
import itertools
import math
import os
import time
from collections.abc import Generator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from omega_qvla.errors import BackendError, ConfigError, EvaluationError
from omega_qvla.evaluation.cluster_worker import EnvWorker, PolicyLost, PolicyWorker
from omega_qvla.evaluation.plan import Plan
from omega_qvla.evaluation.policies import is_local
from omega_qvla.evaluation.records import Arm, EpisodeRecord
from omega_qvla.evaluation.schedule import Schedule
from omega_qvla.evaluation.worker import Failure, Job


@dataclass(frozen=True)
class RayCluster:
    """Policies and simulators as actors of a Ray cluster; any of them may be lost.

    Arms are played one after another. Each has `policies` actors that hold it, and every
    simulator asks one of them for its actions. An actor that dies, with its machine or
    alone, is started again wherever there is room, and its episodes are played again.

    address:   of a running cluster ("auto": the one this machine belongs to); None starts
               Ray on this machine, and stops it afterwards.
    workers:   actors with simulators, one CPU each.
    policies:  actors with the policy; they take no CPU of Ray's count, so leave it one each.
    gpus:      GPUs of each of them, may be a fraction; the arms' device is then "cuda".
    timeout_s: an episode that takes longer counts as a dead worker.
    startup_s: how long to wait while no actor can be placed anywhere.
    retries:   times that an episode is played again after one of its actors was lost, and
               that all actors may die on starting before the run ends.
    """

    address: str | None = None
    workers: int = 2
    policies: int = 1
    gpus: float = 0.0
    timeout_s: float = 900.0
    startup_s: float = 300.0
    retries: int = 3

    def __post_init__(self) -> None:
        if min(self.workers, self.policies) < 1 or self.gpus < 0 or self.retries < 0:
            raise ConfigError(
                f"a cluster needs workers and policies: {self.workers}, {self.policies}, "
                f"{self.gpus} GPUs, {self.retries} retries"
            )
        if min(self.timeout_s, self.startup_s) <= 0:
            raise ConfigError("time limits must be above 0 s")

    def play(self, plan: Plan, jobs: Sequence[Job]) -> Generator[EpisodeRecord, None, None]:
        """Yield the records of `jobs` as they are finished, in any order.

        Raises:
            BackendError: Ray is not installed, or there is no cluster at `address`.
            EvaluationError: an episode raised; its actors died more than `retries` times; a
                machine has other versions or files; or there is room for no actor.
        """
        if not jobs:
            return
        ray = import_ray()
        started = _connect(ray, self)
        running = _Running(ray, self, plan)
        try:
            schedules = []
            for _, of_arm in itertools.groupby(jobs, key=lambda job: job.arm.key):
                schedules.append((yield from running.play_arm(list(of_arm))))
            for schedule in schedules:  # at the end: an episode given up keeps no arm from playing
                schedule.check()
        finally:
            running.stop()
            if started:
                ray.shutdown()


def import_ray() -> Any:
    """Ray. Raises BackendError where it is not installed."""
    try:
        return importlib.import_module("ray")
    except ImportError as error:
        raise BackendError(
            f"Ray is not installed ({error}): pip install 'omega-qvla[cluster]', or evaluate "
            "with --executor pool"
        ) from error


def _connect(ray: Any, settings: RayCluster) -> bool:
    """Join the cluster, or start one; whether it is ours to shut down."""
    if ray.is_initialized():
        return False
    # Ray reports usage to its makers unless told otherwise before it starts.
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    options: dict[str, Any] = {"log_to_driver": False, "logging_level": "ERROR"}
    if settings.address is None:
        options |= {"address": "local", "num_cpus": settings.workers, "include_dashboard": False}
    else:
        options["address"] = settings.address
    try:
        ray.init(**options)
    except Exception as error:  # Ray has no common class for what can go wrong here
        raise BackendError(
            f"no Ray cluster at {settings.address or 'this machine'} ({error}): start one with "
            "`ray start --head`, or leave the address out"
        ) from error
    return True


@dataclass(eq=False)
class _Actor:
    """An actor, and the call that it has not answered yet."""

    kind: str
    handle: Any
    call: Any
    ready: bool = False
    policy: _Actor | None = None
    deadline: float = math.inf


class _Running:
    """The actors of one evaluation.

    `_moved`: when an actor was last started or got ready; `_stillborn`: how many have died on
    starting since the last one got ready.
    """

    def __init__(self, ray: Any, settings: RayCluster, plan: Plan) -> None:
        self._ray, self._settings, self._plan = ray, settings, plan
        self._expected = plan.settings()
        self._fingerprints: Mapping[str, Mapping[str, str]] = plan.arm_fingerprints()
        self._simulators: list[_Actor] = []
        self._policies: list[_Actor] = []
        self._moved, self._stillborn = time.monotonic(), 0

    def play_arm(self, jobs: list[Job]) -> Generator[EpisodeRecord, None, Schedule]:
        arm = jobs[0].arm
        schedule = Schedule(jobs, self._settings.retries)
        self._moved = time.monotonic()
        for _ in range(min(self._settings.workers, len(jobs)) - len(self._simulators)):
            self._simulators.append(self._simulator())
        if not is_local(arm):
            count = min(self._settings.policies, len(self._simulators))
            self._policies = [self._policy(arm) for _ in range(count)]
        while schedule.unfinished:
            self._hand_out(schedule, is_local(arm))
            for actor in self._wait(schedule):
                answer = self._answer(actor)
                if isinstance(answer, _Lost):
                    self._lost(actor, answer.reason, schedule, arm)
                elif not actor.ready:
                    actor.ready, self._moved, self._stillborn = True, time.monotonic(), 0
                elif isinstance(answer, PolicyLost):
                    self._policy_lost(actor, answer, schedule, arm)
                else:
                    yield _finish(schedule.done(actor), answer)
        self._stop(self._policies)
        return schedule

    def stop(self) -> None:
        self._stop(self._policies)
        self._stop(self._simulators)

    def _stop(self, actors: list[_Actor]) -> None:
        for actor in actors:
            self._ray.kill(actor.handle)
        actors.clear()

    def _simulator(self) -> _Actor:
        remote = self._ray.remote(num_cpus=1, max_restarts=0)(EnvWorker)
        handle = remote.remote(self._plan, self._expected)
        return _Actor("simulator", handle, handle.ready.remote())

    def _policy(self, arm: Arm) -> _Actor:
        # No CPU asked for: simulators that hold all that a loss has left would keep it out.
        resources = {"num_cpus": 0, "num_gpus": self._settings.gpus}
        remote = self._ray.remote(**resources, max_restarts=0)(PolicyWorker)
        handle = remote.remote(self._plan, arm, self._fingerprints[str(arm.key)])
        return _Actor("policy", handle, handle.ready.remote())

    def _hand_out(self, schedule: Schedule, local: bool) -> None:
        """Give every idle simulator a job and the policy with the fewest simulators."""
        policies = [policy for policy in self._policies if policy.ready]
        if not (policies or local):
            return
        for actor in self._simulators:
            if not actor.ready or actor.call is not None:
                continue
            job = schedule.next(actor)
            if job is None:
                return
            actor.policy = None if local else min(policies, key=self._load)
            policy = actor.policy and actor.policy.handle
            actor.call = actor.handle.play.remote(job, policy)
            actor.deadline = time.monotonic() + self._settings.timeout_s

    def _load(self, policy: _Actor) -> int:
        return sum(actor.policy is policy and bool(actor.call) for actor in self._simulators)

    def _wait(self, schedule: Schedule) -> list[_Actor]:
        """Actors that answered, died, or ran out of time."""
        calls = {
            actor.call: actor
            for actor in (*self._simulators, *self._policies)
            if actor.call is not None
        }
        playing = any(actor.ready and actor.call is not None for actor in self._simulators)
        limit = self._moved + self._settings.startup_s
        end = min([actor.deadline for actor in calls.values()] + ([] if playing else [limit]))
        patience = min(max(0.0, end - time.monotonic()), 3600.0)
        answered, _ = self._ray.wait(list(calls), num_returns=1, timeout=patience)
        now = time.monotonic()
        if not answered and not playing and now >= limit:
            raise EvaluationError(
                f"for {self._settings.startup_s:.0f} s no machine of the cluster had room for the "
                f"actors that are missing ({schedule.remaining} episodes wait): `ray status` "
                "shows what there is; ask for fewer workers, policies or GPUs"
            )
        return [actor for call, actor in calls.items() if call in answered or now >= actor.deadline]

    def _answer(self, actor: _Actor) -> Any:
        """What the actor returned, or `_Lost`; it has no call any more."""
        call, actor.call, actor.deadline = actor.call, None, math.inf
        try:
            answer = self._ray.get(call, timeout=0)
        except self._ray.exceptions.GetTimeoutError:
            return _Lost(f"no answer within {self._settings.timeout_s:.0f} s")
        except self._ray.exceptions.RayError as error:
            return _Lost(f"{type(error).__name__}: {error}".splitlines()[0])
        if isinstance(answer, Failure) and not actor.ready:
            raise EvaluationError(f"a {actor.kind} of the cluster cannot start: {answer.summary}")
        return answer

    def _lost(self, actor: _Actor, reason: str, schedule: Schedule, arm: Arm) -> None:
        """Start another in its place; the episode that it played comes again."""
        self._ray.kill(actor.handle)
        if not actor.ready:
            self._count_stillborn(actor, reason)
        self._moved = time.monotonic()
        if actor.kind == "policy":
            self._policies[self._policies.index(actor)] = self._policy(arm)
            return
        self._simulators[self._simulators.index(actor)] = self._simulator()
        if actor.ready:
            schedule.lost(actor, reason)

    def _count_stillborn(self, actor: _Actor, reason: str) -> None:
        """A node takes all its actors along; an actor that dies wherever it starts never ends."""
        self._stillborn += 1
        actors = len(self._simulators) + len(self._policies)
        if self._stillborn > self._settings.retries * actors:
            raise EvaluationError(
                f"a {actor.kind} of the cluster dies on starting, {self._stillborn} in a row "
                f"({reason}): out of memory, or a crash in an import or a kernel; its machine's "
                "Ray logs say more, `--executor process` shows it in this process"
            )

    def _policy_lost(self, actor: _Actor, answer: PolicyLost, schedule: Schedule, arm: Arm) -> None:
        """The simulator is well, its policy is not; several simulators may report the same."""
        dead = actor.policy
        if dead in self._policies:
            self._lost(dead, answer.reason, schedule, arm)
        schedule.lost(actor, f"its policy: {answer.reason}")


@dataclass(frozen=True)
class _Lost:
    reason: str


def _finish(job: Job, answer: Any) -> EpisodeRecord:
    """The record; its trace is written here, on the machine that has the results."""
    if isinstance(answer, Failure):
        raise EvaluationError(f"{job}: {answer.summary}\n{answer.traceback}")
    record, trace = answer
    if trace is not None and job.trace is not None:
        trace.save(job.trace)
    result: EpisodeRecord = record
    return result
