"""Episodes in parallel processes of one machine."""

from __future__ import annotations

import contextlib
import multiprocessing
import time
from collections.abc import Generator, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess

from omega_qvla.errors import ConfigError, EvaluationError
from omega_qvla.evaluation.plan import Plan
from omega_qvla.evaluation.records import EpisodeRecord
from omega_qvla.evaluation.schedule import Schedule
from omega_qvla.evaluation.worker import Failure, Job, work


@dataclass(frozen=True)
class ProcessPool:
    """Workers of their own, each with one policy and its simulators.

    workers:   processes.
    devices:   torch devices of the workers in turn, ("cuda:0", "cuda:1") for two GPUs;
               empty: where the arms say. They must be of the arms' kind.
    timeout_s: an episode that takes longer counts as a dead worker.
    retries:   times that an episode is played again after its worker died.
    """

    workers: int = 2
    devices: tuple[str, ...] = ()
    timeout_s: float = 900.0
    retries: int = 1

    def __post_init__(self) -> None:
        if self.workers < 1 or self.timeout_s <= 0 or self.retries < 0:
            raise ConfigError(
                f"a pool needs workers and a time limit: {self.workers}, {self.timeout_s} s, "
                f"{self.retries} retries"
            )

    def play(self, plan: Plan, jobs: Sequence[Job]) -> Generator[EpisodeRecord, None, None]:
        """Yield the records of `jobs` as they are finished, in any order.

        Raises:
            ConfigError: `devices` are not what the arms were set up for.
            EvaluationError: an episode raised, or its workers died more than `retries` times.
        """
        check_devices(plan, self.devices)
        pool = _Running(self, plan, Schedule(jobs, self.retries))
        try:
            yield from pool.run(len(jobs))
        finally:
            pool.stop()


def check_devices(plan: Plan, devices: Sequence[str]) -> None:
    """Raise ConfigError unless every device is of the kind that every arm names.

    The kind is part of an arm's identity (a GPU adds up in another order), the number of
    the device is not.
    """
    for device in devices:
        for arm in plan.arms:
            if device.partition(":")[0] != arm.device.partition(":")[0]:
                raise ConfigError(
                    f"arm {arm.key} is for {arm.device}, the worker's device is {device}: "
                    "give the arm the kind of the devices"
                )


@dataclass(eq=False)
class _Worker:
    process: BaseProcess
    connection: Connection
    device: str | None
    deadline: float = 0.0
    busy: bool = False


class _Running:
    """Workers with a pipe each, so that a death is known to belong to one episode."""

    def __init__(self, settings: ProcessPool, plan: Plan, schedule: Schedule) -> None:
        self._settings, self._plan, self._schedule = settings, plan, schedule
        # spawn: a forked child would inherit the parent's torch threads and GL context.
        self._context = multiprocessing.get_context("spawn")
        self._workers: list[_Worker] = []

    def run(self, jobs: int) -> Generator[EpisodeRecord, None, None]:
        devices = self._settings.devices or (None,)
        for index in range(min(self._settings.workers, jobs)):
            self._workers.append(self._start(devices[index % len(devices)]))
        while self._schedule.unfinished:
            for worker in self._workers:
                if not worker.busy:
                    self._hand_out(worker)
            for worker in self._ready():
                answer = self._receive(worker)
                worker.busy = False
                if answer is None:
                    self._replace(worker)
                    continue
                job = self._schedule.done(worker)
                if isinstance(answer, Failure):
                    raise EvaluationError(f"{job}: {answer.summary}\n{answer.traceback}")
                yield answer
        self._schedule.check()

    def stop(self) -> None:
        for worker in self._workers:
            worker.connection.close()
        for worker in self._workers:
            # Idle ones end by themselves when the pipe closes; busy ones are not needed.
            worker.process.join(timeout=0.0 if worker.busy else 5.0)
            if worker.process.is_alive():
                worker.process.kill()
                worker.process.join()

    def _start(self, device: str | None) -> _Worker:
        ours, theirs = self._context.Pipe()
        process = self._context.Process(target=work, args=(theirs, self._plan, device), daemon=True)
        process.start()
        theirs.close()  # so that the worker's death closes the pipe
        return _Worker(process, ours, device)

    def _hand_out(self, worker: _Worker) -> None:
        job = self._schedule.next(worker)
        if job is None:
            return
        worker.busy, worker.deadline = True, time.monotonic() + self._settings.timeout_s
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            worker.connection.send(job)  # if it is dead, `_receive` finds out

    def _ready(self) -> list[_Worker]:
        """Busy workers that answered, died, or ran out of time."""
        busy = [worker for worker in self._workers if worker.busy]
        patience = max(0.0, min(worker.deadline for worker in busy) - time.monotonic())
        answered = wait([worker.connection for worker in busy], patience)
        now = time.monotonic()
        return [w for w in busy if w.connection in answered or now >= w.deadline]

    def _receive(self, worker: _Worker) -> EpisodeRecord | Failure | None:
        """The answer, or None if the worker is dead (or is taken to be)."""
        try:
            if worker.connection.poll():
                answer: EpisodeRecord | Failure = worker.connection.recv()
                return answer
        except (EOFError, OSError):  # an OSError also where it died in the middle of its answer
            pass
        worker.process.kill()
        worker.process.join()
        return None

    def _replace(self, dead: _Worker) -> None:
        """Put a new worker in a dead one's place."""
        dead.connection.close()
        self._schedule.lost(dead, f"exit code {dead.process.exitcode}")
        self._workers[self._workers.index(dead)] = self._start(dead.device)
