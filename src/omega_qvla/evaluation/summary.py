"""The numbers of an evaluation in one dictionary, and nothing but numbers."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from omega_qvla.errors import EvaluationError
from omega_qvla.evaluation.counting import arm_counts
from omega_qvla.evaluation.open_loop import Drift
from omega_qvla.evaluation.records import REFERENCE, ArmKey, EpisodeRecord
from omega_qvla.evaluation.smoothness import jerk_ratio
from omega_qvla.evaluation.statistics import paired_difference, paired_table

Summary = dict[str, dict[str, dict[str, dict[str, Any]]]]


def summarise(
    records: Iterable[EpisodeRecord],
    drift: Mapping[ArmKey, Drift],
    sizes: Mapping[ArmKey, tuple[int, int]],
    *,
    reference: str = REFERENCE,
) -> Summary:
    """{family: {variant: {arm: {...}}}}, JSON-ready, families and arms in order of appearance.

    Per arm: `episodes`, `successes`, `success` (rate), `interval` [low, high] (Wilson,
    95%), `tasks` {task: {episodes, successes}}, `errors` (episodes ended by a non-finite
    action), `cosine` {mean, median, min} or None, `worst_channel` {index, nmse} or None,
    `relative_error`, `layer_bytes`, `layer_bytes_16bit` (of the quantized layers; None
    if unknown), `policy_ms` (median per prediction); and, for every arm but the
    reference, `paired` {episodes, both, b, c, neither, p, difference, interval} against
    it (b: only the reference succeeded) and `jerk_ratio` {actions, path, episodes} or None.

    Args:
        drift: by arm; the reference arm needs none (it is its own reference).
        sizes: by arm (layer bytes, the same layers' bytes in 16 bit).

    Raises:
        EvaluationError: a family and variant lacks the reference arm, or an episode
            appears twice.
    """
    groups: dict[tuple[str, str], dict[str, list[EpisodeRecord]]] = {}
    for record in records:
        arms = groups.setdefault((record.family, record.variant), {})
        arms.setdefault(record.arm, []).append(record)
    summary: Summary = {}
    for (family, variant), arms in groups.items():
        if reference not in arms:
            raise EvaluationError(f"{family}/{variant}: no episodes of the arm {reference!r}")
        ordered = sorted(arms, key=lambda arm: arm != reference)  # stable: reference first
        summary.setdefault(family, {})[variant] = {
            arm: _arm(ArmKey(family, variant, arm), arms[arm], arms[reference], drift, sizes)
            for arm in ordered
        }
    return summary


def add_drift(
    summary: Summary, drift: Mapping[ArmKey, Drift], sizes: Mapping[ArmKey, tuple[int, int]]
) -> Summary:
    """`summary` with the arms that were measured and played no episode; changed in place.

    They have `cosine`, `worst_channel`, `relative_error` and the bytes, and none of the others.
    """
    for key, found in drift.items():
        arms = summary.setdefault(key.family, {}).setdefault(key.variant, {})
        if key.arm not in arms:
            stored, full = sizes.get(key, (None, None))
            arms[key.arm] = {
                **_drift(found, False),
                "layer_bytes": stored,
                "layer_bytes_16bit": full,
            }
    return summary


def _arm(
    key: ArmKey,
    records: Sequence[EpisodeRecord],
    reference: Sequence[EpisodeRecord],
    drift: Mapping[ArmKey, Drift],
    sizes: Mapping[ArmKey, tuple[int, int]],
) -> dict[str, Any]:
    if len({record.episode for record in records}) != len(records):
        raise EvaluationError(f"{key}: an episode appears twice")
    counts = arm_counts(records)
    policy_ms = counts.pop("policy_ms")
    layer_bytes, layer_bytes_16bit = sizes.get(key, (None, None))
    is_reference = records is reference
    result = {
        **counts,
        **_drift(drift.get(key), is_reference),
        "layer_bytes": layer_bytes,
        "layer_bytes_16bit": layer_bytes_16bit,
        "policy_ms": policy_ms,
    }
    if not is_reference:
        result["paired"] = compare_arms(reference, records)
        ratio = jerk_ratio(reference, records)
        result["jerk_ratio"] = ratio and {
            "actions": ratio.actions,
            "path": ratio.path,
            "episodes": ratio.episodes,
        }
    return result


def compare_arms(
    reference: Sequence[EpisodeRecord], other: Sequence[EpisodeRecord]
) -> dict[str, Any]:
    """The McNemar table of the episodes that both arms played, and what follows from it.

    Raises:
        EvaluationError: they share no episode.
    """
    outcomes = {record.episode: record.success for record in reference}
    shared = [record for record in other if record.episode in outcomes]
    table = paired_table(
        [outcomes[record.episode] for record in shared], [record.success for record in shared]
    )
    difference = paired_difference(table)
    return {
        "episodes": table.n,
        "both": table.both,
        "b": table.b,
        "c": table.c,
        "neither": table.neither,
        "p": table.p,
        "difference": difference.value,
        "interval": [difference.low, difference.high],
    }


def drift_numbers(drift: Drift) -> dict[str, Any]:
    """`cosine`, `worst_channel` {index, nmse} and `relative_error`, JSON-ready: None for what is
    infinite (an error where full precision has no movement)."""
    nmse = drift.channel_nmse[drift.worst_channel]
    return {
        "cosine": drift.cosine(),
        "worst_channel": {
            "index": drift.worst_channel,
            "nmse": nmse if math.isfinite(nmse) else None,
        },
        "relative_error": drift.relative_error if math.isfinite(drift.relative_error) else None,
    }


def _drift(drift: Drift | None, is_reference: bool) -> dict[str, Any]:
    if drift is not None:
        return drift_numbers(drift)
    one = {"mean": 1.0, "median": 1.0, "min": 1.0}
    return {
        "cosine": one if is_reference else None,
        "worst_channel": None,
        "relative_error": 0.0 if is_reference else None,
    }
