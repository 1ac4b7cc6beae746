import errno
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from omega_qvla.errors import ConfigError, EvaluationError
from omega_qvla.evaluation.environment import environment
from omega_qvla.evaluation.executor import load_trace, run_evaluation
from omega_qvla.evaluation.plan import Plan, episodes
from omega_qvla.evaluation.pool import ProcessPool
from omega_qvla.evaluation.records import Arm, Episode, Protocol
from omega_qvla.evaluation.results import ResultsFile, read_results
from omega_qvla.evaluation.worker import Job, Player

FAKES = "tests.evaluation.fakes"
EPISODES = episodes(["reach", "other"], range(1_000_000, 1_000_003))


@pytest.fixture(autouse=True)
def importable_from_workers(monkeypatch):
    """Spawned workers get this process's sys.path, which must hold the repository root."""
    root = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
    monkeypatch.syspath_prepend(root)


@pytest.fixture
def arms(tmp_path):
    made = []
    for label, gain in (("full-precision", "1"), ("omega", "0.6"), ("rtn", "-1")):
        (tmp_path / label).write_text(gain)
        made.append(Arm(label, str(tmp_path / label), "toy"))
    return tuple(made)


def plan(arms, chosen=EPISODES, loader="load", **options):
    return Plan(arms, chosen, env=f"{FAKES}:make_env", loader=f"{FAKES}:{loader}", **options)


def run(plan, out, **options):
    return run_evaluation(plan, out, progress=False, **options)


def outcomes(records):
    return [record.outcome() for record in records]


def test_the_same_records_whatever_the_number_of_workers(arms, tmp_path):
    inline = run(plan(arms), tmp_path / "a.jsonl", workers=0)
    parallel = run(plan(arms), tmp_path / "b.jsonl", workers=2)
    assert len(inline) == len(arms) * len(EPISODES)
    assert outcomes(inline) == outcomes(parallel)
    assert {r.arm for r in inline if r.success} == {"full-precision", "omega"}
    for arm in arms:  # a worker loads an arm once
        loads = Path(f"{arm.checkpoint}.loads").read_text().splitlines()[1:]
        assert len(loads) == len(set(loads)) <= 2


def test_a_killed_run_resumes_and_redoes_a_torn_line(arms, tmp_path):
    whole = run(plan(arms), tmp_path / "whole.jsonl", workers=0)
    lines = (tmp_path / "whole.jsonl").read_text().splitlines(keepends=True)
    out = tmp_path / "cut.jsonl"
    out.write_text("".join(lines[:5]) + lines[5][:40])
    assert len(read_results(out)[1]) == 4
    resumed = run(plan(arms), out, workers=0)
    assert outcomes(resumed) == outcomes(whole)
    assert out.read_text().splitlines(keepends=True)[:5] == lines[:5]
    assert len(out.read_text().splitlines()) == 1 + len(whole)
    again = out.read_bytes()
    run(plan(arms), out, workers=0)
    assert out.read_bytes() == again


def test_a_file_cut_within_its_header_starts_over(arms, tmp_path):
    out = tmp_path / "r.jsonl"
    out.write_text('{"omega_qvla_resu')
    assert len(run(plan(arms[:1]), out, workers=0)) == len(EPISODES)


def test_more_episodes_and_more_arms_continue_the_same_file(arms, tmp_path):
    out = tmp_path / "r.jsonl"
    run(plan(arms[:1], EPISODES[:2]), out, workers=0)
    records = run(plan(arms[1:], EPISODES), out, workers=0)
    assert {record.arm for record in records} == {"omega", "rtn"}
    header, everything = read_results(out)
    assert len(everything) == 2 + 2 * len(EPISODES)
    assert set(header["arms"]) == {str(arm.key) for arm in arms}


