"""`omega-qvla eval` and what `compare` says of its episodes: options, refusals, joining."""

from __future__ import annotations

import json
from argparse import Namespace
from pathlib import Path
from typing import Any

import pytest

from cli.fakes import TASKS
from omega_qvla.cli.eval_plan import make_executor, make_plan
from omega_qvla.cli.evaluate import configure
from omega_qvla.cli.main import main
from omega_qvla.cli.parsing import verb_parser
from omega_qvla.errors import ConfigError
from omega_qvla.evaluation.cluster import RayCluster
from omega_qvla.evaluation.executor import InProcess
from omega_qvla.evaluation.pool import ProcessPool
from omega_qvla.policies.registry import save_policy
from policies.tiny import tiny_groot, tiny_pi05

DRIFT = ["--env", "cli.fakes:DriftEnv", "--tasks", *TASKS]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_policy(tiny_pi05(num_steps=2), tmp_path_factory.mktemp("eval") / "checkpoint")


def parsed(*words: object) -> Namespace:
    parser = verb_parser("eval", "", "")
    configure(parser)
    return parser.parse_args([*map(str, words), "--out", "r.jsonl"])


def call(capsys: pytest.CaptureFixture[str], *words: object) -> tuple[int, Any, str]:
    code = main([*map(str, words), "--json", "--quiet"])
    out, err = capsys.readouterr()
    return code, json.loads(out) if out else None, err


def test_shards_are_played_apart_and_join_to_the_whole(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["eval", checkpoint, *DRIFT, "--episodes", 3, "--executor", "process"]
    code, whole, _ = call(capsys, *words, "--out", tmp_path / "whole.jsonl")
    assert code == 0
    for index in (0, 1):
        shard = ["--shard", f"{index}/2", "--out", tmp_path / f"{index}.jsonl"]
        assert call(capsys, *words, *shard)[1]["arms"]["pi05/plain/full-precision"]["episodes"] == 3
    files = [tmp_path / "0.jsonl", tmp_path / "1.jsonl"]
    code, data, _ = call(capsys, "eval", "--merge", *files, "--out", tmp_path / "merged.jsonl")
    assert code == 0
    for arm in (data["arms"], whole["arms"]):  # times differ, the rest does not
        arm["pi05/plain/full-precision"] |= {"seconds": 0, "policy_ms": 0}
    assert data["arms"] == whole["arms"]
    summary = json.loads((tmp_path / "merged_summary.json").read_text())
    assert summary["total_success_rate"] == data["arms"]["pi05/plain/full-precision"]["success"]

    words[words.index("process")] = "process"
    call(capsys, *words, "--execute", 4, "--out", tmp_path / "other.jsonl")
    mixed = [tmp_path / "0.jsonl", tmp_path / "other.jsonl"]
    code, _, err = call(capsys, "eval", "--merge", *mixed, "--out", tmp_path / "m.jsonl")
    assert code == 2 and "protocol.execute: 5 there, 4 now" in err
    code, _, err = call(capsys, "compare", *mixed)
    assert code == 2 and "cannot be one result" in err


def test_a_random_arm_is_compared_with_the_checkpoint(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, films = tmp_path / "r.jsonl", tmp_path / "films"
    words = [*DRIFT, "--episodes", 3, "--executor", "process", "--policy", "random"]
    assert call(capsys, "eval", checkpoint, *words, "--out", out)[0] == 0
    assert main(["compare", str(out), "--videos", str(films)]) == 0
    told = capsys.readouterr().out
    code, data, _ = call(capsys, "compare", out)
    assert code == 0
    pair = data["pairs"]["pi05/plain/random"]
    assert sum(task["episodes"] for task in pair["tasks"].values()) == 6
    flipped = [*pair["lost"], *pair["won"]]
    assert flipped, "the two arms must differ for this test to show anything"
    assert len(list(films.glob("*.mp4"))) == len(flipped)
    assert "The arms disagree on" in told and "solved by only full-precision" in told
    assert pair["power"]["discordance"] == len(flipped) / 6


def test_executors_by_name() -> None:
    assert make_executor(parsed()) == ProcessPool(2)
    assert make_executor(parsed("--workers", 0)) == InProcess()
    assert make_executor(parsed("--executor", "process")) == InProcess()
    words = ["--executor", "pool", "--workers", 4, "--devices", "cuda:0", "cuda:1", "--timeout", 60]
    assert make_executor(parsed(*words)) == ProcessPool(4, ("cuda:0", "cuda:1"), 60.0)
    words = ["--executor", "ray", "--address", "auto", "--policies", 2, "--gpus", 0.5]
    assert make_executor(parsed(*words)) == RayCluster("auto", 2, 2, 0.5)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--executor", "ray", "--devices", "cuda:0"], "--devices is for --executor pool"),
        (["--address", "auto"], "are for --executor ray, not pool"),
        (["--executor", "process", "--gpus", "1"], "are for --executor ray, not process"),
    ],
)
def test_options_of_another_executor_are_refused(words: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        make_executor(parsed(*words))


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--tasks", "drawer-open"], "nothing to evaluate"),
        (["--arm", "a=b"], "--arm is a pack of a checkpoint"),
        (["--policy", "random", "--protocol", "openpi"], "give --suite"),
        (["--policy", "random", "--policy", "random"], "'random' is given twice"),
        (["--policy", "random", "--env", "a:b", "--tasks", "x", "--suite", "libero_goal"], "--env"),
    ],
)
def test_impossible_plans_are_refused(words: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        make_plan(parsed(*words))


def test_policies_get_a_name_each() -> None:
    named = ["--policy", "random", "--policy", "mine=some.where:policy", "--policy", "other:go"]
    plan = make_plan(parsed(*named, "--policy", "ws://127.0.0.1:8000"))
    assert [(arm.label, arm.policy, arm.checkpoint) for arm in plan.arms] == [
        ("random", "random", ""),
        ("mine", "some.where:policy", ""),
        ("go", "other:go", ""),
        ("served", "served", "ws://127.0.0.1:8000"),
    ]
    assert {arm.family for arm in plan.arms} == {"scripted"}


def test_a_checkpoint_of_another_robot_is_refused_before_anything_runs(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from cli.fakes import DriftEnv

    words = [checkpoint, *DRIFT]
    make_plan(parsed(*words))
    monkeypatch.setattr(DriftEnv, "cameras", ("front", "wrist"))
    with pytest.raises(ConfigError, match="has front, wrist, and lacks base"):
        make_plan(parsed(*words))
    monkeypatch.setattr(DriftEnv, "cameras", property(lambda env: ()))  # an instance knows
    make_plan(parsed(*words))
    monkeypatch.undo()
    monkeypatch.setattr(DriftEnv, "action_dim", 7)
    with pytest.raises(ConfigError, match=r"4 entries, those of .* 7: .* another robot"):
        make_plan(parsed(*words))
    monkeypatch.undo()
    with pytest.raises(ConfigError, match="executes 99"):
        make_plan(parsed(save_policy(tiny_groot(), tmp_path / "g"), *DRIFT, "--execute", 99))
