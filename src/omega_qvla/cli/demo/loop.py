"""The demo's closed loop: every arm of every cell on the same episodes."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from omega_qvla.cli.console import Console
from omega_qvla.cli.demo.plan import ARMS, DemoPlan
from omega_qvla.envs.metaworld import eval_seeds
from omega_qvla.evaluation.executor import load_trace, run_evaluation
from omega_qvla.evaluation.plan import Plan, episodes
from omega_qvla.evaluation.records import REFERENCE, Arm, ArmKey, Episode, EpisodeRecord, Trace

_EVERY_S = 15.0


def results_file(plan: DemoPlan) -> Path:
    """One JSON line per episode."""
    return plan.out / "episodes.jsonl"


def evaluation_plan(plan: DemoPlan) -> Plan:
    """All arms of all cells."""
    arms = []
    for family, variant in plan.cells:
        checkpoint = str(plan.checkpoint(family, variant))
        arms.append(Arm(REFERENCE, checkpoint, family, variant))
        for label in ARMS:
            pack = str(plan.pack(family, variant, label))
            arms.append(Arm(label, checkpoint, family, variant, pack=pack))
    return Plan(
        tuple(arms),
        episodes(list(plan.tasks), eval_seeds(plan.episodes)),
        plan.protocol,
        env=plan.env,
        env_options=dict(plan.env_options),
    )


def recorded(plan: DemoPlan) -> list[Episode]:
    """The episodes whose frames are kept: the first of some tasks."""
    seed = eval_seeds(1)[0]
    chosen = plan.tasks[1::2] or plan.tasks
    return [Episode(task, seed) for task in chosen[: plan.record]]


def play(plan: DemoPlan, console: Console) -> list[EpisodeRecord]:
    """Play what is missing."""
    wanted = evaluation_plan(plan)
    total = len(wanted.arms) * len(wanted.episodes)
    console.note(
        f"closed loop: {len(wanted.arms)} arms, {len(wanted.episodes)} episodes each, "
        f"{plan.workers} processes"
    )
    with _heartbeat(results_file(plan), total, console):
        return run_evaluation(
            wanted,
            results_file(plan),
            workers=plan.workers,
            record=recorded(plan),
            progress=console.live,
        )


@contextmanager
def _heartbeat(path: Path, total: int, console: Console) -> Iterator[None]:
    """Where no bar can be shown (a log), say now and then how far it is."""
    over = threading.Event()

    def watch() -> None:
        while not over.wait(_EVERY_S):
            if path.exists():
                done = max(0, path.read_bytes().count(b"\n") - 1)
                console.note(f"closed loop: {min(done, total)} of {total} episodes")

    thread = threading.Thread(target=watch, daemon=True)
    if not console.live:
        thread.start()
    try:
        yield
    finally:
        over.set()
        if thread.is_alive():
            thread.join()


def traces(plan: DemoPlan, family: str, variant: str, episode: Episode) -> dict[str, Trace]:
    """Arm -> trace of a recorded episode, full precision first."""
    return {
        label: load_trace(results_file(plan), ArmKey(family, variant, label), episode)
        for label in (REFERENCE, *ARMS)
    }
