"""Two arms on the same episodes: which flipped, in which tasks, and how the motion differs."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import Any

from omega_qvla.evaluation.power import power_note
from omega_qvla.evaluation.records import Episode, EpisodeRecord
from omega_qvla.evaluation.smoothness import jerk_ratio
from omega_qvla.evaluation.statistics import PairedTable, paired_table

_Pair = tuple[EpisodeRecord, EpisodeRecord]


def pairs_of(reference: Sequence[EpisodeRecord], other: Sequence[EpisodeRecord]) -> list[_Pair]:
    """(reference, other) of every episode that both played, by task and seed."""
    known = {record.episode: record for record in reference}
    shared = sorted(
        (record for record in other if record.episode in known), key=lambda r: r.episode
    )
    return [(known[record.episode], record) for record in shared]


def flips(
    reference: Sequence[EpisodeRecord], other: Sequence[EpisodeRecord]
) -> tuple[list[Episode], list[Episode]]:
    """(lost, won): episodes that only the reference solved, and those that only the other did."""
    pairs = pairs_of(reference, other)
    lost = [a.episode for a, b in pairs if a.success and not b.success]
    won = [a.episode for a, b in pairs if b.success and not a.success]
    return lost, won


def paired_report(
    reference: Sequence[EpisodeRecord], other: Sequence[EpisodeRecord]
) -> dict[str, Any]:
    """What the paired statistics of `summary.compare_arms` leave out, JSON-ready.

    `lost`, `won`: flipped episodes as [task, seed]. `tasks` {task: {episodes, reference,
    arm, lost, won, difference}}: successes of both, flips, difference of the rates.
    `motion`: of both arms' successful episodes, see `motion`; `of_both` compares the episodes
    that both solved: mean difference in steps, ratio of the jerk. `power`: see `power_note`,
    None where no episode is shared.
    """
    pairs = pairs_of(reference, other)
    lost, won = flips(reference, other)
    solved = [(a, b) for a, b in pairs if a.success and b.success]
    ratio = jerk_ratio([a for a, _ in solved], [b for _, b in solved])
    return {
        "lost": [list(episode) for episode in lost],
        "won": [list(episode) for episode in won],
        "tasks": _tasks(pairs),
        "motion": {
            "reference": motion(reference),
            "arm": motion(other),
            "of_both": {
                "episodes": len(solved),
                "steps": statistics.fmean(b.steps - a.steps for a, b in solved) if solved else None,
                "action_jerk_ratio": ratio and ratio.actions,
                "path_jerk_ratio": ratio and ratio.path,
            },
        },
        "power": power_note(_table(pairs)) if pairs else None,
    }


def motion(records: Sequence[EpisodeRecord]) -> dict[str, Any]:
    """How an arm moves when it succeeds: medians of steps and of both jerks, None of none."""
    solved = [record for record in records if record.success]
    return {
        "successes": len(solved),
        "steps": statistics.median(r.steps for r in solved) if solved else None,
        "action_jerk": _median([r.action_jerk for r in solved]),
        "path_jerk": _median([r.path_jerk for r in solved]),
    }


def _median(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return statistics.median(known) if known else None


def _table(pairs: Sequence[_Pair]) -> PairedTable:
    return paired_table([a.success for a, _ in pairs], [b.success for _, b in pairs])


def _tasks(pairs: Sequence[_Pair]) -> dict[str, dict[str, Any]]:
    by_task: dict[str, list[_Pair]] = {}
    for pair in pairs:
        by_task.setdefault(pair[0].task, []).append(pair)
    found = {}
    for task, members in by_task.items():
        table = _table(members)
        found[task] = {
            "episodes": table.n,
            "reference": table.both + table.b,
            "arm": table.both + table.c,
            "lost": table.b,
            "won": table.c,
            "difference": (table.c - table.b) / table.n,
        }
    return found
