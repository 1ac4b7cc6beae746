"""Play an evaluation, wherever its episodes run; resumable at any moment."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Collection, Generator, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from omega_qvla.errors import EvaluationError
from omega_qvla.evaluation.plan import Plan
from omega_qvla.evaluation.pool import ProcessPool
from omega_qvla.evaluation.records import ArmKey, Episode, EpisodeRecord, Trace
from omega_qvla.evaluation.results import ResultsFile
from omega_qvla.evaluation.worker import Job, Player, one_thread


class Executor(Protocol):
    """Where episodes are played. The records must not depend on it.

    There are `InProcess`, `omega_qvla.evaluation.pool.ProcessPool` (one machine) and
    `omega_qvla.evaluation.cluster.RayCluster` (several).
    """

    def play(self, plan: Plan, jobs: Sequence[Job]) -> Generator[EpisodeRecord, None, None]:
        """Yield the records of `jobs` in any order, traces written before their records.

        Closing the generator stops what runs. Raises EvaluationError naming the episode
        that raised, or whose workers kept dying.
        """
        ...


@dataclass(frozen=True)
class InProcess:
    """One episode after another in this process."""

    def play(self, plan: Plan, jobs: Sequence[Job]) -> Generator[EpisodeRecord, None, None]:
        """See `Executor`."""
        player = Player(plan)
        try:
            for job in jobs:
                try:
                    with one_thread():
                        record = player.play(job)
                except Exception as error:
                    raise EvaluationError(f"{job}: {type(error).__name__}: {error}") from error
                yield record
        finally:
            player.close()


def run_evaluation(
    plan: Plan,
    out: Path,
    *,
    workers: int = 2,
    record: Collection[Episode] = (),
    timeout_s: float = 900.0,
    progress: bool = True,
    executor: Executor | None = None,
) -> list[EpisodeRecord]:
    """Play every episode of `plan` that `out` does not hold yet.

    Args:
        out: results file, one JSON line per episode; a second call continues it.
        workers, timeout_s: without an `executor`: processes, 0 plays in this one; and the
            time limit of an episode, see `ProcessPool`.
        record: episodes whose traces and frames are kept, see `trace_path`.
        progress: show a progress bar.
        executor: where episodes are played.

    Returns:
        the records of the plan, sorted by arm, task and seed: the same ones, wall times
        aside, whatever the executor.

    Raises:
        EvaluationError: `out` was recorded under other settings, or is being written by
            another evaluation; an episode raised; or its workers kept dying.
    """
    if workers < 0:
        raise EvaluationError(f"workers must be 0 or more, got {workers}")
    if executor is None:
        executor = ProcessPool(workers, timeout_s=timeout_s) if workers else InProcess()
    with ResultsFile(out, plan) as results:
        finished = {(entry.key, entry.episode) for entry in results.records}
        jobs = _missing_jobs(plan, finished, out, record)
        total = len(plan.arms) * len(plan.episodes)
        with (
            _progress_bar(total, total - len(jobs), progress) as advance,
            contextlib.closing(executor.play(plan, jobs)) as played,
        ):
            for outcome in played:
                if (outcome.key, outcome.episode) not in finished:
                    results.append(outcome)
                advance()
        wanted = {(arm.key, episode) for arm in plan.arms for episode in plan.episodes}
        mine = [entry for entry in results.records if (entry.key, entry.episode) in wanted]
        return sorted(mine, key=lambda entry: (entry.key, entry.episode))


def trace_path(out: Path, arm: ArmKey, episode: Episode) -> Path:
    """Where the trace of a recorded episode lies: beside the results file."""
    return out.parent / f"{out.stem}-traces" / trace_name(arm, episode)


def trace_name(arm: ArmKey, episode: Episode) -> str:
    """File name of a trace."""
    return f"{'__'.join((*arm, episode.task, str(episode.seed))).replace('/', '-')}.npz"


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
