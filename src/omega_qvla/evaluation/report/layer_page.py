"""The page of `inspect --layers`: what each layer does to the drift, in four figures."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

import numpy as np

from omega_qvla.evaluation.layer_findings import LayerFinding
from omega_qvla.evaluation.report.names import short_name
from omega_qvla.evaluation.report.plots import log_ticks
from omega_qvla.evaluation.report.simple_page import html_list, html_table, write_simple_page
from omega_qvla.evaluation.report.theme import SENTINELS, figure, to_svg
from omega_qvla.evaluation.sensitivity import LeaveOut

_SIDES = {"backbone": "s2", "action_head": "s1"}
_SHOWN = 30
#: Drawn in place of what a logarithmic axis has not.
_FLOOR = 1e-8


@dataclass(frozen=True)
class LayerPage:
    """title: of the page.  notes: sentences on how it was measured.  table: (header, rows).
    curve: empty where sensitivity was not measured; chosen: the suggested entry of it."""

    title: str
    findings: Sequence[LayerFinding]
    curve: Sequence[LeaveOut]
    chosen: LeaveOut | None
    notes: Sequence[str]
    table: tuple[Sequence[str], Sequence[Sequence[str]]]


def write_layer_page(page: LayerPage, path: Path) -> Path:
    """Write it, atomically: one HTML file without an outside reference."""
    sections = [
        ("Error of every layer", "The error that a layer adds to its output, on the inputs it gets "
         "in the quantized run, as a share of the output's energy. Bar: mean over the denoising "
         "steps; tick: its worst step.", error_bars(page.findings)),
        ("Channels before and after the change of basis", "Largest channel of the layer's input "
         "over the median channel. Below the diagonal: smoothing and rotation have flattened it.",
         channel_ratios(page.findings)),
        ("Range in every denoising step", "Largest magnitude of each layer's input over the bulk "
         "(98%) of its values: every factor of two costs one of the bits.",
         range_map(page.findings)),
    ]  # fmt: skip
    if page.curve:
        sections += [
            ("Sensitivity", "Relative error of the action chunk with this layer alone quantized "
             "(dot), and what is left of the whole pack's error without it (ring); the line is "
             "the whole pack.", sensitivity_plot(page.findings, page.curve[0].error)),
            ("Leaving layers out", "Error that is left when the layers that cause most of it "
             "alone, per byte, stay in 16 bits: measured, not added up.",
             leave_out_plot(page.curve, page.chosen)),
        ]  # fmt: skip
    parts = [(heading, f"<p>{escape(text)}</p>{svg}") for heading, text, svg in sections]
    return write_simple_page(
        path,
        "omega-qvla layers",
        page.title,
        [("Summary", html_list(page.notes)), *parts, ("All layers", html_table(*page.table))],
    )


def error_bars(findings: Sequence[LayerFinding]) -> str:
    """Local error per layer, in the order of the network; the bars' colour is the side."""
    with figure(9.6, 0.7 + 0.17 * len(findings)) as (made, axes):
        axis = axes[0, 0]
        for row, layer in enumerate(findings):
            colour = SENTINELS[_SIDES[layer.side]]
            axis.barh(row, max(layer.error, _FLOOR), height=0.66, color=colour)
            axis.plot(max(layer.worst_error, _FLOOR), row, "|", color=SENTINELS["ink"], ms=6)
        _layer_axis(axis, [short_name(layer.name) for layer in findings])
        axis.set_xscale("log")
        axis.set_xlabel("error / output energy")
        return to_svg(made, "errors", "error of every layer")


def channel_ratios(findings: Sequence[LayerFinding]) -> str:
    """Channel maximum over median: before against after."""
    with figure(9.6, 4.4) as (made, axes):
        axis = axes[0, 0]
        for side, role in _SIDES.items():
            mine = [f for f in findings if f.side == side and np.isfinite(f.ratio_before)]
            axis.plot(
                [f.ratio_before for f in mine], [f.ratio_after for f in mine], "o",
                color=SENTINELS[role], ms=5, alpha=0.7, label=side.replace("_", " "),
            )  # fmt: skip
        high = max([2.0, *(f.ratio_before for f in findings if np.isfinite(f.ratio_before))])
        axis.plot([1, high], [1, high], color=SENTINELS["muted"], lw=1)
        axis.set_xscale("log")
        axis.set_yscale("log")
        axis.set_xlabel("before: largest channel / median channel")
        axis.set_ylabel("after")
        handles, labels = axis.get_legend_handles_labels()
        made.legend(handles, labels, loc="outside upper left", ncols=2)
        return to_svg(made, "ratios", "channel ratio before and after the change of basis")


