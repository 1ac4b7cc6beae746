"""The command line of `omega-qvla demo`."""

from __future__ import annotations

import argparse
from pathlib import Path

from omega_qvla.cli.console import Console
from omega_qvla.cli.parsing import at_least

#: Of the bundled policies, in the order of the tables.
FAMILIES = ("pi05", "groot_n15")

DESCRIPTION = """\
The whole road on two small trained policies (pi0.5's and GR00T N1.5's architecture):
collect observations in the simulator, calibrate, quantize to 4 bits in three ways,
verify, measure the drift of the actions, and let everything act in closed loop on the
same episodes. Each policy is taken twice: as trained, and with outlier channels put in
without changing its function, as large checkpoints have them.

Arms: the original in full precision; naive W4A4 (round to nearest); omega-paper (the
published recipe, emulated); omega (this project's default, made for integers).

Leaves summary.json, report.html, packs and episodes in --out. A call that was cut off
goes on where it stopped.
"""
EXAMPLES = """\
  omega-qvla demo
  omega-qvla demo --quick --out runs/quick        a minute, only to see that it runs
  omega-qvla demo --episodes 20 --out runs/long   tighter intervals, about 20 minutes
"""


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the arguments."""
    parser.add_argument(
        "--out", type=Path, default=Path("runs/demo"), help="directory (default: runs/demo)"
    )
    parser.add_argument(
        "--assets",
        type=Path,
        metavar="DIR",
        help="directory with the checkpoints (default: assets/ of the source tree or here)",
    )
    parser.add_argument(
        "--episodes", type=at_least(1), metavar="N", help="per task and arm (default: 4)"
    )
    parser.add_argument("--tasks", nargs="+", metavar="TASK", help="default: all six")
    parser.add_argument(
        "--workers", type=at_least(1), default=2, metavar="N", help="processes (default: 2)"
    )
    parser.add_argument("--families", nargs="+", choices=FAMILIES, default=list(FAMILIES))
    parser.add_argument(
        "--quick", action="store_true", help="two tasks, one episode, few observations"
    )


def run(args: argparse.Namespace, console: Console) -> int:
    """Do it."""
    from omega_qvla.cli.demo.plan import plan_from_arguments
    from omega_qvla.cli.demo.run import run_demo

    run_demo(plan_from_arguments(args), console)
    return 0