def test_other_settings_are_refused_by_name(arms, tmp_path):
    out = tmp_path / "r.jsonl"
    run(plan(arms), out, workers=0)
    before = out.read_bytes()
    with pytest.raises(EvaluationError, match=r"settings\.protocol\.execute: 5 there, 4 now"):
        run(plan(arms, protocol=Protocol(execute=4)), out, workers=0)
    (tmp_path / "omega").write_text("0.7")
    with pytest.raises(EvaluationError, match=r"arms\.toy/plain/omega\.checkpoint"):
        run(plan(arms), out, workers=0)
    assert out.read_bytes() == before


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"hello": 1}\n', "results header"),
        ('{"omega_qvla_results": 1}\nnot json\n', "line 2"),
        ('{"omega_qvla_results": 1}\n{"arm": "x"}\n', "line 2"),
        ("", "no header"),
    ],
)
def test_a_file_that_is_no_results_file_is_refused(tmp_path, text, message):
    path = tmp_path / "r.jsonl"
    path.write_text(text)
    with pytest.raises(EvaluationError, match=message):
        read_results(path)


def test_a_killed_worker_costs_a_retry_not_the_run(tmp_path):
    marker = tmp_path / "once"
    marker.write_text("once")
    arm = (Arm("killer", str(marker), "toy"),)
    chosen = (*EPISODES[:2], Episode("deadly", 1), *EPISODES[2:4])
    records = run(plan(arm, chosen, "load_killer"), tmp_path / "r.jsonl", workers=2)
    assert len(records) == len(chosen)
    assert marker.with_suffix(".done").exists()


def test_an_episode_that_kills_twice_ends_the_run_and_keeps_the_rest(tmp_path):
    marker = tmp_path / "always"
    marker.write_text("always")
    arm = (Arm("killer", str(marker), "toy"),)
    chosen = (*EPISODES[:2], Episode("deadly", 1))
    out = tmp_path / "r.jsonl"
    with pytest.raises(EvaluationError, match=r"toy/plain/killer on deadly, seed 1.*died twice"):
        run(plan(arm, chosen, "load_killer"), out, workers=1)
    assert [record.episode for record in read_results(out)[1]] == sorted(EPISODES[:2])


def test_a_hanging_episode_counts_as_dead(tmp_path):
    (tmp_path / "x").write_text("")
    arm = (Arm("killer", str(tmp_path / "x"), "toy"),)
    with pytest.raises(EvaluationError, match="hanging"):
        run(
            plan(arm, (Episode("hanging", 1),), "load_killer"),
            tmp_path / "r.jsonl",
            workers=1,
            timeout_s=6.0,
        )


@pytest.mark.parametrize("workers", [0, 1])
def test_an_error_in_an_episode_names_the_episode(tmp_path, workers):
    (tmp_path / "x").write_text("")
    arm = (Arm("killer", str(tmp_path / "x"), "toy"),)
    with pytest.raises(EvaluationError, match=r"killer on raising, seed 1: RuntimeError: boom"):
        run(
            plan(arm, (Episode("raising", 1),), "load_killer"),
            tmp_path / "r.jsonl",
            workers=workers,
        )


def test_two_evaluations_do_not_write_one_file(arms, tmp_path):
    out = tmp_path / "r.jsonl"
    run(plan(arms[:1]), out, workers=0)
    with ResultsFile(out, plan(arms[:1])):
        with pytest.raises(EvaluationError, match="being written by another evaluation"):
            run(plan(arms[:1]), out, workers=0)
        # Another process is refused just the same.
        code = (
            "import sys; from pathlib import Path; from omega_qvla.evaluation import results;"
            "results.results_lock(Path(sys.argv[1]))"
        )
        call = subprocess.run(
            [sys.executable, "-c", code, str(out)], capture_output=True, text=True, check=False
        )
        assert call.returncode != 0 and "being written" in call.stderr
    run(plan(arms[:1]), out, workers=0)


