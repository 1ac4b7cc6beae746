"""The closed loop of a comparison: every arm of every cell on the same episodes."""

from __future__ import annotations

import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from omega_qvla.cli.comparison.plan import Comparison
from omega_qvla.cli.console import Console
from omega_qvla.envs.metaworld import eval_seeds
from omega_qvla.evaluation.executor import load_trace, run_evaluation, trace_path
from omega_qvla.evaluation.plan import Plan, episodes
from omega_qvla.evaluation.records import REFERENCE, Arm, ArmKey, Episode, EpisodeRecord, Trace
from omega_qvla.evaluation.results import read_results, write_results

_EVERY_S = 15.0


def results_file(plan: Comparison) -> Path:
    """One JSON line per episode."""
    return plan.out / "episodes.jsonl"


def wanted_episodes(plan: Comparison) -> tuple[Episode, ...]:
    """What every arm plays."""
    return episodes(list(plan.tasks), eval_seeds(plan.episodes)) if plan.episodes else ()


def evaluation_plan(plan: Comparison, keys: Iterable[ArmKey] | None = None) -> Plan:
    """All arms of all cells, or those named; one variant of all checkpoints after the other."""
    arms = []
    for name, variant in sorted(plan.cells, key=lambda cell: plan.variants.index(cell[1])):
        checkpoint = str(plan.checkpoint(name, variant))
        common: dict[str, Any] = {
            "checkpoint": checkpoint,
            "family": name,
            "variant": variant,
            "device": plan.device,
        }
        arms.append(Arm(REFERENCE, **common))
        for spec in plan.arms:
            pack = str(plan.pack(name, variant, spec.name))
            arms.append(Arm(spec.name, pack=pack, backend=plan.backend, **common))
    chosen = None if keys is None else set(keys)
    return Plan(
        tuple(arm for arm in arms if chosen is None or arm.key in chosen),
        wanted_episodes(plan),
        plan.protocol,
        env=plan.env,
        env_options=dict(plan.env_options),
    )


def recorded(plan: Comparison) -> list[Episode]:
    """The episodes whose frames are kept: the first of some tasks."""
    seed = eval_seeds(1)[0]
    chosen = plan.tasks[1::2] or plan.tasks
    return [Episode(task, seed) for task in chosen[: plan.record]] if plan.episodes else []


def unplayed(plan: Comparison) -> list[ArmKey]:
    """The arms of which an episode (or a trace of it) is missing."""
    wanted, path = wanted_episodes(plan), results_file(plan)
    if not wanted:
        return []
    known = read_results(path)[1] if _has_header(path) else []
    played = {(record.key, record.episode) for record in known}
    traced = recorded(plan)
    return [
        arm.key
        for arm in evaluation_plan(plan).arms
        if any((arm.key, episode) not in played for episode in wanted)
        or any(not trace_path(path, arm.key, episode).exists() for episode in traced)
    ]


def play(plan: Comparison, console: Console) -> list[EpisodeRecord]:
    """Play what is missing; returns everything, in the order of the file's arms and episodes."""
    missing = unplayed(plan)
    if missing:
        _play(plan, missing, console)
    return played(plan)


def played(plan: Comparison) -> list[EpisodeRecord]:
    """The episodes of the comparison that are on record, whether that is all of them or not."""
    wanted = set(wanted_episodes(plan))
    if not wanted or not _has_header(results_file(plan)):
        return []
    arms = {arm.key for arm in evaluation_plan(plan).arms}
    found = read_results(results_file(plan))[1]
    return [record for record in found if record.key in arms and record.episode in wanted]


def _play(plan: Comparison, missing: list[ArmKey], console: Console) -> None:
    evaluation = evaluation_plan(plan, missing)
    total = len(evaluation.arms) * len(evaluation.episodes)
    console.note(
        f"closed loop: {len(evaluation.arms)} arms, {len(evaluation.episodes)} episodes each, "
        f"{plan.workers} processes"
    )
    with _heartbeat(results_file(plan), total, console):
        run_evaluation(
            evaluation,
            results_file(plan),
            workers=plan.workers,
            record=recorded(plan),
            progress=console.live,
        )


def forget_episodes(path: Path, labels: Iterable[str]) -> None:
    """Take the records of some arms out of a results file."""
    if not _has_header(path):
        return
    dropped = set(labels)
    header, records = read_results(path)
    header["arms"] = {
        name: value for name, value in header["arms"].items() if name.split("/")[-1] not in dropped
    }
    played = header.get("plan", {}).get("arms", [])
    header["plan"] = {
        **header.get("plan", {}),
        "arms": [arm for arm in played if arm["label"] not in dropped],
    }
    write_results(path, header, [record for record in records if record.arm not in dropped])


def _has_header(path: Path) -> bool:
    return path.exists() and b"\n" in path.read_bytes()


@contextmanager
def _heartbeat(path: Path, total: int, console: Console) -> Iterator[None]:
    """Where no bar can be shown (a log), say now and then how far it is."""
    over = threading.Event()
    before = _lines(path)

    def watch() -> None:
        while not over.wait(_EVERY_S):
            console.note(f"closed loop: {min(_lines(path) - before, total)} new episodes")

    thread = threading.Thread(target=watch, daemon=True)
    if not console.live:
        thread.start()
    try:
        yield
    finally:
        over.set()
        if thread.is_alive():
            thread.join()


def _lines(path: Path) -> int:
    return max(0, path.read_bytes().count(b"\n") - 1) if path.exists() else 0


def traces(plan: Comparison, name: str, variant: str, episode: Episode) -> dict[str, Trace]:
    """Arm -> trace of a recorded episode, full precision first."""
    labels = (REFERENCE, *(arm.name for arm in plan.arms))
    return {
        label: load_trace(results_file(plan), ArmKey(name, variant, label), episode)
        for label in labels
    }
