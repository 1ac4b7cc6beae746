"""`omega-qvla compare --recipes`: its options, and what it does."""

from __future__ import annotations

import argparse
import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from omega_qvla.cli.console import Console
from omega_qvla.cli.parsing import at_least
from omega_qvla.errors import ConfigError

if TYPE_CHECKING:
    from omega_qvla.calibration.samples import ObservationSet
    from omega_qvla.cli.comparison.plan import Comparison

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


def run_recipes(args: argparse.Namespace, console: Console) -> int:
    """Compare, and write the tables and the page."""
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


def plan_from_arguments(
    args: argparse.Namespace,
) -> tuple[Comparison, dict[str, ObservationSet]]:
    """The comparison of a command line, and the recordings that it is to use, if any.

    Raises:
        ConfigError: options missing or excluding each other.
        RecipeError, CheckpointError, CalibrationError: whatever does not exist.
    """
    from omega_qvla.cli.comparison.arms import parse_arms
    from omega_qvla.cli.comparison.plan import OUTLIERS, PLAIN, Comparison

    if args.out is None or not args.checkpoint:
        raise ConfigError("--recipes takes --checkpoint DIR (perhaps several) and --out DIR")
    if args.results or args.pack:
        raise ConfigError("--recipes makes its own arms: leave out results files and --pack")
    _refuse_others(args)
    arms = parse_arms(args.recipes)
    checkpoints = name_checkpoints(args.checkpoint)
    recordings = bool(args.observations or args.dataset)
    episodes = args.episodes
    if episodes is None:
        episodes = 0 if recordings else EPISODES
    labels = [arm.name for arm in arms]
    fields: dict[str, Any] = {
        "variants": (PLAIN, OUTLIERS) if args.outliers else (PLAIN,),
        "work": args.work or args.out / "work",
        "episodes": episodes,
        "workers": args.workers,
        "record": args.record if episodes else 0,
        "collect_episodes": args.expert_episodes,
        "num_samples": args.calibration_samples,
        "held_out": args.num_samples or HELD_OUT,
        "draws": args.draws,
        "layer_samples": args.layer_samples,
        "shown": "omega" if "omega" in labels else labels[-1],
        "ratio": args.ratio,
        "backend": args.backend,
        "device": args.device,
        "command": f"omega-qvla {shlex.join(sys.argv[1:])}",
    }
    recorded = _recordings(args, checkpoints, fields, [a.samples or 0 for a in arms])
    if not recordings or episodes:
        fields["env_options"] = {"size": _image_size(checkpoints)}
    tasks = _tasks(args) if not recordings or episodes else ()
    return Comparison(args.out, checkpoints, arms, tasks, **fields), recorded


#: Options of `compare` that a comparison of recipes has no use for, as argparse calls them.
_OTHERS = (
    "reference", "arms", "markdown", "videos", "episode", "act_bits", "settings", "tokenizer",
    "revision", "offline",
)  # fmt: skip


def _refuse_others(args: argparse.Namespace) -> None:
    """Raise ConfigError for an option that would change nothing."""
    given = [name for name in _OTHERS if getattr(args, name) not in (None, False)]
    given += ["missing"] if args.missing != "fallback" else []
    given += ["variant"] if args.variant != "plain" else []
    if given:
        flags = ", ".join(f"--{name.replace('_', '-')}" for name in given)
        raise ConfigError(
            f"{flags}: of no use with --recipes, which builds its arms by recipe from checkpoints "
            "that are whole and compares them with full precision; leave it out"
        )


def name_checkpoints(paths: list[Path]) -> dict[str, Path]:
    """Name -> path: the family where it tells them apart, else the directory's name.

    Raises:
        ConfigError: two directories of one name and family.
        CheckpointError: no checkpoint.
    """
    from omega_qvla.cli.checkpoints import family_of

    families = [family_of(path) for path in paths]
    names = [
        family if families.count(family) == 1 else path.resolve().name
        for family, path in zip(families, paths, strict=True)
    ]
    if len(set(names)) != len(names):
        raise ConfigError(f"checkpoints of one name: {', '.join(names)}; rename a directory")
    return dict(zip(names, paths, strict=True))


def _image_size(checkpoints: dict[str, Path]) -> int:
    from omega_qvla.cli.checkpoints import open_checkpoint

    sizes = {name: open_checkpoint(path).image_size for name, path in checkpoints.items()}
    if len(set(sizes.values())) != 1:
        raise ConfigError(f"the checkpoints see images of different sizes: {sizes}")
    return next(iter(sizes.values()))


def _tasks(args: argparse.Namespace) -> tuple[str, ...]:
    from omega_qvla.cli.sources import check_tasks
    from omega_qvla.envs.metaworld import TASKS

    return tuple(check_tasks(args.tasks or list(TASKS)))


def _recordings(
    args: argparse.Namespace,
    checkpoints: dict[str, Path],
    fields: dict[str, Any],
    samples: list[int],
) -> dict[str, ObservationSet]:
    """Calibration and held-out observations of --observations or --dataset; sets `collector`."""
    from omega_qvla.cli.checkpoints import open_checkpoint
    from omega_qvla.cli.recordings import draw_checked, held_out_of, open_recordings

    outlines = [open_checkpoint(path).policy for path in checkpoints.values()]
    source = open_recordings(args, outlines[0])
    if source is None:
        return {}
    if not held_out_of(args):
        raise ConfigError(
            "a comparison calibrates on some episodes and measures on others: --held-out must "
            "be a fraction between 0 and 1"
        )
    most = max([fields["num_samples"], *samples])
    recorded = {
        "calibration": draw_checked(args, source, "calibration", most, outlines[0]),
        "held-out": draw_checked(args, source, "held-out", fields["held_out"], outlines[0]),
    }
    for policy in outlines[1:]:
        policy.prepare(recorded["held-out"].observations[:1])
    fields["collector"] = f"{source.source}; {recorded['calibration'].digest()[:16]}"
    return recorded
