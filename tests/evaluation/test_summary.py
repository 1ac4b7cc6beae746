import json

import numpy as np
import pytest

from omega_qvla.errors import EvaluationError
from omega_qvla.evaluation.open_loop import chunk_drift
from omega_qvla.evaluation.records import ArmKey, EpisodeRecord
from omega_qvla.evaluation.statistics import wilson
from omega_qvla.evaluation.summary import summarise


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
