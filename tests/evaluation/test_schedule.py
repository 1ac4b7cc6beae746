import pytest

from omega_qvla.errors import EvaluationError
from omega_qvla.evaluation.records import Arm, Episode
from omega_qvla.evaluation.schedule import Schedule
from omega_qvla.evaluation.worker import Job

ARMS = (Arm("a", "-", "toy"), Arm("b", "-", "toy"))


def jobs(tasks=("x", "y"), seeds=3, arms=ARMS):
    return [Job(arm, Episode(task, s)) for arm in arms for task in tasks for s in range(seeds)]


def test_a_worker_stays_with_its_arm_and_task():
    schedule = Schedule(jobs(), retries=1)
    taken = {"one": [], "two": []}
    for _ in range(6):
        for worker, mine in taken.items():
            job = schedule.next(worker)
            mine.append((job.arm.label, job.episode.task))
            schedule.done(worker)
    assert taken["one"] == [("a", "x")] * 3 + [("b", "x")] * 3
    assert taken["two"] == [("a", "y")] * 3 + [("b", "y")] * 3
    assert schedule.next("one") is None and not schedule.unfinished


def test_a_worker_without_a_group_of_its_own_helps_where_most_is_left():
    schedule = Schedule(jobs(("x",), 2, ARMS[:1]) + jobs(("y",), 4, ARMS[:1]), retries=1)
    tasks = [schedule.next(worker).episode.task for worker in "abc"]
    assert tasks == ["x", "y", "y"]


def test_a_lost_job_comes_again_first_and_is_given_up_in_the_end():
    schedule = Schedule(jobs(("x",), 2, ARMS[:1]), retries=1)
    first = schedule.next("one")
    schedule.lost("one", "exit code -9")
    assert schedule.unfinished and schedule.next("two") is first
    schedule.lost("two", "exit code -9")
    assert schedule.next("two").episode.seed == 1  # the others are played all the same
    schedule.done("two")
    assert not schedule.unfinished
    with pytest.raises(EvaluationError, match=r"on x, seed 0: the worker died twice \(exit code"):
        schedule.check()


def test_many_given_up_end_the_run():
    schedule = Schedule(jobs(("x",), 5, ARMS[:1]), retries=0)
    for _ in range(2):
        schedule.next("one")
        schedule.lost("one", "why")
    schedule.next("one")
    with pytest.raises(EvaluationError, match=r"seed 0.*seed 1.*seed 2"):
        schedule.lost("one", "why")
