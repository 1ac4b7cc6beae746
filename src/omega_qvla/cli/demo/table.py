"""The demo's numbers: summary.json's schema, and the table at the end."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from omega_qvla.cli.comparison.plan import Comparison
from omega_qvla.cli.comparison.table import FAMILY_NAMES, VARIANT_NAMES
from omega_qvla.cli.console import Console
from omega_qvla.cli.formats import percent, rate, size
from omega_qvla.evaluation.records import REFERENCE

ARM_NAMES = {
    REFERENCE: "full precision",
    "rtn": "naive W4A4",
    "omega-paper": "omega-paper",
    "omega": "omega",
}
_KEYS = ("episodes", "success", "interval", "cosine", "layer_bytes", "layer_bytes_16bit")


def brief(summary: Mapping[str, Any]) -> dict[str, Any]:
    """summary.json: {family: {variant: {arm: {episodes, success, interval, cosine, bytes}}}}."""
    return {
        family: {
            variant: {arm: {key: values[key] for key in _KEYS} for arm, values in arms.items()}
            for variant, arms in variants.items()
        }
        for family, variants in summary.items()
    }


def show_table(
    plan: Comparison,
    summary: Mapping[str, Any],
    report: Path,
    seconds: Mapping[str, float],
    console: Console,
) -> None:
    """For somebody who has never seen this before."""
    rows: list[tuple[str, ...]] = []
    for family, variants in summary.items():
        for variant, arms in variants.items():
            for arm, values in arms.items():
                first = arm == REFERENCE
                policy = FAMILY_NAMES[family] if first else ""
                rows.append((policy, VARIANT_NAMES[variant] if first else "", *_cells(arm, values)))
    columns = ["policy", "checkpoint", "arm", "success (95%)", "cosine median", "cosine min",
               "quantized layers"]  # fmt: skip
    episodes = len(plan.tasks) * plan.episodes
    console.text()
    console.table(
        columns,
        rows,
        left=3,
        title=f"{episodes} episodes per arm ({len(plan.tasks)} tasks), the same for all arms",
    )
    console.text("success: episodes solved, with the 95% Wilson interval")
    console.text("cosine: of the predicted actions with full precision's, held-out observations")
    console.text("bytes: of the quantized layers in the pack, and percent of 16 bit\n")
    times = ", ".join(f"{stage} {value:.0f} s" for stage, value in seconds.items())
    console.text(f"{sum(seconds.values()):.0f} s: {times}")
    console.text(f"numbers: {plan.out / 'summary.json'}")
    console.text(f"report:  {report}")


def _cells(arm: str, values: Mapping[str, Any]) -> tuple[str, ...]:
    cosine, reference = values["cosine"], arm == REFERENCE
    stored, full = values["layer_bytes"], values["layer_bytes_16bit"]
    return (
        ARM_NAMES.get(arm, arm),
        rate(values["success"], values["interval"]),
        "1" if reference else f"{cosine['median']:.4f}",
        "1" if reference else f"{cosine['min']:.4f}",
        size(full) if reference else f"{size(stored)} ({percent(stored / full)})",
    )
