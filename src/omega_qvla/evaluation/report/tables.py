"""The tables and headline numbers of the page, as HTML."""

from __future__ import annotations

from collections.abc import Mapping
from html import escape
from typing import Any

from omega_qvla.evaluation.report.data import ReportData
from omega_qvla.evaluation.report.theme import arm_colours

_DASH = '<span class="none">–</span>'


def headline_tiles(data: ReportData) -> str:
    """One tile per family and variant: the featured arm against the reference."""
    tiles = []
    for family, variants in data.summary.items():
        for variant, arms in variants.items():
            if data.featured in arms and "paired" in arms[data.featured]:
                name = data.group_name(family, variant)
                tiles.append(_tile(data, name, arms[data.featured], arms[data.reference]))
    return f'<div class="tiles">{"".join(tiles)}</div>' if tiles else ""


def _tile(data: ReportData, name: str, arm: Mapping[str, Any], reference: Mapping[str, Any]) -> str:
    paired = arm["paired"]
    low, high = paired["interval"]
    return (
        f'<div class="tile"><h3>{escape(name)}</h3>'
        f'<p class="big">{100 * arm["success"]:.0f}%</p>'
        f"<p>of episodes solved; full precision {100 * reference['success']:.0f}%</p>"
        f"<p>{_points(paired['difference'])} points ({_points(low)} to {_points(high)}) "
        f"over {paired['episodes']} paired episodes</p></div>"
    )


def headline_table(data: ReportData) -> str:
    """Per family, variant and arm: success, difference, drift, bytes."""
    head = (
        "<tr><th>arm</th><th>success</th><th>95% interval</th>"
        "<th>against full precision</th><th>p</th>"
        "<th>cosine<br>median</th><th>cosine<br>min</th>"
        "<th>jerk</th><th>quantized layers</th></tr>"
    )
    colours = arm_colours(data.arm_labels())
    body = []
    for family, variants in data.summary.items():
        for variant, arms in variants.items():
            name = escape(data.group_name(family, variant))
            episodes = max(values.get("episodes", 0) for values in arms.values())
            words = f"{episodes} episodes per arm" if episodes else "drift alone"
            body.append(
                f'<tr class="group"><th colspan="9">{name} <small>{words}</small></th></tr>'
            )
            body += [_arm_row(data, arm, values, colours[arm]) for arm, values in arms.items()]
    return f'<div class="scroll"><table>{head}{"".join(body)}</table></div>'


def _arm_row(data: ReportData, arm: str, values: Mapping[str, Any], colour: str) -> str:
    success = rates = _DASH
    if "success" in values:
        success = f"<b>{100 * values['success']:.0f}%</b>"
        rates = "{:.0f}–{:.0f}%".format(*(100 * bound for bound in values["interval"]))
    paired, cosine = values.get("paired"), values.get("cosine")
    difference = p = _DASH
    if paired:
        d_low, d_high = paired["interval"]
        interval = f"({_points(d_low)} to {_points(d_high)})"
        difference = f"{_points(paired['difference'])} <small>{interval}</small>"
        p = f"{paired['p']:.3f}" if paired["p"] >= 0.001 else "&lt; 0.001"
    measured = cosine and arm != data.reference
    ratio = values.get("jerk_ratio")
    featured = ' class="featured"' if arm == data.featured else ""
    cells = [
        f'<th scope="row"><i class="dot" style="background: var(--{colour})"></i>'
        f"{escape(arm)}</th>",
        success,
        rates,
        difference,
        p,
        _cosine(cosine["median"]) if measured and cosine else _DASH,
        _cosine(cosine["min"]) if measured and cosine else _DASH,
        f"×{ratio['actions']:.2f}" if ratio else _DASH,
        _size(values),
    ]
    return f"<tr{featured}>{cells[0]}{''.join(f'<td>{cell}</td>' for cell in cells[1:])}</tr>"


def task_table(data: ReportData) -> str:
    """Success by task: successes of episodes, a column per arm."""
    labels = [
        label
        for label in data.arm_labels()
        if any("tasks" in arms.get(label, ()) for v in data.summary.values() for arms in v.values())
    ]
    if not labels:
        return ""
    head = "".join(f"<th>{escape(label)}</th>" for label in labels)
    body = []
    for family, variants in data.summary.items():
        for variant, arms in variants.items():
            name = escape(data.group_name(family, variant))
            body.append(f'<tr class="group"><th colspan="{len(labels) + 1}">{name}</th></tr>')
            tasks = sorted({task for values in arms.values() for task in values.get("tasks", ())})
            for task in tasks:
                cells = "".join(
                    f"<td>{_count(arms.get(label, {}).get('tasks', {}).get(task))}</td>"
                    for label in labels
                )
                body.append(f'<tr><th scope="row">{escape(task)}</th>{cells}</tr>')
    return f'<div class="scroll"><table><tr><th>task</th>{head}</tr>{"".join(body)}</table></div>'


def paired_table(data: ReportData) -> str:
    """The McNemar cells behind the differences."""
    body = []
    for family, variants in data.summary.items():
        for variant, arms in variants.items():
            for arm, values in arms.items():
                paired = values.get("paired")
                if paired:
                    cells = "".join(
                        f"<td>{paired[key]}</td>" for key in ("both", "b", "c", "neither")
                    )
                    body.append(
                        f'<tr><th scope="row">{escape(data.group_name(family, variant))}</th>'
                        f'<td class="text">{escape(arm)}</td>{cells}<td>{paired["p"]:.3g}</td></tr>'
                    )
    if not body:
        return ""
    head = (
        "<tr><th>policy</th><th>arm</th><th>both<br>succeed</th><th>only full<br>precision</th>"
        "<th>only<br>this arm</th><th>neither</th><th>p (McNemar, exact)</th></tr>"
    )
    return f'<div class="scroll"><table>{head}{"".join(body)}</table></div>'


def definitions(items: Mapping[str, str]) -> str:
    """A definition list."""
    rows = "".join(f"<dt>{escape(k)}</dt><dd>{escape(v)}</dd>" for k, v in items.items())
    return f"<dl>{rows}</dl>"


def _count(entry: Mapping[str, int] | None) -> str:
    return f"{entry['successes']} / {entry['episodes']}" if entry else _DASH


def _points(difference: float) -> str:
    """A difference of rates in percentage points, with a real minus sign."""
    return f"{100 * difference:+.1f}".replace("-", "−")


def _cosine(value: float) -> str:
    return f"{value:.4f}".replace("-", "−")


def _size(values: Mapping[str, Any]) -> str:
    size, full = values.get("layer_bytes"), values.get("layer_bytes_16bit")
    if not size or not full:
        return _DASH
    unit, name = (1 << 30, "GiB") if full >= 1 << 30 else (1 << 20, "MiB")
    return f"{size / unit:.2f} {name} <small>({100 * size / full:.0f}%)</small>"
