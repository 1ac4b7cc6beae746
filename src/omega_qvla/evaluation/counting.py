"""Episodes counted: the numbers of one arm that every table and summary starts from."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from statistics import median
from typing import Any

from omega_qvla.evaluation.records import EpisodeRecord
from omega_qvla.evaluation.statistics import wilson

#: Where an episode's wall time goes, as `EpisodeRecord` names it (with `_s`).
PARTS = ("simulation", "rendering", "policy")


def rates(records: Sequence[EpisodeRecord]) -> dict[str, Any]:
    """`episodes`, `successes`, `success` (the rate) and its `interval` [low, high] (Wilson, 95%).

    records: of one arm, at least one.
    """
    successes = sum(record.success for record in records)
    return {
        "episodes": len(records),
        "successes": successes,
        "success": successes / len(records),
        "interval": list(wilson(successes, len(records))),
    }


def arm_counts(records: Sequence[EpisodeRecord]) -> dict[str, Any]:
    """`rates`, the same counts by task, `errors` (episodes ended by an action that was not
    executed) and `policy_ms` (median over episodes of the time per prediction; None without)."""
    times = [1000 * record.policy_s / record.replans for record in records if record.replans]
    return {
        **rates(records),
        "tasks": {
            task: {"episodes": len(of_task), "successes": sum(r.success for r in of_task)}
            for task, of_task in grouped(records, lambda record: record.task).items()
        },
        "errors": sum(record.error is not None for record in records),
        "policy_ms": round(median(times), 2) if times else None,
    }


def seconds_per_episode(records: Sequence[EpisodeRecord]) -> dict[str, float]:
    """Mean wall time by part."""
    return {
        part: round(sum(getattr(record, f"{part}_s") for record in records) / len(records), 3)
        for part in PARTS
    }


def grouped(
    records: Sequence[EpisodeRecord], name: Callable[[EpisodeRecord], str]
) -> dict[str, list[EpisodeRecord]]:
    """Name -> records, by name."""
    groups: dict[str, list[EpisodeRecord]] = {}
    for record in records:
        groups.setdefault(name(record), []).append(record)
    return dict(sorted(groups.items()))
