"""Which job comes next, and what happens to a job whose worker is lost."""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Hashable, Iterable

from omega_qvla.errors import EvaluationError
from omega_qvla.evaluation.records import ArmKey, Episode
from omega_qvla.evaluation.worker import Job

#: Episodes that may be given up before the run ends: more is no accident of one episode.
MAX_GIVEN_UP = 3

_Group = tuple[ArmKey, str]


class Schedule:
    """Hands jobs to workers so that each loads little, and counts what gets lost.

    Jobs of one arm and one task form a group. A worker stays with its group (its policy and
    its simulator are loaded), then takes one that nobody works on, then helps where most is
    left. Arms are played one after another, in the order of the jobs.
    """

    def __init__(self, jobs: Iterable[Job], retries: int) -> None:
        """`retries`: times that an episode is played again after its worker was lost."""
        self._groups: dict[_Group, deque[Job]] = {}
        for job in jobs:
            self._groups.setdefault(_group(job), deque()).append(job)
        self._retries = retries
        self._playing: dict[Hashable, Job] = {}
        self._last: dict[Hashable, _Group] = {}
        self._losses: Counter[tuple[ArmKey, Episode]] = Counter()
        self._given_up: list[str] = []

    @property
    def remaining(self) -> int:
        """Jobs that nobody plays at the moment."""
        return sum(map(len, self._groups.values()))

    @property
    def unfinished(self) -> bool:
        """Whether a job waits or is being played."""
        return bool(self._playing) or self.remaining > 0

    def next(self, worker: Hashable) -> Job | None:
        """The job that `worker` is to play now, or None if there is none left."""
        waiting = [group for group, jobs in self._groups.items() if jobs]
        if not waiting:
            return None
        last = self._last.get(worker)
        if last not in waiting:
            arm = next((g[0] for g in waiting if last and g[0] == last[0]), waiting[0][0])
            of_arm = [group for group in waiting if group[0] == arm]
            taken = {group for other, group in self._last.items() if other != worker}
            free = [group for group in of_arm if group not in taken]
            last = free[0] if free else max(of_arm, key=lambda g: len(self._groups[g]))
        job = self._groups[last].popleft()
        self._last[worker], self._playing[worker] = last, job
        return job

    def done(self, worker: Hashable) -> Job:
        """`worker` has answered; the job that it played."""
        return self._playing.pop(worker)

    def lost(self, worker: Hashable, why: str) -> None:
        """`worker` died, or is taken to be dead: its job comes again, or is given up.

        Raises:
            EvaluationError: too many episodes have been given up.
        """
        self._last.pop(worker, None)
        job = self._playing.pop(worker)
        key = (job.arm.key, job.episode)
        self._losses[key] += 1
        if self._losses[key] <= self._retries:
            self._groups[_group(job)].appendleft(job)
            return
        times = {1: "once", 2: "twice"}.get(self._losses[key], f"{self._losses[key]} times")
        self._given_up.append(f"{job}: the worker died {times} ({why})")
        if len(self._given_up) >= MAX_GIVEN_UP:
            self.check()

    def check(self) -> None:
        """Raise EvaluationError if an episode was given up."""
        if self._given_up:
            raise EvaluationError(
                "; ".join(self._given_up) + ". Out of memory, or a crash or hang in the simulator "
                "or a kernel. Everything else is in the results file; calling again tries "
                "what is missing"
            )


def _group(job: Job) -> _Group:
    return job.arm.key, job.episode.task