def range_map(findings: Sequence[LayerFinding]) -> str:
    """Largest over bulk by step: a line per layer of the loop, the worst ones named."""
    looped = [f for f in findings if len(f.largest) > 1]
    if not looped:
        return ""
    with figure(9.6, 3.4) as (made, axes):
        axis = axes[0, 0]
        shares = {f.name: [_share(f, step) for step in sorted(f.largest)] for f in looped}
        worst = sorted(shares, key=lambda name: -max(shares[name]))[:3]
        for name, values in shares.items():
            xs = range(1, len(values) + 1)
            named = name in worst
            axis.plot(
                xs, values, "-", lw=1.8 if named else 0.8, alpha=1 if named else 0.4,
                color=SENTINELS["s2" if named else "s1"],
            )  # fmt: skip
        ends = sorted((shares[name][-1], name) for name in worst)
        for place, (value, name) in enumerate(ends):
            axis.annotate(
                short_name(name), (len(shares[name]), value), xytext=(8, 9 * (place - 1)),
                textcoords="offset points", va="center", fontsize=8, color=SENTINELS["ink"],
            )  # fmt: skip
        steps = len(next(iter(shares.values())))
        axis.set_xlim(0.8, steps + 0.45 * steps)
        axis.set_xticks(range(1, steps + 1))
        axis.set_yscale("log")
        log_ticks(axis.yaxis)
        axis.set_xlabel("denoising step")
        axis.set_ylabel("largest / bulk of |x|")
        return to_svg(made, "ranges", "activation range by step")


def sensitivity_plot(findings: Sequence[LayerFinding], everything: float) -> str:
    """The layers that matter most: alone, and the whole pack without them."""
    ranked = sorted(findings, key=lambda f: -(f.alone or 0.0))[:_SHOWN]
    with figure(9.6, 0.8 + 0.19 * len(ranked)) as (made, axes):
        axis = axes[0, 0]
        axis.axvline(everything, color=SENTINELS["muted"], lw=1)
        for row, layer in enumerate(ranked):
            colour = SENTINELS[_SIDES[layer.side]]
            axis.plot(max(layer.alone or 0, _FLOOR), row, "o", color=colour, ms=5)
            axis.plot(
                max(layer.without or 0, _FLOOR), row, "o", mec=colour, mew=1.4, ms=6,
                mfc=SENTINELS["surface"],
            )  # fmt: skip
        _layer_axis(axis, [short_name(layer.name) for layer in ranked])
        axis.set_xlim(left=0)
        axis.set_xlabel("relative error of the action chunk")
        return to_svg(made, "sensitivity", "sensitivity of the layers")


def leave_out_plot(curve: Sequence[LeaveOut], chosen: LeaveOut | None) -> str:
    """Error over bytes, one point per number of layers left out."""
    with figure(9.6, 3.2) as (made, axes):
        axis = axes[0, 0]
        xs = [entry.extra_bytes / 1024 for entry in curve]
        axis.plot(xs, [entry.error for entry in curve], "o-", color=SENTINELS["s1"])
        for x, entry in zip(xs, curve, strict=True):
            axis.annotate(
                str(len(entry.layers)), (x, entry.error), xytext=(4, 7), fontsize=8,
                textcoords="offset points", color=SENTINELS["ink"],
            )  # fmt: skip
            if entry == chosen:
                axis.plot(x, entry.error, "o", ms=11, mfc="none", mec=SENTINELS["s2"], mew=2)
        axis.set_ylim(0, 1.15 * max(entry.error for entry in curve))
        axis.set_xlabel("KiB more than the whole pack (number: layers left out)")
        axis.set_ylabel("relative error")
        return to_svg(made, "leave-out", "error against bytes of layers left out")


def _layer_axis(axis: Any, labels: Sequence[str]) -> None:
    axis.set_yticks(range(len(labels)), labels, fontsize=7.5)
    axis.set_ylim(len(labels) - 0.4, -0.6)
    axis.grid(axis="x")
    axis.grid(visible=False, axis="y")


def _share(finding: LayerFinding, step: int) -> float:
    return max(1.0, finding.largest[step] / max(finding.bulk[step], 1e-12))
