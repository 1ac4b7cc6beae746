import json

import numpy as np
import pytest

from omega_qvla.errors import EvaluationError
from omega_qvla.evaluation.counting import arm_counts
from omega_qvla.evaluation.merged import merged_summary
from omega_qvla.evaluation.open_loop import chunk_drift
from omega_qvla.evaluation.records import ArmKey, EpisodeRecord
from omega_qvla.evaluation.statistics import wilson
from omega_qvla.evaluation.summary import drift_numbers, summarise


def record(arm, seed, success, variant="plain", **changes):
    values = {
        "family": "pi05",
        "variant": variant,
        "arm": arm,
        "task": f"task{seed % 2}",
        "seed": seed,
        "success": success,
        "steps": 20,
        "replans": 4,
        "action_jerk": 1.0 if arm == "full-precision" else 1.5,
        "path_jerk": 1.0,
        "simulation_s": 0.1,
        "rendering_s": 0.2,
        "policy_s": 0.4,
        **changes,
    }
    return EpisodeRecord(**values)


@pytest.fixture
def records():
    reference = [record("full-precision", s, s < 8) for s in range(10)]
    omega = [record("omega", s, s < 7 or s == 9) for s in range(10)]
    return omega + reference


def test_summary_in_the_schema_of_the_demo(records):
    chunks = np.ones((3, 2, 2))
    moved = chunks.copy()
    moved[0, 0, 1] = 2.0
    key = ArmKey("pi05", "plain", "omega")
    summary = summarise(records, {key: chunk_drift(chunks, moved)}, {key: (250, 1000)})
    assert list(summary["pi05"]["plain"]) == ["full-precision", "omega"]
    omega = summary["pi05"]["plain"]["omega"]
    assert (omega["episodes"], omega["success"]) == (10, 0.8)
    assert omega["interval"] == list(wilson(8, 10))
    assert set(omega["cosine"]) == {"mean", "median", "min"}
    assert omega["worst_channel"]["index"] == 1
    assert (omega["layer_bytes"], omega["layer_bytes_16bit"]) == (250, 1000)
    assert omega["tasks"]["task0"] == {"episodes": 5, "successes": 4}
    paired = omega["paired"]
    assert (paired["both"], paired["b"], paired["c"], paired["neither"]) == (7, 1, 1, 1)
    assert (paired["p"], paired["difference"]) == (1.0, 0.0)
    assert paired["interval"][0] < 0 < paired["interval"][1]
    assert omega["jerk_ratio"]["actions"] == pytest.approx(1.5)
    assert omega["policy_ms"] == 100.0
    full = summary["pi05"]["plain"]["full-precision"]
    assert full["cosine"] == {"mean": 1.0, "median": 1.0, "min": 1.0}
    assert "paired" not in full
    assert json.loads(json.dumps(summary, allow_nan=False)) == summary


def test_every_summary_counts_alike(records):
    """What `eval` shows, what stands beside the results, and what `compare` reads."""
    mine = [r for r in records if r.arm == "omega"]
    counts = arm_counts(mine)
    omega = summarise(records, {}, {})["pi05"]["plain"]["omega"]
    assert {key: omega[key] for key in counts} == counts
    merged = merged_summary({"settings": {"env": "toy"}}, mine)["arms"]["pi05/plain/omega"]
    assert merged["total_success_rate"] == counts["success"] == 0.8
    assert merged["interval"] == counts["interval"]
    assert merged["suites"] == {
        "toy": {"success_rate": 0.8, "episodes": 10, "successes": 8, "interval": counts["interval"]}
    }
    for task, entry in counts["tasks"].items():
        assert {key: merged["tasks"][task][key] for key in entry} == entry
    assert merged["seconds_per_episode"] == {"simulation": 0.1, "rendering": 0.2, "policy": 0.4}


def test_infinite_errors_can_be_written_as_json():
    """A channel that full precision never moves: any movement there is infinitely much."""
    still = np.zeros((2, 3, 2))
    moved = still.copy()
    moved[:, :, 1] = 0.5
    numbers = drift_numbers(chunk_drift(still, moved))
    assert numbers["worst_channel"] == {"index": 1, "nmse": None}
    assert numbers["relative_error"] is None
    json.dumps(numbers, allow_nan=False)


def test_time_per_chunk_is_the_median_over_episodes():
    times = (0.1, 0.2, 0.4, 9.0)
    played = [record("omega", seed, True, policy_s=t, replans=4) for seed, t in enumerate(times)]
    stopped = record("omega", 5, False, replans=0, error="not finite")
    counts = arm_counts([*played, stopped])
    assert (counts["policy_ms"], counts["errors"]) == (75.0, 1)  # between 50 and 100
    assert arm_counts([stopped])["policy_ms"] is None


def test_missing_reference_and_doubled_episodes_are_refused(records):
    with pytest.raises(EvaluationError, match="full-precision"):
        summarise(records[:10], {}, {})
    with pytest.raises(EvaluationError, match="twice"):
        summarise([*records, records[0]], {}, {})


def test_pairs_are_the_episodes_that_both_played(records):
    extra = record("omega", 77, True)
    summary = summarise([*records, extra], {}, {})
    omega = summary["pi05"]["plain"]["omega"]
    assert (omega["episodes"], omega["paired"]["episodes"]) == (11, 10)
    assert omega["cosine"] is None
    stranger = [record("full-precision", 1, True), record("omega", 2, True)]
    with pytest.raises(EvaluationError, match="no paired"):
        summarise(stranger, {}, {})
