import pytest

from omega_qvla.evaluation.paired import flips, motion, paired_report
from omega_qvla.evaluation.records import Episode, EpisodeRecord


def record(arm, task, seed, success, steps=40, jerk=0.5):
    return EpisodeRecord(
        "toy", "plain", arm, task, seed, success, steps, 8, jerk, 2 * jerk, 0.1, 0.2, 0.3
    )


def arm(name, outcomes, **options):
    return [
        record(name, task, seed, success, **options)
        for task, row in outcomes.items()
        for seed, success in enumerate(row)
    ]


REFERENCE = arm("full-precision", {"a": [1, 1, 1, 0], "b": [1, 0, 1, 1]})
OTHER = arm("omega", {"a": [1, 0, 0, 1], "b": [1, 0, 1, 1]}, steps=50, jerk=0.6)


def test_flips_are_named_each_way():
    lost, won = flips(REFERENCE, OTHER)
    assert lost == [Episode("a", 1), Episode("a", 2)]
    assert won == [Episode("a", 3)]
    assert flips(OTHER, REFERENCE) == (won, lost)


def test_the_report_counts_by_task():
    report = paired_report(REFERENCE, OTHER)
    assert report["lost"] == [["a", 1], ["a", 2]] and report["won"] == [["a", 3]]
    assert report["tasks"]["a"] == {
        "episodes": 4, "reference": 3, "arm": 2, "lost": 2, "won": 1, "difference": -0.25
    }  # fmt: skip
    assert report["tasks"]["b"]["difference"] == 0
    assert report["power"]["discordance"] == pytest.approx(3 / 8)


def test_motion_is_that_of_successful_episodes():
    report = paired_report(REFERENCE, OTHER)["motion"]
    assert report["reference"] == {
        "successes": 6, "steps": 40, "action_jerk": 0.5, "path_jerk": 1.0
    }  # fmt: skip
    assert report["arm"]["successes"] == 5
    both = report["of_both"]
    assert both["episodes"] == 4
    assert both["steps"] == 10
    assert both["action_jerk_ratio"] == pytest.approx(1.2)
    assert both["path_jerk_ratio"] == pytest.approx(1.2)
    assert motion([record("x", "a", 0, False)]) == {
        "successes": 0, "steps": None, "action_jerk": None, "path_jerk": None
    }  # fmt: skip


def test_only_shared_episodes_are_paired():
    report = paired_report(REFERENCE[:2], OTHER)
    assert report["tasks"]["a"]["episodes"] == 2 and "b" not in report["tasks"]
    assert paired_report(REFERENCE[:2], OTHER[5:])["power"] is None
