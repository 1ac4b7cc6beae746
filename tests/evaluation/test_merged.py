import json

import pytest

from omega_qvla.errors import EvaluationError
from omega_qvla.evaluation.merged import merge_results, merged_summary, summary_path, write_summary
from omega_qvla.evaluation.records import Protocol
from omega_qvla.evaluation.results import ResultsFile, read_results, write_results
from omega_qvla.evaluation.statistics import wilson

from .test_executor import EPISODES, arms, importable_from_workers, outcomes, plan, run

__all__ = ["arms", "importable_from_workers"]  # fixtures


def test_shards_merge_to_the_file_of_one_run(arms, tmp_path):
    whole = run(plan(arms), tmp_path / "whole.jsonl", workers=0)
    shards = []
    for index in range(3):
        shards.append(tmp_path / f"{index}.jsonl")
        run(plan(arms, EPISODES[index::3]), shards[-1], workers=0)
    run(plan(arms[:1], EPISODES[:2]), tmp_path / "again.jsonl", workers=0)  # played twice
    out = tmp_path / "merged.jsonl"
    assert outcomes(merge_results([*shards, tmp_path / "again.jsonl"], out)) == outcomes(whole)
    header, records = read_results(out)
    assert header == read_results(tmp_path / "whole.jsonl")[0]
    assert outcomes(records) == outcomes(whole)
    # It is a results file like any other: nothing is missing, nothing is played again.
    before = out.read_bytes()
    run(plan(arms), out, workers=0)
    assert sorted(out.read_bytes().splitlines()) == sorted(before.splitlines())


def test_other_settings_and_other_arms_do_not_merge(arms, tmp_path):
    run(plan(arms), tmp_path / "a.jsonl", workers=0)
    run(plan(arms, protocol=Protocol(execute=4)), tmp_path / "b.jsonl", workers=0)
    both = [tmp_path / "a.jsonl", tmp_path / "b.jsonl"]
    with pytest.raises(EvaluationError, match=r"a\.jsonl and .*b\.jsonl.*execute: 5 there, 4 now"):
        merge_results(both, tmp_path / "m.jsonl")
    (tmp_path / "rtn").write_text("-0.9")
    run(plan(arms), tmp_path / "c.jsonl", workers=0)
    with pytest.raises(EvaluationError, match=r"arms\.toy/plain/rtn\.checkpoint"):
        merge_results([both[0], tmp_path / "c.jsonl"], tmp_path / "m.jsonl")
    assert not (tmp_path / "m.jsonl").exists()


def test_machines_that_disagree_are_not_merged_silently(arms, tmp_path):
    run(plan(arms[:1]), tmp_path / "a.jsonl", workers=0)
    header, records = read_results(tmp_path / "a.jsonl")
    changed = records[0].__class__(**{**records[0].to_dict(), "steps": 39})
    write_results(tmp_path / "b.jsonl", header, [changed, *records[1:]])
    with pytest.raises(EvaluationError, match="went differently"):
        merge_results([tmp_path / "a.jsonl", tmp_path / "b.jsonl"], tmp_path / "m.jsonl")


def test_merging_does_not_overwrite_a_stranger(arms, tmp_path):
    run(plan(arms[:1]), tmp_path / "a.jsonl", workers=0)
    (tmp_path / "m.jsonl").write_text("mine\n")
    with pytest.raises(EvaluationError, match="exists"):
        merge_results([tmp_path / "a.jsonl"], tmp_path / "m.jsonl")
    merge_results([tmp_path / "a.jsonl"], tmp_path / "a.jsonl")  # itself it may


def test_merging_into_a_file_that_an_evaluation_writes_is_refused(arms, tmp_path):
    """What was appended between reading and replacing would be lost."""
    one, out = tmp_path / "a.jsonl", tmp_path / "b.jsonl"
    run(plan(arms[:1], EPISODES[::2]), one, workers=0)
    run(plan(arms[:1], EPISODES[1::2]), out, workers=0)
    before = out.read_bytes()
    with (
        ResultsFile(out, plan(arms[:1])),
        pytest.raises(EvaluationError, match="being written by another evaluation"),
    ):
        merge_results([one, out], out)
    assert out.read_bytes() == before
    assert len(merge_results([one, out], out)) == len(EPISODES)


def test_the_summary_has_the_published_key_and_everything_it_depends_on(arms, tmp_path):
    out = tmp_path / "merged.jsonl"
    records = run(plan(arms[:1]), out, workers=0)
    written = write_summary(out)
    assert summary_path(out).name == "merged_summary.json"
    assert json.loads(summary_path(out).read_text()) == written
    successes = sum(record.success for record in records)
    assert written["total_success_rate"] == successes / len(records)
    assert (written["total_episodes"], written["total_successes"]) == (len(records), successes)
    arm = written["arms"]["toy/plain/full-precision"]
    assert arm["interval"] == list(wilson(successes, len(records)))
    assert set(arm["tasks"]) == {"reach", "other"}
    assert sum(task["episodes"] for task in arm["tasks"].values()) == len(records)
    assert arm["suites"]["tests.evaluation.fakes:make_env"]["successes"] == successes
    assert len(arm["fingerprint"]["checkpoint"]) == 64
    assert {"torch", "numpy", "mujoco"} <= set(written["environment"]["versions"])
    assert written["environment"]["gl"] and written["environment"]["machine"]["cores"]
    assert written["protocol"]["execute"] == 5


def test_several_arms_have_no_common_total_and_suites_are_counted_apart(arms, tmp_path):
    records = run(plan(arms), tmp_path / "r.jsonl", workers=0)
    header, _ = read_results(tmp_path / "r.jsonl")
    renamed = [
        r.__class__(**{**r.to_dict(), "task": f"suite-{r.task[0]}/{r.task}"}) for r in records
    ]
    summary = merged_summary(header, renamed)
    assert "total_success_rate" not in summary
    rtn = summary["arms"]["toy/plain/rtn"]
    assert rtn["total_success_rate"] == 0.0
    assert {name: suite["episodes"] for name, suite in rtn["suites"].items()} == {
        "suite-o": 3,
        "suite-r": 3,
    }
    with pytest.raises(EvaluationError, match="no episodes"):
        merged_summary(header, [])
