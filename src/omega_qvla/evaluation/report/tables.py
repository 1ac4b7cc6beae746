"""The tables and headline numbers of the page, as HTML."""

from __future__ import annotations

from collections.abc import Mapping
from html import escape
from typing import Any

from omega_qvla.evaluation.report.data import ReportData
from omega_qvla.evaluation.report.theme import arm_colours

_DASH = '<span class="none">–</span>'
_COLUMNS = (
    "arm", "success", "95% interval", "against full precision", "p", "cosine<br>median",
    "cosine<br>min", "jerk", "quantized layers",
)  # fmt: skip
#: Of these, what is known only of an arm that has played.
_OF_EPISODES = {"success", "95% interval", "against full precision", "p", "jerk"}


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
    """Per family, variant and arm: success, difference, drift, bytes.

    Where nothing was played, without the columns that only episodes fill.
    """
    arms_of = [arms for variants in data.summary.values() for arms in variants.values()]
    played = any("success" in values for arms in arms_of for values in arms.values())
    columns = [name for name in _COLUMNS if played or name not in _OF_EPISODES]
    head = f"<tr>{''.join(f'<th>{name}</th>' for name in columns)}</tr>"
    colours = arm_colours(data.arm_labels())
    body = []
    for family, variants in data.summary.items():
        for variant, arms in variants.items():
            name = escape(data.group_name(family, variant))
            episodes = max(values.get("episodes", 0) for values in arms.values())
            words = f"{episodes} episodes per arm" if episodes else "drift alone"
            body.append(
                f'<tr class="group"><th colspan="{len(columns)}">{name} '
                f"<small>{words}</small></th></tr>"
            )
            for arm, values in arms.items():
                cells = _arm_cells(data, arm, values, colours[arm])
                row = "".join(f"<td>{cells[column]}</td>" for column in columns[1:])
                featured = ' class="featured"' if arm == data.featured else ""
                body.append(f"<tr{featured}>{cells['arm']}{row}</tr>")
    return f'<div class="scroll"><table>{head}{"".join(body)}</table></div>'


def _arm_cells(
    data: ReportData, arm: str, values: Mapping[str, Any], colour: str
) -> dict[str, str]:
    """Column -> what stands there; of the first the whole header cell."""
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
    name = (
        f'<th scope="row"><i class="dot" style="background: var(--{colour})"></i>{escape(arm)}</th>'
    )
    return {
        "arm": name,
        "success": success,
        "95% interval": rates,
        "against full precision": difference,
        "p": p,
        "cosine<br>median": _cosine(cosine["median"]) if measured and cosine else _DASH,
        "cosine<br>min": _cosine(cosine["min"]) if measured and cosine else _DASH,
        "jerk": f"×{ratio['actions']:.2f}" if ratio else _DASH,
        "quantized layers": _size(values),
    }


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
