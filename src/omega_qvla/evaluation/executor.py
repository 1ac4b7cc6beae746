"""Play an evaluation in parallel processes, resumable at any moment."""

from __future__ import annotations

import contextlib
import multiprocessing
import time
from collections import deque
from collections.abc import Callable, Collection, Generator, Iterator
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path

from omega_qvla.errors import EvaluationError
from omega_qvla.evaluation.plan import Plan
from omega_qvla.evaluation.records import ArmKey, Episode, EpisodeRecord, Trace
from omega_qvla.evaluation.results import ResultsFile
from omega_qvla.evaluation.worker import Failure, Job, Player, work


def run_evaluation(
    plan: Plan,
    out: Path,
    *,
    workers: int = 2,
    record: Collection[Episode] = (),
    timeout_s: float = 900.0,
    progress: bool = True,
) -> list[EpisodeRecord]:
    """Play every episode of `plan` that `out` does not hold yet.

    Args:
        out: results file, one JSON line per episode; a second call continues it.
        workers: parallel processes; 0 plays in this process.
        record: episodes whose traces and frames are kept, see `trace_path`.
        timeout_s: an episode that takes longer counts as a dead worker.
        progress: show a progress bar.

    Returns:
        the records of the plan, sorted by arm, task and seed: the same ones, wall times
        aside, whatever the number of workers.

    Raises:
        EvaluationError: `out` was recorded under other settings; an episode raised; or
            a worker died twice on the same episode.
    """
    results = ResultsFile(out, plan)
    finished = {(entry.key, entry.episode) for entry in results.records}
    jobs = _missing_jobs(plan, finished, out, record)
    total = len(plan.arms) * len(plan.episodes)
    with _progress_bar(total, total - len(jobs), progress) as advance:
        played = _inline(plan, jobs) if workers == 0 else _Pool(plan, workers, timeout_s).run(jobs)
        with contextlib.closing(played):
            for outcome in played:
                if (outcome.key, outcome.episode) not in finished:
                    results.append(outcome)
                advance()
    wanted = {(arm.key, episode) for arm in plan.arms for episode in plan.episodes}
    mine = [entry for entry in results.records if (entry.key, entry.episode) in wanted]
    return sorted(mine, key=lambda entry: (entry.key, entry.episode))


def trace_path(out: Path, arm: ArmKey, episode: Episode) -> Path:
    """Where the trace of a recorded episode lies: beside the results file."""
    name = "__".join((*arm, episode.task, str(episode.seed))).replace("/", "-")
    return out.parent / f"{out.stem}-traces" / f"{name}.npz"


def load_trace(out: Path, arm: ArmKey, episode: Episode) -> Trace:
    """The trace of an episode that was named in `record`."""
    return Trace.load(trace_path(out, arm, episode))


def _missing_jobs(
    plan: Plan, finished: Collection[tuple[ArmKey, Episode]], out: Path, record: Collection[Episode]
) -> list[Job]:
    """Jobs without a record (or without a wanted trace), sorted by arm.

    A worker keeps one arm loaded, so sorted jobs load each arm once per worker.
    """
    jobs = []
    for arm in plan.arms:
        for episode in plan.episodes:
            trace = trace_path(out, arm.key, episode) if episode in record else None
            if (arm.key, episode) not in finished or (trace is not None and not trace.exists()):
                jobs.append(Job(arm, episode, trace))
    return jobs


@contextlib.contextmanager
def _progress_bar(total: int, done: int, shown: bool) -> Iterator[Callable[[], None]]:
    from tqdm import tqdm

    with tqdm(
        total=total, initial=done, desc="episodes", unit="ep", disable=not shown, smoothing=0
    ) as bar:

        def advance() -> None:
            bar.update(1)

        yield advance


def _inline(plan: Plan, jobs: list[Job]) -> Generator[EpisodeRecord, None, None]:
    player = Player(plan)
    try:
        for job in jobs:
            try:
                yield player.play(job)
            except Exception as error:
                raise EvaluationError(f"{job}: {type(error).__name__}: {error}") from error
    finally:
        player.close()


@dataclass
class _Worker:
    process: BaseProcess
    connection: Connection
    job: Job | None = None
    deadline: float = 0.0


class _Pool:
    """Workers with a pipe each, so that a death is known to belong to one episode."""

    def __init__(self, plan: Plan, size: int, timeout_s: float) -> None:
        if size < 0:
            raise EvaluationError(f"workers must be 0 or more, got {size}")
        self._plan, self._size, self._timeout = plan, size, timeout_s
        # spawn: a forked child would inherit the parent's torch threads and GL context.
        self._context = multiprocessing.get_context("spawn")
        self._workers: list[_Worker] = []

    def run(self, jobs: list[Job]) -> Generator[EpisodeRecord, None, None]:
        """Yield records as they are finished, in any order."""
        queue = deque(jobs)
        retried: set[tuple[ArmKey, Episode]] = set()
        try:
            self._workers = [self._start() for _ in range(min(self._size, len(jobs)))]
            while queue or any(worker.job for worker in self._workers):
                for worker in self._workers:
                    if worker.job is None and queue:
                        self._hand_out(worker, queue.popleft())
                for worker in self._ready():
                    answer = self._receive(worker)
                    job, worker.job = worker.job, None
                    assert job is not None
                    if answer is None:
                        self._replace(worker, job, retried)
                        queue.appendleft(job)
                    elif isinstance(answer, Failure):
                        raise EvaluationError(f"{job}: {answer.summary}\n{answer.traceback}")
                    else:
                        yield answer
        finally:
            self._stop()

    def _start(self) -> _Worker:
        ours, theirs = self._context.Pipe()
        process = self._context.Process(target=work, args=(theirs, self._plan), daemon=True)
        process.start()
        theirs.close()  # so that the worker's death closes the pipe
        return _Worker(process, ours)

    def _hand_out(self, worker: _Worker, job: Job) -> None:
        worker.job, worker.deadline = job, time.monotonic() + self._timeout
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            worker.connection.send(job)  # if it is dead, `_receive` finds out

    def _ready(self) -> list[_Worker]:
        """Busy workers that answered, died, or ran out of time."""
        busy = [worker for worker in self._workers if worker.job]
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
        except (EOFError, ConnectionResetError):
            pass
        worker.process.kill()
        worker.process.join()
        return None

    def _replace(self, dead: _Worker, job: Job, retried: set[tuple[ArmKey, Episode]]) -> None:
        """Put a new worker in a dead one's place, unless this episode killed two."""
        key = (job.arm.key, job.episode)
        if key in retried:
            raise EvaluationError(
                f"{job}: the worker died twice (exit code {dead.process.exitcode}); "
                "out of memory, or a crash or hang in the simulator or a kernel"
            )
        retried.add(key)
        dead.connection.close()
        self._workers[self._workers.index(dead)] = self._start()

    def _stop(self) -> None:
        for worker in self._workers:
            worker.connection.close()
        for worker in self._workers:
            # Idle ones end by themselves when the pipe closes; busy ones are not needed.
            worker.process.join(timeout=0.0 if worker.job else 5.0)
            if worker.process.is_alive():
                worker.process.kill()
                worker.process.join()
