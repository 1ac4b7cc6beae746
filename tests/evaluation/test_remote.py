"""An evaluation through a served policy has the records of one in process."""

from dataclasses import replace

import pytest

from omega_qvla.errors import EvaluationError
from omega_qvla.evaluation.executor import run_evaluation
from omega_qvla.evaluation.plan import Plan, episodes
from omega_qvla.evaluation.policies import arm_fingerprint
from omega_qvla.evaluation.records import Arm, Protocol
from omega_qvla.policies.registry import save_policy
from omega_qvla.runtime.engine import Engine
from omega_qvla.serving.server import PolicyServer, describe
from policies.tiny import tiny_pi05

from .fakes import NanPolicy

pytest.importorskip("msgpack", reason="the extra [serve] is not installed")
pytest.importorskip("websockets", reason="the extra [serve] is not installed")


def served(port):
    return Arm("served", f"ws://127.0.0.1:{port}", "pi05", policy="served")


def run(arm, out, **options):
    plan = Plan((arm,), episodes(["push", "pull"], range(2)), env="cli.fakes:DriftEnv", **options)
    records = run_evaluation(plan, out, workers=0, progress=False)
    return [{**record.outcome(), "arm": ""} for record in records]


@pytest.mark.parametrize("steps", [None, 1])
def test_the_same_episodes_as_in_process(tmp_path, steps):
    checkpoint = save_policy(tiny_pi05(num_steps=2), tmp_path / "checkpoint")
    protocol = Protocol(denoising_steps=steps)
    here = Arm("full-precision", str(checkpoint), "pi05")
    expected = run(here, tmp_path / "a.jsonl", protocol=protocol)
    policy = Engine.load(checkpoint).policy  # as `omega-qvla serve` and the executors load it
    with PolicyServer(policy, describe(policy, "none", {}), port=0).background() as port:
        assert run(served(port), tmp_path / "b.jsonl", protocol=protocol) == expected
        # The file of a server is that of no other one, wherever it listens.
        found = arm_fingerprint(served(port), "any", {})
    assert any(record["steps"] > 5 for record in expected)
    with PolicyServer(policy, describe(policy, "none", {}), port=0).background() as port:
        assert arm_fingerprint(served(port), "any", {}) == found
    changed = describe(policy, "none", {"pack": "another"})
    with PolicyServer(policy, changed, port=0).background() as port:
        assert arm_fingerprint(served(port), "any", {}) != found


def test_a_served_policys_nan_is_a_failed_episode(tmp_path):
    policy = NanPolicy()
    policy.cameras = ("base",)
    with PolicyServer(policy, port=0).background() as port:
        plan = Plan(
            (served(port),), episodes(["reach"], [3]), env="tests.evaluation.fakes:ReachEnv"
        )
        (record,) = run_evaluation(plan, tmp_path / "r.jsonl", workers=0, progress=False)
    assert not record.success and record.steps == 10
    assert "step 7, channel 1" in record.error


def test_nobody_there_is_named_before_anything_is_played(tmp_path):
    with pytest.raises(EvaluationError, match=r"no policy server at ws://127\.0\.0\.1:9"):
        run(replace(served(9)), tmp_path / "r.jsonl")
    assert not (tmp_path / "r.jsonl").exists()
