"""Results of several runs or machines as one, and the summary that goes beside them."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from omega_qvla.errors import EvaluationError
from omega_qvla.evaluation.counting import arm_counts, grouped, rates, seconds_per_episode
from omega_qvla.evaluation.records import ArmKey, Episode, EpisodeRecord
from omega_qvla.evaluation.results import (
    check_same,
    joined,
    read_results,
    results_lock,
    write_results,
)
from omega_qvla.files import write_text

_FORMAT = 1


def merge_results(paths: Sequence[Path], out: Path) -> list[EpisodeRecord]:
    """Join results files into `out`, sorted by arm, task and seed.

    Raises:
        EvaluationError: settings, or the files behind an arm of the same name, differ (the
            message says in what); an episode went differently in two of them; `out` exists
            and is none of them, or an evaluation is writing it.
    """
    if not paths:
        raise EvaluationError("no results files to merge")
    if out.exists() and out.resolve() not in {path.resolve() for path in paths}:
        raise EvaluationError(f"{out} exists and is not among the files to merge: give another")
    # `out` may be one of the files: what an evaluation appended to it meanwhile would be lost.
    with results_lock(out):
        header, merged = _join(paths)
        write_results(out, header, merged)
    return merged


def _join(paths: Sequence[Path]) -> tuple[dict[str, Any], list[EpisodeRecord]]:
    header: dict[str, Any] | None = None
    found: dict[tuple[ArmKey, Episode], EpisodeRecord] = {}
    for path in paths:
        new, records = read_results(path)
        if header is not None:
            check_same(paths[0], header, new, path)
        header = new if header is None else joined(header, new)
        for record in records:
            known = found.setdefault((record.key, record.episode), record)
            if known.outcome() != record.outcome():
                raise EvaluationError(
                    f"{path}: {record.key} on {record.task}, seed {record.seed}, went differently "
                    "in another of the files, although the settings are the same: the machines "
                    "do not compute alike; report them apart"
                )
    assert header is not None
    return header, [found[key] for key in sorted(found)]


def summary_path(out: Path) -> Path:
    """Beside the results: merged.jsonl -> merged_summary.json."""
    return out.with_name(f"{out.stem}_summary.json")


def write_summary(out: Path) -> dict[str, Any]:
    """Write `merged_summary` of the results file `out` beside it, and return it."""
    header, records = read_results(out)
    summary = merged_summary(header, records)
    write_text(summary_path(out), json.dumps(summary, indent=2, allow_nan=False) + "\n")
    return summary


def merged_summary(header: Mapping[str, Any], records: Sequence[EpisodeRecord]) -> dict[str, Any]:
    """The numbers of a results file with everything that they depend on, JSON-ready.

    `arms` {arm: ...}: per arm `total_success_rate` in [0, 1], `total_episodes`,
    `total_successes`, `interval` (Wilson, 95%), the same by `suites` and `tasks`, `errors`
    (episodes ended by a non-finite action), `seconds_per_episode` {simulation, rendering,
    policy} (means), and `fingerprint` (hashes of checkpoint and pack, backend, device). With
    a single arm its totals stand at the top too, where the published scripts have them.
    `environment`: simulator and its options (LIBERO: protocol and whether assets are the
    original ones), versions, OpenGL backend, and the machine of the last run.

    Raises:
        EvaluationError: there are no records.
    """
    if not records:
        raise EvaluationError("the results file holds no episodes")
    settings = header["settings"]
    fingerprints: Mapping[str, Any] = header.get("arms", {})
    by_arm: dict[ArmKey, list[EpisodeRecord]] = {}
    for record in records:
        by_arm.setdefault(record.key, []).append(record)
    arms = {
        str(key): {
            **_arm(of_arm, str(settings.get("env", ""))),
            "fingerprint": fingerprints.get(str(key), {}),
        }
        for key, of_arm in by_arm.items()
    }
    top: dict[str, Any] = {}
    if len(arms) == 1:
        only = next(iter(arms.values()))
        top = {k: only[k] for k in ("total_success_rate", "total_episodes", "total_successes")}
    return {
        "omega_qvla_summary": _FORMAT,
        **top,
        "arms": arms,
        "protocol": settings.get("protocol", {}),
        "environment": {
            **{k: v for k, v in settings.items() if k != "protocol"},
            "machine": header.get("environment", {}),
        },
    }


def suite_of(task: str, env: str) -> str:
    """The suite of "suite/task"; an environment without suites is one."""
    suite, slash, _ = task.partition("/")
    return suite if slash else env


def _arm(records: Sequence[EpisodeRecord], env: str) -> dict[str, Any]:
    counts = arm_counts(records)
    return {
        "total_success_rate": counts["success"],
        "total_episodes": counts["episodes"],
        "total_successes": counts["successes"],
        "interval": counts["interval"],
        "suites": _rates(grouped(records, lambda record: suite_of(record.task, env))),
        "tasks": _rates(grouped(records, lambda record: record.task)),
        "errors": counts["errors"],
        "seconds_per_episode": seconds_per_episode(records),
    }


def _rates(groups: Mapping[str, Sequence[EpisodeRecord]]) -> dict[str, dict[str, Any]]:
    found = {}
    for name, records in groups.items():
        counts = rates(records)
        found[name] = {"success_rate": counts.pop("success"), **counts}
    return found
