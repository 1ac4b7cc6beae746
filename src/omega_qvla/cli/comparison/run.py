"""A comparison from beginning to end; what is done already is not done again."""

from __future__ import annotations

import queue
import shutil
import time
from collections.abc import Iterable, Mapping
from concurrent.futures import FIRST_EXCEPTION, wait
from dataclasses import dataclass, field
from multiprocessing import parent_process
from typing import Any

from omega_qvla.cli.comparison.cells import Builder, Cell
from omega_qvla.cli.comparison.drift import (
    DriftMeter,
    DriftRecord,
    check_pack,
    drift_file,
    drifts,
    mend_drift_file,
    read_drift,
    sizes,
)
from omega_qvla.cli.comparison.layers import layers_measured, measure_layers
from omega_qvla.cli.comparison.loop import forget_episodes, play, results_file, unplayed
from omega_qvla.cli.comparison.observations import collect_observations
from omega_qvla.cli.comparison.plan import Comparison
from omega_qvla.cli.console import Console
from omega_qvla.cli.processes import CONTEXT, process_pool
from omega_qvla.evaluation.records import REFERENCE, ArmKey, EpisodeRecord
from omega_qvla.evaluation.summary import Summary, add_drift, summarise


@dataclass
class Laps:
    """Seconds by stage, in order."""

    seconds: dict[str, float] = field(default_factory=dict)
    start: float = field(default_factory=time.monotonic)

    def lap(self, stage: str) -> None:
        """The stage that ends now."""
        self.seconds[stage] = round(time.monotonic() - self.start - sum(self.seconds.values()), 1)


@dataclass(frozen=True)
class Results:
    """What a comparison has found: the records, and the summary made of them."""

    drift: Mapping[ArmKey, DriftRecord]
    episodes: tuple[EpisodeRecord, ...]
    summary: Summary


def run_comparison(plan: Comparison, console: Console, laps: Laps | None = None) -> Results:
    """Do everything that is not done yet.

    Raises:
        ConfigError: `plan.out` holds the files of another comparison.
        OmegaError: whatever a stage refuses.
    """
    laps = laps or Laps()
    plan.bind()
    mend_drift_file(drift_file(plan))
    todo = work_left(plan)
    if todo:
        collect_observations(plan, console)
        laps.lap("observations")
        _work(plan, todo, console)
        laps.lap("calibrate, quantize, verify, drift")
    episodes = play(plan, console)
    laps.lap("closed loop")
    return results(plan, episodes)


def results(plan: Comparison, episodes: Iterable[EpisodeRecord]) -> Results:
    """The comparison's own part of the records, summarised."""
    known = read_drift(drift_file(plan))
    keys = [ArmKey(*cell, arm.name) for cell in plan.cells for arm in plan.arms]
    found = {key: known[key] for key in keys if key in known}
    mine = tuple(episodes)
    return Results(found, mine, summarise_records(plan, mine, found))


def summarise_records(
    plan: Comparison, episodes: Iterable[EpisodeRecord], found: Mapping[ArmKey, DriftRecord]
) -> Summary:
    """Everything about every arm; the full-precision one has the size of what others shrink."""
    drift, bytes_of = drifts(found), sizes(found)
    for cell in plan.cells:
        full = [b for key, (_, b) in bytes_of.items() if key[:2] == cell]
        if full:
            bytes_of[ArmKey(*cell, REFERENCE)] = (max(full), max(full))
    cells, arms = plan.cells, (REFERENCE, *(arm.name for arm in plan.arms))
    ordered = sorted(
        episodes, key=lambda r: (cells.index((r.family, r.variant)), arms.index(r.arm))
    )
    return add_drift(summarise(ordered, drift, bytes_of), drift, bytes_of)


def redo(plan: Comparison, names: Iterable[str]) -> None:
    """Forget what was measured of some arms, and their packs, finished or not.

    Raises:
        ConfigError: `plan.out` holds the files of another comparison, or no such arm; then
            nothing is forgotten.
    """
    dropped = list(names)
    plan.forget(dropped)
    mend_drift_file(drift_file(plan), dropped)
    forget_episodes(results_file(plan), dropped)
    for cell in plan.cells:
        for name in dropped:
            for pack in (plan.pack(*cell, name), *plan.parts(*cell, name)):
                pack.unlink(missing_ok=True)
                shutil.rmtree(pack.with_name(f"{pack.name}.partial"), ignore_errors=True)


def work_left(plan: Comparison) -> list[Cell]:
    """The cells where something is to be built or measured."""
    measured, missing = read_drift(drift_file(plan)), unplayed(plan)
    return [
        Cell(plan, *cell)
        for cell in plan.cells
        if any(ArmKey(*cell, arm.name) not in measured for arm in plan.arms)
        or any(key[:2] == cell for key in missing)
        or (plan.layer_samples and not layers_measured(plan, *cell, measured))
    ]


def work_on(cell: Cell, said: Any) -> None:
    """Everything of a cell up to the closed loop; runs in a process of its own."""
    plan, say = cell.plan, said.put
    builder = Builder(cell, say)
    measured = read_drift(drift_file(plan))
    played = {key.arm for key in unplayed(plan) if key[:2] == (cell.name, cell.variant)}
    with_layers = plan.layer_samples and not layers_measured(
        plan, cell.name, cell.variant, measured
    )
    meter, parent = None, parent_process()
    for arm in plan.arms:
        if parent is not None and not parent.is_alive():
            return  # a run that was killed; the next one may be at work on the same files
        record = measured.get(ArmKey(cell.name, cell.variant, arm.name))
        if record is not None and arm.name not in played and not with_layers:
            continue
        seconds = builder.build(arm)
        if record is not None:
            check_pack(cell, record)
            continue
        meter = meter or DriftMeter(cell, builder.policy)
        found = meter.measure(arm.name, seconds)
        say(
            f"{cell}: drift of {arm.name}, {found.drift.count} chunks: cosine median "
            f"{found.drift.cosine_median:.4f}, min {found.drift.cosine_min:.4f}"
        )
    if with_layers:
        measure_layers(cell, builder.policy, say)


def _work(plan: Comparison, cells: list[Cell], console: Console) -> None:
    """Every cell in a process of its own, `plan.workers` at a time."""
    with CONTEXT.Manager() as manager, process_pool(plan.workers) as pool:
        said = manager.Queue()
        pending = {pool.submit(work_on, cell, said) for cell in cells}
        while pending:
            done, pending = wait(pending, timeout=0.2, return_when=FIRST_EXCEPTION)
            _drain(said, console)
            for future in done:
                future.result()


def _drain(said: Any, console: Console) -> None:
    while True:
        try:
            console.note(said.get_nowait())
        except queue.Empty:
            return
