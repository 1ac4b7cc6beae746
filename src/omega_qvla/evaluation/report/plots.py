"""The figures that matplotlib draws. Each returns inline SVG."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping
from typing import Any

import numpy as np

from omega_qvla.evaluation.diagnostics import ONCE, LayerDiagnostics, Range
from omega_qvla.evaluation.report.data import DriftView, PairedEpisode, ReportData
from omega_qvla.evaluation.report.names import short_name
from omega_qvla.evaluation.report.theme import SENTINELS, arm_colours, figure, to_svg

#: 1 - cosine below this is drawn here: log axes have no zero.
_FLOOR = 1e-6


def success_bars(data: ReportData) -> str:
    """Success with Wilson intervals: one panel per family and variant, one bar per arm.

    "" where no episode was played.
    """
    groups = [
        (row, column, family, variant, {arm: v for arm, v in arms.items() if "success" in v})
        for row, column, family, variant, arms in _groups(data)
    ]
    most = max(len(group[-1]) for group in groups)
    if not most:
        return ""
    columns = max(len(variants) for variants in data.summary.values())
    rows = len(data.summary)
    colours = _colours(data)
    with figure(9.6, 0.5 + rows * (0.75 + 0.3 * most), nrows=rows, ncols=columns) as (
        made,
        axes,
    ):
        made.get_layout_engine().set(h_pad=0.12)
        for axis in axes.flat:
            axis.set_visible(False)
        for row, column, family, variant, arms in groups:
            axis = axes[row, column]
            axis.set_visible(True)
            axis.set_title(_title(data, family, variant))
            for position, (arm, values) in enumerate(arms.items()):
                _success_bar(axis, position, values, colours[arm])
            axis.set_yticks(range(len(arms)), list(map(_label, arms)))
            axis.set_ylim(len(arms) - 0.4, -0.6)
            axis.set_xlim(0, 1.22)
            axis.set_xticks([0, 0.25, 0.5, 0.75, 1], ["0", "25", "50", "75", "100%"])
            axis.grid(axis="x")
            axis.grid(visible=False, axis="y")
            axis.spines["bottom"].set_visible(False)
            axis.tick_params(axis="y", labelcolor=SENTINELS["ink"])
        return to_svg(made, "success", "success rate by family, variant and arm")


def _success_bar(axis: Any, position: int, values: Mapping[str, Any], colour: str) -> None:
    rate, (low, high) = values["success"], values["interval"]
    axis.barh(position, rate, height=0.62, color=colour)
    spread = [[max(0.0, rate - low)], [max(0.0, high - rate)]]
    axis.errorbar(rate, position, xerr=spread, color=SENTINELS["ink"], capsize=3, lw=1.1)
    axis.text(high + 0.025, position, f"{100 * rate:.0f}%", va="center", fontweight="bold")


def cosine_plot(data: ReportData) -> str:
    """1 - cosine of the action chunk (mean, median, worst), logarithmic. "" without drift."""
    colours = _colours(data)
    entries = [
        (row, column, family, variant, arm, values["cosine"])
        for row, column, family, variant, arms in _groups(data)
        for arm, values in arms.items()
        if arm != data.reference and values.get("cosine")
    ]
    if not entries:
        return ""
    rows = len(data.summary)
    columns = max(len(variants) for variants in data.summary.values())
    per_panel = max(sum(e[:2] == key for e in entries) for key in {e[:2] for e in entries})
    with figure(
        9.6, 0.6 + rows * (0.75 + 0.28 * per_panel), nrows=rows, ncols=columns, sharex=True
    ) as (made, axes):
        made.get_layout_engine().set(h_pad=0.12)
        for axis in axes.flat:
            axis.set_visible(False)
        for row, column in sorted({entry[:2] for entry in entries}):
            mine = [entry for entry in entries if entry[:2] == (row, column)]
            axis = axes[row, column]
            axis.set_visible(True)
            axis.set_title(_title(data, *mine[0][2:4]))
            for position, (*_, arm, cosine) in enumerate(mine):
                _cosine_row(axis, position, cosine, colours[arm])
            axis.set_xscale("log")
            axis.set_yticks(range(len(mine)), [_label(entry[4]) for entry in mine])
            axis.set_ylim(len(mine) - 0.4, -0.6)
            axis.grid(axis="x")
            axis.grid(visible=False, axis="y")
            log_ticks(axis.xaxis)
            axis.tick_params(axis="y", labelcolor=SENTINELS["ink"])
            axis.tick_params(axis="x", labelbottom=True)
            if row == rows - 1:
                axis.set_xlabel("1 − cosine with the original's chunk\n(left is better)")
        return to_svg(made, "cosine", "drift of the action chunk by arm")


def _title(data: ReportData, family: str, variant: str) -> str:
    """Of one of two panels side by side; a longer line would run into the other's."""
    return textwrap.fill(data.group_name(family, variant), 34)


