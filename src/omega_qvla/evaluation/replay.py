"""Play recorded episodes again, for their pictures; what comes out must be what was recorded."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from omega_qvla.errors import EvaluationError
from omega_qvla.evaluation.executor import Executor, trace_name
from omega_qvla.evaluation.plan import Plan
from omega_qvla.evaluation.records import Arm, ArmKey, Episode, Protocol, Trace
from omega_qvla.evaluation.results import check_same, read_results
from omega_qvla.evaluation.worker import Job


def recorded_plan(path: Path, header: Mapping[str, Any], episodes: Sequence[Episode]) -> Plan:
    """The evaluation that a results file was written by, with other episodes.

    Raises:
        EvaluationError: the file does not say where its arms are, or they, the simulator or
            the machine are no longer what they were.
    """
    told = header.get("plan")
    if told is None:
        raise EvaluationError(
            f"{path} does not say where its arms are (it is of an older version): its episodes "
            "cannot be played again; evaluate anew"
        )
    plan = Plan(
        tuple(Arm(**arm) for arm in told["arms"]),
        tuple(episodes),
        Protocol(**header["settings"]["protocol"]),
        told["env"],
        told["env_options"],
        told["loader"],
    )
    now = {"settings": plan.settings(), "arms": plan.arm_fingerprints()}
    check_same(path, header, now)
    return plan


def replay(
    path: Path,
    wanted: Sequence[tuple[ArmKey, Episode]],
    folder: Path,
    executor: Executor,
    *,
    frame_size: int = 256,
    frame_every: int = 2,
) -> dict[tuple[ArmKey, Episode], Trace]:
    """Traces with frames of episodes of a results file, kept in `folder`.

    What lies there already is taken if it is of the same arm under the same settings, drawn
    alike; an arm of the same name in another results file has traces of its own.

    Raises:
        EvaluationError: an episode did not go as recorded; or see `recorded_plan`.
    """
    header, records = read_results(path)
    known = {(record.key, record.episode): record for record in records}
    plan = recorded_plan(path, header, list(dict.fromkeys(episode for _, episode in wanted)))
    # What is drawn is no part of what happens.
    drawn = replace(plan.protocol, frame_size=frame_size, frame_every=frame_every)
    plan = replace(plan, protocol=drawn)
    arms = {arm.key: arm for arm in plan.arms}
    places = {
        (key, episode): folder / _origin(header, key, drawn) / trace_name(key, episode)
        for key, episode in wanted
    }
    jobs = [
        Job(arms[key], episode, _unproved(place))
        for (key, episode), place in sorted(places.items())
        if not place.exists()
    ]
    with contextlib.closing(executor.play(plan, jobs)) as played:
        for record in played:
            which = record.key, record.episode
            recorded, place = known[which], places[which]
            if record.outcome() != recorded.outcome():
                _unproved(place).unlink()
                raise EvaluationError(
                    f"{record.key} on {record.task}, seed {record.seed}, did not go as recorded: "
                    f"{record.steps} steps, success {record.success}, against {recorded.steps} and "
                    f"{recorded.success}. The policy or the simulator does not repeat itself on "
                    "this machine"
                )
            os.replace(_unproved(place), place)
    return {which: Trace.load(place) for which, place in places.items()}


def _origin(header: Mapping[str, Any], key: ArmKey, drawn: Protocol) -> str:
    """What a trace depends on besides its episode, as a folder's name."""
    facts = [header["settings"], header["arms"][str(key)], drawn.frame_size, drawn.frame_every]
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:12]


def _unproved(place: Path) -> Path:
    """Where a trace lies until its episode is known to have gone as recorded."""
    return place.with_name(f".{place.name}")
