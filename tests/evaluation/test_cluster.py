"""Ray for real: started once on this machine, and once as two nodes of which one is lost."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from omega_qvla.errors import BackendError, ConfigError, EvaluationError
from omega_qvla.evaluation.cluster import RayCluster, import_ray
from omega_qvla.evaluation.cluster_worker import EnvWorker, PolicyWorker
from omega_qvla.evaluation.executor import load_trace
from omega_qvla.evaluation.plan import Plan
from omega_qvla.evaluation.records import Arm, Episode
from omega_qvla.evaluation.results import read_results

from .test_executor import EPISODES, FAKES, arms, importable_from_workers, outcomes, plan, run

__all__ = ["arms", "importable_from_workers"]  # fixtures
ROOT = Path(__file__).resolve().parents[2]


def path_for_workers():
    return f"{ROOT}:{os.environ.get('PYTHONPATH', '')}"


@pytest.mark.ray
def test_the_same_records_as_in_one_process_and_in_a_pool(ray, arms, tmp_path):
    two = arms[1:]
    inline = run(plan(two), tmp_path / "a.jsonl", workers=0)
    pool = run(plan(two), tmp_path / "b.jsonl", workers=2)
    spread = run(plan(two), tmp_path / "c.jsonl", executor=RayCluster(workers=2, policies=2))
    assert outcomes(spread) == outcomes(pool) == outcomes(inline)
    assert {record.success for record in spread} == {True, False}
    for arm in two:  # in this process, in two workers, in two policy actors
        assert len(Path(f"{arm.checkpoint}.loads").read_text().splitlines()) <= 5


@pytest.mark.ray
def test_a_killed_policy_costs_retries_not_the_run(ray, tmp_path):
    marker = tmp_path / "once"
    marker.write_text("once")
    arm = (Arm("killer", str(marker), "toy"),)
    chosen = (*EPISODES[:2], Episode("deadly", 1), *EPISODES[2:4])
    records = run(
        plan(arm, chosen, "load_killer"), tmp_path / "r.jsonl", executor=RayCluster(workers=3)
    )
    assert len(records) == len(chosen)
    assert marker.with_suffix(".done").exists()


@pytest.mark.ray
def test_a_killed_simulator_costs_a_retry_not_the_run(ray, arms, tmp_path):
    marker = tmp_path / "marker"
    chosen = (*EPISODES[:2], Episode("deadly", 1), *EPISODES[2:4])
    wanted = Plan(
        arms[:1],
        chosen,
        env=f"{FAKES}:DeadlyEnv",
        env_options={"marker": str(marker)},
        loader=f"{FAKES}:load",
    )
    records = run(wanted, tmp_path / "r.jsonl", executor=RayCluster(workers=2))
    assert len(records) == len(chosen) and marker.exists()
    assert outcomes(records) == outcomes(run(wanted, tmp_path / "inline.jsonl", workers=0))


@pytest.mark.ray
def test_an_episode_that_kills_always_ends_in_a_named_error(ray, tmp_path):
    marker = tmp_path / "always"
    marker.write_text("always")
    (tmp_path / "well").write_text("well")
    (tmp_path / "well.done").touch()
    labels = (("killer", marker), ("well", tmp_path / "well"))
    both = tuple(Arm(label, str(path), "toy") for label, path in labels)
    out = tmp_path / "r.jsonl"
    with pytest.raises(EvaluationError, match=r"deadly, seed 1: the worker died twice \(its pol"):
        run(
            plan(both, (Episode("deadly", 1), *EPISODES[:2]), "load_killer"),
            out,
            executor=RayCluster(workers=1, retries=1),
        )
    played = [(record.arm, record.episode) for record in read_results(out)[1]]
    assert [e for arm, e in played if arm == "killer"] == sorted(EPISODES[:2])
    assert (
        len([e for arm, e in played if arm == "well"]) == 3
    )  # the next arm is played all the same


@pytest.mark.ray
@pytest.mark.parametrize(
    ("task", "message"),
    [("raising", r"raising, seed 1: .*RuntimeError: boom"), ("hanging", "no answer within 6 s")],
)
def test_errors_and_hangs_name_the_episode(ray, tmp_path, task, message):
    (tmp_path / "x").write_text("")
    arm = (Arm("killer", str(tmp_path / "x"), "toy"),)
    with pytest.raises(EvaluationError, match=message):
        run(
            plan(arm, (Episode(task, 1),), "load_killer"),
            tmp_path / "r.jsonl",
            executor=RayCluster(workers=1, timeout_s=6, retries=0),
        )


@pytest.mark.ray
def test_traces_arrive_where_the_results_are(ray, arms, tmp_path):
    out = tmp_path / "r.jsonl"
    records = run(plan(arms[:2]), out, record=[EPISODES[0]], executor=RayCluster(workers=2))
    for arm in arms[:2]:
        (record,) = [r for r in records if r.key == arm.key and r.episode == EPISODES[0]]
        assert len(load_trace(out, arm.key, EPISODES[0]).actions) == record.steps


@pytest.mark.ray
def test_an_actor_that_dies_wherever_it_starts_ends_the_run(ray, arms, tmp_path):
    with pytest.raises(EvaluationError, match=r"a policy .* dies on starting, 3 in a row .*memory"):
        run(
            plan(arms[:1], loader="load_stillborn"),
            tmp_path / "r.jsonl",
            executor=RayCluster(workers=1, retries=1),
        )


@pytest.mark.ray
def test_no_room_is_named(ray, arms, tmp_path):
    greedy = RayCluster(workers=1, gpus=64, startup_s=3)
    with pytest.raises(EvaluationError, match=r"no machine of the cluster had room.*fewer"):
        run(plan(arms[:1]), tmp_path / "r.jsonl", executor=greedy)


@pytest.mark.ray
def test_a_lost_node_is_survived(ray, arms, tmp_path):
    """In a process of its own: two nodes, the second is killed while it plays."""
    script = ROOT / "tests" / "evaluation" / "lost_node.py"
    call = subprocess.run(
        [sys.executable, str(script), str(tmp_path)],
        env={**os.environ, "PYTHONPATH": path_for_workers()},
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=900,
        check=False,
    )
    assert call.returncode == 0, call.stdout[-3000:] + call.stderr[-3000:]
    told = json.loads(call.stdout.splitlines()[-1])
    assert told["nodes_before"] == 2 and told["nodes_after"] == 1
    assert told["on_lost_node"] >= 1 and told["done_before"] < told["records"]
    assert told["same"] is True


def test_missing_ray_is_named_with_the_mend(monkeypatch, arms, tmp_path):
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(BackendError, match=r"pip install 'omega-qvla\[cluster\]'"):
        import_ray()
    with pytest.raises(BackendError, match="--executor pool"):
        run(plan(arms[:1]), tmp_path / "r.jsonl", executor=RayCluster())


def test_a_machine_with_other_files_or_versions_is_refused(arms):
    """The actors' checks, without actors: each returns what the driver then raises."""
    wanted = plan(arms[:1])
    fingerprint = wanted.arm_fingerprints()[str(arms[0].key)]
    settings = wanted.settings()
    assert PolicyWorker(wanted, arms[0], fingerprint).ready() is None
    assert EnvWorker(wanted, settings).ready() is None
    Path(arms[0].checkpoint).write_text("2")
    failure = PolicyWorker(wanted, arms[0], fingerprint).ready()
    assert "not the same on this machine: checkpoint" in failure.summary
    settings["versions"]["mujoco"] = "2.0"
    failure = EnvWorker(wanted, settings).ready()
    assert "versions.mujoco: '2.0' there" in failure.summary


@pytest.mark.parametrize(
    "options", [{"workers": 0}, {"policies": 0}, {"gpus": -1}, {"retries": -1}, {"timeout_s": 0}]
)
def test_impossible_clusters_are_refused(options):
    with pytest.raises(ConfigError):
        RayCluster(**options)