def _label(arm: str) -> str:
    """An arm's name beside its row, in lines that leave room for the row."""
    return textwrap.fill(arm, 21)


def _cosine_row(axis: Any, position: int, cosine: Mapping[str, float], colour: str) -> None:
    median, mean, worst = (max(_FLOOR, 1 - cosine[k]) for k in ("median", "mean", "min"))
    axis.plot([median, worst], [position, position], color=colour, lw=2.2, alpha=0.45)
    axis.plot(median, position, "o", color=colour, ms=8)
    axis.plot(mean, position, "|", color=SENTINELS["ink"], ms=11, mew=1.6)
    axis.plot(worst, position, "o", mfc=SENTINELS["surface"], mec=colour, ms=7, mew=1.8)


def drift_by_step(data: ReportData, views: list[DriftView], prefix: str) -> str:
    """Accumulated NMSE of the looped layers' outputs by denoising step, one line per arm."""
    colours = _colours(data)
    with figure(9.6, 2.6) as (made, axes):
        axis = axes[0, 0]
        for view in views:
            steps: dict[int, list[float]] = {}
            for values in view.drift.accumulated.values():
                for step, value in values.items():
                    if step != ONCE:
                        steps.setdefault(step, []).append(value)
            if not steps:
                continue
            xs = sorted(steps)
            ys = [float(np.exp(np.mean(np.log(np.maximum(steps[x], 1e-12))))) for x in xs]
            axis.plot([x + 1 for x in xs], ys, "o-", color=colours[view.arm], ms=4, label=view.arm)
        axis.set_yscale("log")
        log_ticks(axis.yaxis)
        axis.set_xticks(range(1, views[0].drift.num_steps + 1))
        axis.set_xlabel("denoising step")
        axis.set_ylabel("error / signal energy")
        _legend(made, axis)
        return to_svg(made, prefix, "accumulated drift by denoising step")


def ranges(layer: LayerDiagnostics, transform: str, prefix: str) -> str:
    """Activation range per denoising step before and after the transform."""
    panels = (
        ("before", layer.ranges_before, SENTINELS["s2"]),
        (f"after {transform}", layer.ranges_after, SENTINELS["s1"]),
    )
    with figure(9.6, 2.7, ncols=2, sharey=True) as (made, axes):
        for axis, (title, by_step, colour) in zip(axes[0], panels, strict=True):
            _range_panel(axis, by_step, colour)
            axis.set_title(title)
            axis.set_xlabel("denoising step")
            axis.tick_params(axis="y", labelleft=True)
        axes[0, 0].set_ylabel("|x|")
        axes[0, 0].set_yscale("log")
        log_ticks(axes[0, 0].yaxis)
        return to_svg(made, prefix, f"activation ranges of {short_name(layer.name)} by step")


def _range_panel(axis: Any, by_step: Mapping[int, Range], colour: str) -> None:
    steps = sorted(by_step)
    xs = [step + 1 for step in steps]
    bulk = np.array([max(abs(by_step[s].p01), abs(by_step[s].p99)) for s in steps])
    largest = np.array([max(abs(by_step[s].low), abs(by_step[s].high)) for s in steps])
    bulk, largest = np.maximum(bulk, 1e-9), np.maximum(largest, 1e-9)
    axis.fill_between(xs, bulk, largest, color=colour, alpha=0.22, lw=0)
    axis.plot(xs, largest, "o-", color=colour, ms=4)
    axis.plot(xs, bulk, "o-", color=colour, ms=4, mfc=SENTINELS["surface"])
    # Words at the lines' ends instead of a legend: nothing to look up.
    for values, text in (
        (largest, f"largest: {largest[-1] / bulk[-1]:.1f}×"),
        (bulk, "bulk (98%)"),
    ):
        axis.annotate(
            text,
            (xs[-1], values[-1]),
            xytext=(8, 0),
            textcoords="offset points",
            va="center",
            fontsize=8,
            color=SENTINELS["ink"],
        )
    axis.set_xticks(xs)
    axis.set_xlim(0.5, len(xs) + 0.5 + 0.24 * len(xs))