def test_a_full_disk_leaves_no_half_line(arms, tmp_path, monkeypatch):
    out = tmp_path / "r.jsonl"
    whole = run(plan(arms[:1]), out, workers=0)
    before = out.read_bytes()
    write = os.write
    with ResultsFile(out, plan(arms[:1])) as results:
        monkeypatch.setattr(os, "write", lambda handle, data: write(handle, data[:20]))
        with pytest.raises(EvaluationError, match=r"r\.jsonl: .*make room there"):
            results.append(whole[0])
        assert out.read_bytes() == before and len(results.records) == len(whole)

        def full(handle, data):
            raise OSError(errno.ENOSPC, "No space left on device")

        monkeypatch.setattr(os, "write", full)
        with pytest.raises(EvaluationError, match=r"r\.jsonl: .*make room there"):
            results.append(whole[0])
        monkeypatch.undo()
        out.unlink()  # somebody tidied up
        with pytest.raises(EvaluationError, match=r"r\.jsonl: cannot take another record"):
            results.append(whole[0])


def test_an_episode_that_stands_twice_is_refused(arms, tmp_path):
    out = tmp_path / "r.jsonl"
    run(plan(arms[:1]), out, workers=0)
    lines = out.read_text().splitlines(keepends=True)
    out.write_text("".join([*lines, lines[-1]]))
    with pytest.raises(EvaluationError, match="2 times"):
        run(plan(arms[:1]), out, workers=0)


def test_options_that_are_no_identity_do_not_enter_the_header(arms, tmp_path):
    out = tmp_path / "r.jsonl"

    def wanted(**options):
        return Plan(
            arms[:1], EPISODES, env=f"{FAKES}:StateEnv", loader=f"{FAKES}:load", env_options=options
        )

    run(wanted(where="here"), out, workers=0)
    assert read_results(out)[0]["settings"]["env_options"] == {"flag": False}
    assert read_results(out)[0]["plan"]["env_options"] == {"where": "here"}
    run(wanted(where="there"), out, workers=0)
    with pytest.raises(EvaluationError, match=r"env_options\.flag: False there, True now"):
        run(wanted(where="there", flag=True), out, workers=0)


def test_devices_must_be_of_the_arms_kind(arms, tmp_path):
    with pytest.raises(ConfigError, match=r"is for cpu, the worker's device is cuda:1"):
        run(plan(arms), tmp_path / "r.jsonl", executor=ProcessPool(2, ("cpu", "cuda:1")))
    records = run(plan(arms[:1]), tmp_path / "r.jsonl", executor=ProcessPool(2, ("cpu:0", "cpu")))
    assert outcomes(records) == outcomes(run(plan(arms[:1]), tmp_path / "s.jsonl", workers=0))
    with pytest.raises(ConfigError, match="workers"):
        ProcessPool(0)


def test_few_simulators_are_kept(arms):
    player = Player(plan(arms[:1]))
    for task in "abcda":
        player.play(Job(arms[0], Episode(task, 1)))
    assert list(player._envs) == ["c", "d", "a"]


def test_recorded_episodes_leave_traces_even_when_asked_for_later(arms, tmp_path):
    out = tmp_path / "r.jsonl"
    records = run(plan(arms[:2]), out, workers=0)
    again = run(plan(arms[:2]), out, workers=0, record=[EPISODES[0]])
    assert again == records
    for arm in arms[:2]:
        trace = load_trace(out, arm.key, EPISODES[0])
        (record,) = [r for r in records if r.key == arm.key and r.episode == EPISODES[0]]
        assert len(trace.actions) == record.steps
        assert len(trace.frames) > 1


def test_impossible_plans_are_refused(arms, tmp_path):
    with pytest.raises(ConfigError, match="twice"):
        plan((arms[0], arms[0]))
    with pytest.raises(ConfigError, match="at least one"):
        plan(arms, ())
    with pytest.raises(ConfigError, match="cannot import"):
        run(Plan(arms, EPISODES, env="no.such:thing"), tmp_path / "r.jsonl", workers=0)
    with pytest.raises(EvaluationError, match="no checkpoint"):
        run(plan((Arm("a", str(tmp_path / "none"), "toy"),)), tmp_path / "q.jsonl", workers=0)


def test_environment_is_plain_text():
    found = environment()
    assert {"python", "torch", "numpy", "mujoco", "metaworld", "gl", "cpu", "threads"} <= set(found)
    assert json.loads(json.dumps(found)) == found
