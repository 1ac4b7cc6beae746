"""The demo from beginning to end: a comparison of three recipes, and its numbers in short."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from omega_qvla.cli.comparison.plan import Comparison
from omega_qvla.cli.comparison.run import Laps, run_comparison
from omega_qvla.cli.console import Console
from omega_qvla.cli.demo.table import brief, show_table
from omega_qvla.files import write_text


def run_demo(plan: Comparison, console: Console) -> dict[str, Any]:
    """Do everything that is not done yet; returns what summary.json holds.

    Raises:
        ConfigError: `plan.out` holds the files of another plan.
        OmegaError: whatever a stage refuses.
    """
    from omega_qvla.cli.demo.report import make_demo_report

    laps = Laps()
    results = run_comparison(plan, console, laps)
    short = brief(results.summary)
    _write_json(plan.out / "summary.json", short)
    report = plan.out / "report.html"
    console.note("writing the report")
    make_demo_report(plan, results, report)
    laps.lap("report")
    seconds = laps.seconds
    _write_json(plan.out / "details.json", {"families": results.summary, "seconds": seconds})
    show_table(plan, results.summary, report, seconds, console)
    console.result(
        {"out": str(plan.out), "report": str(report), "summary": short, "seconds": seconds}
    )
    return short


def _write_json(path: Path, data: Mapping[str, Any]) -> None:
    write_text(path, json.dumps(data, indent=2, allow_nan=False) + "\n")
