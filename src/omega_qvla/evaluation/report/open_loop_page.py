"""The page of `compare --episode`: commanded trajectories of all arms, joint by joint."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from omega_qvla.evaluation.report.simple_page import html_list, html_table, write_simple_page
from omega_qvla.evaluation.report.theme import SENTINELS, arm_colours, figure, to_svg


def write_open_loop_page(
    path: Path,
    title: str,
    trajectories: Mapping[str, np.ndarray],
    recorded: np.ndarray | None,
    tables: Sequence[tuple[str, Sequence[str], Sequence[Sequence[str]]]],
    notes: Sequence[str],
) -> Path:
    """Write it, atomically: one HTML file without an outside reference.

    tables: (heading, columns, rows) each.
    """
    figures = html_list(notes) + joint_plot(trajectories, recorded)
    parts = [(heading, html_table(columns, rows)) for heading, columns, rows in tables]
    return write_simple_page(
        path, "omega-qvla open loop", title, [("Commanded actions", figures), *parts]
    )


def joint_plot(trajectories: Mapping[str, np.ndarray], recorded: np.ndarray | None) -> str:
    """One panel per joint, one line per arm; the recorded actions dotted."""
    colours = arm_colours(list(trajectories))
    joints = next(iter(trajectories.values())).shape[1]
    columns = 1 if joints <= 8 else 2
    rows = -(-joints // columns)
    with figure(9.6, 0.7 + 1.05 * rows, nrows=rows, ncols=columns, sharex=True) as (made, axes):
        for joint, axis in enumerate(axes.T.flat):
            if joint >= joints:
                axis.set_visible(False)
                continue
            if recorded is not None:
                axis.plot(recorded[:, joint], ":", color=SENTINELS["muted"], label="recorded")
            for arm, values in trajectories.items():
                colour = SENTINELS[colours[arm]]
                axis.plot(values[:, joint], color=colour, lw=1.4, alpha=0.85, label=arm)
            axis.set_ylabel(f"{joint}", rotation=0, ha="right", va="center")
        for axis in axes[-1]:
            axis.set_xlabel("control step")
        handles, labels = axes[0, 0].get_legend_handles_labels()
        made.legend(handles, labels, loc="outside upper left", ncols=max(1, len(labels)))
        return to_svg(made, "joints", "commanded actions by joint and arm")
