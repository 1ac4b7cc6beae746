"""`omega-qvla compare --recipes`: its options, and what it does."""

from __future__ import annotations

import argparse
from pathlib import Path

from omega_qvla.cli.console import Console
from omega_qvla.cli.parsing import at_least

#: Episodes per task and arm: 120 on the six tasks of the bundled policies.
EPISODES = 20
#: Held-out observations, and noises for each.
HELD_OUT, DRAWS = 120, 2
CALIBRATION = 48
#: Expert episodes per task: a hundred observations to calibrate on, and as many held out.
EXPERT_EPISODES = 4


def add_recipes(parser: argparse.ArgumentParser) -> None:
    """The options of a comparison of recipes."""
    group = parser.add_argument_group("recipes (builds, measures and plays every arm)")
    group.add_argument(
        "--recipes",
        action="append",
        metavar="NAME,NAME,...",
        help="presets, ablations or YAML files; `presets` or `ablations` for all of them; "
        "NAME@10: calibrated on 10 observations; NAME@cascade: the action head calibrated "
        "under the quantized backbone",
    )
    group.add_argument("--out", type=Path, metavar="DIR", help="records, tables and report")
    group.add_argument(
        "--work", type=Path, metavar="DIR", help="packs and the like (default: OUT/work)"
    )
    _add_played(group)
    _add_drawn(group)
    _add_shown(group)
    group.add_argument(
        "--workers", type=at_least(1), default=2, metavar="N", help="processes (default: 2)"
    )
    group.add_argument(
        "--no-run",
        action="store_true",
        help="build, measure and play nothing: tables of what is on record, gaps named",
    )
    group.add_argument(
        "--redo", metavar="NAME,...", help="forget what was measured of these arms first"
    )


def _add_played(group: argparse._ArgumentGroup) -> None:
    """On what the arms act: variants of the checkpoints, tasks, episodes."""
    group.add_argument(
        "--outliers", action="store_true", help="also on copies with outlier channels put in"
    )
    group.add_argument(
        "--ratio", type=float, default=100.0, help="of the outlier channels (default: 100)"
    )
    group.add_argument(
        "--episodes",
        type=at_least(0),
        metavar="N",
        help=f"per task and arm; 0: drift alone (default: {EPISODES}, 0 on recordings)",
    )
    group.add_argument("--tasks", nargs="+", metavar="TASK", help="default: all of the simulator")


def _add_drawn(group: argparse._ArgumentGroup) -> None:
    """How many observations, and how they are had."""
    group.add_argument(
        "--draws",
        type=at_least(1),
        default=DRAWS,
        metavar="N",
        help=f"noise seeds per held-out observation (default: {DRAWS})",
    )
    group.add_argument(
        "--calibration-samples",
        type=at_least(1),
        default=CALIBRATION,
        metavar="N",
        help=f"observations to calibrate on (default: {CALIBRATION})",
    )
    group.add_argument(
        "--expert-episodes",
        type=at_least(1),
        default=EXPERT_EPISODES,
        metavar="N",
        help="scripted episodes per task to calibrate on, and as many for drift "
        f"(default: {EXPERT_EPISODES})",
    )


def _add_shown(group: argparse._ArgumentGroup) -> None:
    """What only the report needs."""
    group.add_argument(
        "--layer-samples",
        type=at_least(0),
        default=0,
        metavar="N",
        help="held-out observations behind a map of drift by layer (default: 0, no map)",
    )
    group.add_argument(
        "--record",
        type=at_least(0),
        default=0,
        metavar="N",
        help="tasks of which the first episode is filmed for the report (default: 0)",
    )


def run_recipes(args: argparse.Namespace, console: Console) -> int:
    """Compare, and write the tables and the page."""
    from omega_qvla.cli.comparison.arguments import plan_from_arguments
    from omega_qvla.cli.comparison.loop import played
    from omega_qvla.cli.comparison.observations import keep_recordings
    from omega_qvla.cli.comparison.run import Laps, redo, results, run_comparison
    from omega_qvla.cli.comparison.table import show_tables, write_tables

    plan, recorded = plan_from_arguments(args)
    if args.redo:
        redo(plan, args.redo.split(","))
    if recorded:
        plan.bind()
        keep_recordings(plan, recorded)
    laps = Laps()
    if args.no_run:
        plan.bind()
        found = results(plan, played(plan))
    else:
        found = run_comparison(plan, console, laps)
    files = write_tables(plan, found)
    from omega_qvla.cli.comparison.report import make_report

    console.note("writing the report")
    report = make_report(plan, found, plan.out / "report.html")
    laps.lap("report")
    show_tables(plan, found, console)
    for path in (*files.values(), report):
        console.text(str(path))
    console.text(", ".join(f"{stage} {value:.0f} s" for stage, value in laps.seconds.items()))
    console.result(
        {
            "out": str(plan.out),
            "report": str(report),
            "families": found.summary,
            "seconds": laps.seconds,
        }
    )
    return 0