def channels(layer: LayerDiagnostics, transform: str, prefix: str) -> str:
    """Largest magnitude per input channel, in units of the median channel."""
    panels = (
        ("before", layer.channels_before, layer.ratio_before, SENTINELS["s2"]),
        (f"after {transform}", layer.channels_after, layer.ratio_after, SENTINELS["s1"]),
    )
    with figure(9.6, 2.5, ncols=2, sharey=True) as (made, axes):
        for axis, (title, values, ratio, colour) in zip(axes[0], panels, strict=True):
            unit = float(np.median(values)) or 1.0
            xs, heights = _thinned(values / unit)
            axis.vlines(xs, 0, heights, color=colour, lw=1.1)
            axis.set_title(f"{title}: up to {ratio:.1f}× the median")
            axis.set_xlabel("input channel")
            axis.set_xlim(-1, len(values))
            axis.set_ylim(bottom=0)
            axis.tick_params(axis="y", labelleft=True)
        axes[0, 0].set_ylabel("max |x| / median channel")
        return to_svg(made, prefix, f"channel magnitudes of {short_name(layer.name)}")


def _thinned(values: np.ndarray, most: int = 1024) -> tuple[np.ndarray, np.ndarray]:
    """(channel, height): of every few neighbours the largest, so that no spike is lost."""
    stride = -(-len(values) // most)
    padded = np.pad(values, (0, -len(values) % stride)).reshape(-1, stride)
    return np.arange(len(padded)) * stride, padded.max(axis=1)


def log_ticks(axis: Any) -> None:
    """Decades only, or 1-2-5 where fewer than two decades are in view."""
    from matplotlib.ticker import (
        LogFormatterSciNotation,
        LogLocator,
        NullLocator,
        StrMethodFormatter,
    )

    low, high = axis.get_view_interval()
    narrow = high < 100 * low
    axis.set_major_locator(LogLocator(subs=(1, 2, 5) if narrow else (1,)))
    axis.set_major_formatter(StrMethodFormatter("{x:g}") if narrow else LogFormatterSciNotation())
    axis.set_minor_locator(NullLocator())


def action_traces(data: ReportData, episode: PairedEpisode, prefix: str) -> str:
    """Executed actions of each arm over the episode, one panel per action channel."""
    colours = _colours(data)
    dims = max(trace.actions.shape[1] for trace in episode.traces.values())
    names = [*data.action_names, *(f"action {i}" for i in range(len(data.action_names), dims))]
    with figure(9.6, 0.6 + 1.15 * dims, nrows=dims, sharex=True) as (made, axes):
        for dim in range(dims):
            axis = axes[dim, 0]
            for arm, trace in episode.traces.items():
                xs = np.arange(len(trace.actions))
                axis.step(xs, trace.actions[:, dim], where="post", color=colours[arm], label=arm)
                if trace.success and len(xs):
                    axis.plot(xs[-1], trace.actions[-1, dim], "o", color=colours[arm], ms=5)
            axis.set_ylabel(names[dim], rotation=0, ha="right", va="center")
            axis.set_ylim(-1.12, 1.12)
            axis.set_yticks([-1, 0, 1])
        axes[-1, 0].set_xlabel("control step (a dot ends a successful episode)")
        _legend(made, axes[0, 0])
        return to_svg(made, prefix, f"actions in {episode.task} by arm")


def _legend(made: Any, axis: Any) -> None:
    handles, labels = axis.get_legend_handles_labels()
    made.legend(handles, labels, loc="outside upper left", ncols=max(1, len(labels)))


def _colours(data: ReportData) -> dict[str, str]:
    return {arm: SENTINELS[role] for arm, role in arm_colours(data.arm_labels()).items()}


def _groups(data: ReportData) -> list[tuple[int, int, str, str, Mapping[str, Any]]]:
    """(row, column, family, variant, arms): a family per row, a variant per column."""
    return [
        (row, column, family, variant, arms)
        for row, (family, variants) in enumerate(data.summary.items())
        for column, (variant, arms) in enumerate(variants.items())
    ]
