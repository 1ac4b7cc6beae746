"""The demo from beginning to end."""

from __future__ import annotations

import json
import queue
import time
from collections.abc import Mapping
from concurrent.futures import FIRST_EXCEPTION, wait
from pathlib import Path
from typing import Any

from omega_qvla.cli.console import Console
from omega_qvla.cli.demo.arms import Cell, build_cell
from omega_qvla.cli.demo.drift import CellDrift, read_drift
from omega_qvla.cli.demo.loop import play
from omega_qvla.cli.demo.observations import collect_observations
from omega_qvla.cli.demo.plan import ARMS, DemoPlan
from omega_qvla.cli.demo.table import brief, show_table
from omega_qvla.cli.processes import CONTEXT, process_pool
from omega_qvla.evaluation.files import replace_file
from omega_qvla.evaluation.records import REFERENCE, ArmKey, EpisodeRecord
from omega_qvla.evaluation.summary import Summary, summarise

Measured = Mapping[tuple[str, str], CellDrift]


def run_demo(plan: DemoPlan, console: Console) -> dict[str, Any]:
    """Do everything that is not done yet; returns what summary.json holds.

    Raises:
        ConfigError: `plan.out` holds the files of another plan.
        OmegaError: whatever a stage refuses.
    """
    from omega_qvla.cli.demo.report import make_report

    seconds: dict[str, float] = {}
    start = time.monotonic()

    def lap(stage: str) -> None:
        seconds[stage] = round(time.monotonic() - start - sum(seconds.values()), 1)

    plan.bind()
    collect_observations(plan, console)
    lap("observations")
    _build_cells(plan, console)
    lap("calibrate, quantize, verify, drift")
    records = play(plan, console)
    lap("closed loop")
    measured = {cell: read_drift(plan.folder(*cell)) for cell in plan.cells}
    summary = summarise_demo(records, measured)
    short = brief(summary)
    _write_json(plan.out / "summary.json", short)
    report = plan.out / "report.html"
    console.note("writing the report")
    make_report(plan, summary, records, measured, report)
    lap("report")
    details = {"families": summary, "seconds": seconds}
    _write_json(plan.out / "details.json", details)
    show_table(plan, summary, report, seconds, console)
    console.result(
        {"out": str(plan.out), "report": str(report), "summary": short, "seconds": seconds}
    )
    return short


def summarise_demo(records: list[EpisodeRecord], measured: Measured) -> Summary:
    """Everything about every arm; the full-precision one has the size of what others shrink."""
    drift, sizes = {}, {}
    for (family, variant), found in measured.items():
        drift.update({ArmKey(family, variant, arm): d for arm, d in found.drift.items()})
        sizes.update({ArmKey(family, variant, arm): s for arm, s in found.sizes.items()})
        full = max(full for _, full in found.sizes.values())
        sizes[ArmKey(family, variant, REFERENCE)] = (full, full)
    cells, arms = list(measured), (REFERENCE, *ARMS)
    ordered = sorted(records, key=lambda r: (cells.index((r.family, r.variant)), arms.index(r.arm)))
    return summarise(ordered, drift, sizes)


def _build_cells(plan: DemoPlan, console: Console) -> None:
    """Every cell in a process of its own, `plan.workers` at a time."""
    with CONTEXT.Manager() as manager, process_pool(plan.workers) as pool:
        said = manager.Queue()
        pending = {
            pool.submit(build_cell_in_process, Cell(plan, *cell), said) for cell in plan.cells
        }
        while pending:
            done, pending = wait(pending, timeout=0.2, return_when=FIRST_EXCEPTION)
            _drain(said, console)
            for future in done:
                future.result()


def build_cell_in_process(cell: Cell, said: Any) -> None:
    """`build_cell`, its progress put into a queue."""
    build_cell(cell, said.put)


def _drain(said: Any, console: Console) -> None:
    while True:
        try:
            console.note(said.get_nowait())
        except queue.Empty:
            return


def _write_json(path: Path, data: Mapping[str, Any]) -> None:
    with replace_file(path) as stream:
        stream.write((json.dumps(data, indent=2, allow_nan=False) + "\n").encode())
