"""A comparison's numbers as Markdown, CSV and JSON, and on the screen."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from omega_qvla.cli.comparison.drift import DriftRecord
from omega_qvla.cli.comparison.plan import OUTLIERS, PLAIN, Comparison
from omega_qvla.cli.comparison.run import Results
from omega_qvla.cli.console import Console
from omega_qvla.cli.formats import percent, rate
from omega_qvla.evaluation.records import REFERENCE, ArmKey
from omega_qvla.files import write_text

FAMILY_NAMES = {"pi05": "π0.5 architecture", "groot_n15": "GR00T N1.5 architecture"}
VARIANT_NAMES = {PLAIN: "as trained", OUTLIERS: "outlier channels"}
#: 1 - cosine is shown in thousandths: at four decimals, cosines near 1 all look alike.
_MILLI = 1000.0

Values = Mapping[str, Any]


def group_name(name: str, variant: str) -> str:
    """A checkpoint and variant in words."""
    return f"{FAMILY_NAMES.get(name, name)}, {VARIANT_NAMES.get(variant, variant)}"


def drift_table(plan: Comparison, results: Results) -> tuple[list[str], list[list[str]]]:
    """An arm per row, a cell per column: median, worst hundredth and worst 1 - cosine."""
    columns = ["arm", *(group_name(*cell) for cell in plan.cells), "bytes"]
    rows = []
    for arm in plan.arms:
        found = [results.drift.get(ArmKey(*cell, arm.name)) for cell in plan.cells]
        shares = [r.layer_bytes / r.layer_bytes_16bit for r in found if r is not None]
        if shares:
            cells = ["" if r is None else _turned(r) for r in found]
            rows.append([arm.name, *cells, percent(max(shares), 1)])
    return columns, rows


def _turned(record: DriftRecord) -> str:
    drift = record.drift
    values = (drift.cosine_median, record.cosine_p01, drift.cosine_min)
    median, rare, worst = (_MILLI * (1 - value) for value in values)
    return f"{median:.2f} / {rare:.1f} / {worst:.0f}"


SUCCESS_COLUMNS = (
    "arm", "success (95%)", "difference (95%), points", "only full precision / only arm", "p",
    "cosine median", "cosine min", "worst channel NMSE", "jerk", "bytes",
)  # fmt: skip


def success_rows(arms: Mapping[str, Values]) -> list[list[str]]:
    """One row per arm of a cell that has played."""
    return [_success_row(arm, values) for arm, values in arms.items() if "success" in values]


def _success_row(arm: str, values: Values) -> list[str]:
    paired, cosine, jerk = (values.get(k) for k in ("paired", "cosine", "jerk_ratio"))
    worst = values.get("worst_channel") or {}
    stored, full = values.get("layer_bytes"), values.get("layer_bytes_16bit")
    difference = pair = p = ""
    if paired:
        low, high = (100 * bound for bound in paired["interval"])
        difference = f"{100 * paired['difference']:+.1f} ({low:+.1f} to {high:+.1f})"
        pair = f"{paired['b']} / {paired['c']}"
        p = f"{paired['p']:.3f}" if paired["p"] >= 0.001 else "< 0.001"
    episodes = f"{values['successes']}/{values['episodes']}, "
    measured = cosine and arm != REFERENCE
    return [
        arm,
        episodes + rate(values["success"], values["interval"]),
        difference,
        pair,
        p,
        f"{cosine['median']:.4f}" if measured and cosine else "",
        f"{cosine['min']:.4f}" if measured and cosine else "",
        f"{worst['nmse']:.4f}" if worst.get("nmse") is not None else "",
        f"x{jerk['actions']:.2f}" if jerk else "",
        percent(stored / full, 1) if stored and full and arm != REFERENCE else "",
    ]


def markdown(plan: Comparison, results: Results) -> str:
    """The whole comparison: drift of all arms, then the closed loop of every cell."""
    chunks = next((record.drift.count for record in results.drift.values()), 0)
    parts = [
        f"`{plan.command}`\n",
        "## Drift\n",
        f"1 - cosine with full precision's action chunk, in thousandths: median / worst hundredth "
        f"/ worst of {chunks} chunks ({chunks // plan.draws} held-out observations, {plan.draws} "
        "noise seed(s) each). Bytes of the quantized layers, percent of 16 bit, largest cell.\n",
        _unmeasured(plan, results),
        table_text(*drift_table(plan, results)),
    ]
    for name, variants in results.summary.items():
        for variant, arms in variants.items():
            rows = success_rows(arms)
            if rows:
                parts += [
                    f"## Closed loop: {group_name(name, variant)}\n",
                    f"{_episodes(plan, arms)}\n",
                    table_text(SUCCESS_COLUMNS, rows),
                ]
    return "\n".join(parts)


def _unmeasured(plan: Comparison, results: Results) -> str:
    """Which arms lack a cell or all of them; nothing where the table is whole."""
    lacking = {
        arm.name: missing
        for arm in plan.arms
        if (missing := sum(ArmKey(*cell, arm.name) not in results.drift for cell in plan.cells))
    }
    if not lacking:
        return ""
    names = ", ".join(f"{name} ({count})" for name, count in lacking.items())
    return f"Not measured yet (in so many of {len(plan.cells)} columns): {names}.\n"


def _episodes(plan: Comparison, arms: Mapping[str, Values]) -> str:
    """How many episodes there are, and which arms have fewer than they are to have."""
    wanted = len(plan.tasks) * plan.episodes
    counts = {arm: values["episodes"] for arm, values in arms.items() if "episodes" in values}
    short = {arm: count for arm, count in counts.items() if count < wanted}
    text = f"{wanted} paired episodes per arm ({len(plan.tasks)} tasks)."
    if short:
        text += " Unfinished: " + ", ".join(f"{a} ({n})" for a, n in short.items()) + "."
    missing = [arm.name for arm in plan.arms if arm.name not in counts]
    if missing:
        text += f" Not played yet: {', '.join(missing)}."
    return text


def table_text(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table."""
    lines = [columns, ("---",) * len(columns), *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def csv_text(plan: Comparison, results: Results) -> str:
    """One row per arm of every cell, every number as it is."""
    rows = [
        _csv_row(name, variant, arm, values, results.drift.get(ArmKey(name, variant, arm)))
        for name, variants in results.summary.items()
        for variant, arms in variants.items()
        for arm, values in arms.items()
    ]
    text = io.StringIO()
    writer = csv.DictWriter(text, list(rows[0]) if rows else ["arm"], lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def _csv_row(
    name: str, variant: str, arm: str, values: Values, record: DriftRecord | None
) -> dict[str, Any]:
    paired = values.get("paired") or {}
    low, high = values.get("interval") or (None, None)
    d_low, d_high = paired.get("interval") or (None, None)
    cosine, worst = values.get("cosine") or {}, values.get("worst_channel") or {}
    return {
        "checkpoint": name,
        "variant": variant,
        "arm": arm,
        "episodes": values.get("episodes"),
        "successes": values.get("successes"),
        "success_low": low,
        "success_high": high,
        "difference": paired.get("difference"),
        "difference_low": d_low,
        "difference_high": d_high,
        "only_reference": paired.get("b"),
        "only_arm": paired.get("c"),
        "p": paired.get("p"),
        "cosine_median": cosine.get("median"),
        "cosine_p01": record.cosine_p01 if record else None,
        "cosine_min": cosine.get("min"),
        "cosine_mean": cosine.get("mean"),
        "relative_error": values.get("relative_error"),
        "worst_channel": worst.get("index"),
        "worst_channel_nmse": worst.get("nmse"),
        "layer_bytes": values.get("layer_bytes"),
        "layer_bytes_16bit": values.get("layer_bytes_16bit"),
        "backend": record.backend if record else None,
        "build_s": record.build_s if record else None,
    }


def write_tables(plan: Comparison, results: Results) -> dict[str, Path]:
    """comparison.md, comparison.csv and summary.json in the comparison's folder."""
    texts = {
        "comparison.md": markdown(plan, results),
        "comparison.csv": csv_text(plan, results),
        "summary.json": json.dumps(results.summary, indent=1, allow_nan=False) + "\n",
    }
    for name, text in texts.items():
        write_text(plan.out / name, text)
    return {name: plan.out / name for name in texts}


def show_tables(plan: Comparison, results: Results, console: Console) -> None:
    """The same on the screen."""
    columns, rows = drift_table(plan, results)
    console.table(columns, rows, title="1 - cosine, thousandths: median / worst 1% / worst")
    for name, variants in results.summary.items():
        for variant, arms in variants.items():
            played = success_rows(arms)
            if played:
                console.table(SUCCESS_COLUMNS, played, title=group_name(name, variant))
