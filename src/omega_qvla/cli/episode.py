"""`compare --episode`: the arms along a recorded episode, in open loop."""

from __future__ import annotations

import argparse
import csv
import io
import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from omega_qvla.cli.console import Console
from omega_qvla.cli.loading import loading, pack_options
from omega_qvla.cli.parsing import at_least
from omega_qvla.errors import ConfigError

if TYPE_CHECKING:
    import numpy as np

    from omega_qvla.calibration.samples import ObservationSet
    from omega_qvla.calibration.sources import Source
    from omega_qvla.evaluation.trajectory import TrajectoryFigures
    from omega_qvla.policies.base import Policy

EXECUTE = 5
ARM_COLUMNS = (
    "arm", "error (rms)", "from the recorded (rms)", "jerk", "delta norm",
    "gripper switches / 100 steps",
)  # fmt: skip
JOINT_COLUMNS = (
    "arm", "joint", "error (rms)", "largest error", "from the recorded (rms)", "jerk", "delta",
)  # fmt: skip


def add_episode(parser: argparse.ArgumentParser) -> None:
    """The options of an open-loop comparison."""
    group = parser.add_argument_group("open loop (along a recorded episode)")
    group.add_argument("--episode", type=int, metavar="N", help="number of the recorded episode")
    group.add_argument(
        "--episode-task", metavar="TASK", help="its task, where several have that number"
    )
    group.add_argument(
        "--execute",
        type=at_least(1),
        default=EXECUTE,
        metavar="N",
        help=f"actions of each chunk that are taken (default: {EXECUTE})",
    )
    group.add_argument(
        "--gripper",
        type=int,
        default=-1,
        metavar="COLUMN",
        help="of the actions (default: the last one)",
    )
    group.add_argument(
        "--action-key",
        action="append",
        metavar="KEY[=0:7,22]",
        help="the dataset's recorded actions, perhaps with columns (default: `action`, where it "
        "is as wide as the policy's)",
    )


def run_episode(args: argparse.Namespace, console: Console) -> int:
    """Predict, compare and show."""
    from omega_qvla.cli.checkpoints import open_checkpoint
    from omega_qvla.cli.recordings import open_recordings
    from omega_qvla.evaluation.records import REFERENCE
    from omega_qvla.evaluation.trajectory import compare_trajectories

    if args.results:
        raise ConfigError("--episode is of recordings: leave out the results files of `eval`")
    if not args.checkpoint or len(args.checkpoint) != 1 or not args.pack:
        raise ConfigError("--episode takes one --checkpoint, --pack LABEL=FILE, and recordings")
    opened = open_checkpoint(args.checkpoint[0], **loading(args))
    outline = opened.policy
    source = open_recordings(args, outline)
    if source is None:
        raise ConfigError("--episode needs recordings: --observations PATH or --dataset DIR")
    samples = _episode(args, source)
    recorded = _recorded_actions(args, source, samples, outline)
    gripper = args.gripper
    if not -outline.action_dim <= gripper < outline.action_dim:
        raise ConfigError(f"--gripper {gripper}: the policy's actions have {outline.action_dim}")
    trajectories, middle = _trajectories(args, opened.path, samples, console)
    found = compare_trajectories(trajectories, REFERENCE, recorded, gripper, middle)
    arms, joints = _arm_rows(found), _joint_rows(found)
    console.table(ARM_COLUMNS, arms)
    console.table(JOINT_COLUMNS, joints, left=2)
    first = samples.meta[0]
    data = {
        "source": samples.source,
        "task": first.task,
        "episode": first.episode,
        "steps": [meta.step for meta in samples.meta],
        "recorded_actions": recorded is not None,
        "arms": {arm: figures.to_dict() for arm, figures in found.items()},
    }
    if args.out is not None:
        notes = [
            f"episode {first.episode} of {samples.source}: {first.task}",
            f"{len(samples)} looks, {next(iter(found.values())).steps} steps; errors are against "
            "full precision on the same observations and noise",
        ]
        _write(args.out, trajectories, recorded, arms, joints, notes, data)
        console.text(str(args.out / "open-loop.html"))
    console.result(data)
    return 0


def _episode(args: argparse.Namespace, source: Source) -> ObservationSet:
    """The observations at every `execute`-th step of the episode.

    Raises:
        ConfigError: there is no such episode, or several of different tasks.
    """
    mine = [i for i, meta in enumerate(source.meta) if meta.episode == args.episode]
    tasks = sorted({source.meta[i].task for i in mine})
    if args.episode_task is not None:
        mine = [i for i in mine if source.meta[i].task == args.episode_task]
    elif len(tasks) > 1:
        raise ConfigError(
            f"episode {args.episode} is there of several tasks; say which with --episode-task: "
            f"{', '.join(tasks)}"
        )
    if not mine:
        have = sorted({meta.episode for meta in source.meta})
        shown = ", ".join(map(str, have[:8])) + (", ..." if len(have) > 8 else "")
        raise ConfigError(f"there is no episode {args.episode} in {source.source}; it has: {shown}")
    mine.sort(key=lambda index: source.meta[index].step)
    chosen, following = [], source.meta[mine[0]].step
    for index in mine:
        if source.meta[index].step >= following:
            chosen.append(index)
            following = source.meta[index].step + args.execute
    return source.take(chosen)


def _recorded_actions(
    args: argparse.Namespace, source: Source, samples: ObservationSet, policy: Policy
) -> np.ndarray | None:
    """The episode's recorded actions [T, A] from the first look on, where the source has them.

    Raises:
        ConfigError: keys are given for a source without actions.
        CalibrationError: there is no such key.
    """
    from omega_qvla.calibration.sources import LeRobotDataset, StateColumns

    if not isinstance(source, LeRobotDataset):
        if args.action_key:
            raise ConfigError("--action-key goes with --dataset: other recordings hold no actions")
        return None
    keys = [StateColumns.parse(key) for key in args.action_key or ["action"]]
    if not args.action_key and not source.has(keys[0].key):
        return None
    actions = source.actions(samples.meta[0].episode, keys)[samples.meta[0].step :]
    if not args.action_key and actions.shape[1] != policy.action_dim:
        return None
    return actions


def _trajectories(
    args: argparse.Namespace, path: Path, samples: ObservationSet, console: Console
) -> tuple[dict[str, np.ndarray], float]:
    """The trajectory of every arm, and the middle of the gripper's range."""
    from omega_qvla.cli.measure import drift_seeds, named_packs
    from omega_qvla.evaluation.records import REFERENCE
    from omega_qvla.evaluation.trajectory import gripper_middle, predict_trajectory
    from omega_qvla.runtime.engine import Engine

    packs: dict[str, str | None] = {REFERENCE: None, **named_packs(args)}
    options = {**loading(args), "device": args.device}
    steps, seeds = [meta.step for meta in samples.meta], drift_seeds(samples)
    found, middle = {}, 0.0
    for label, pack in packs.items():
        console.note(f"open loop: {label}, {len(samples)} looks")
        of_pack = {} if pack is None else {"backend": args.backend, **pack_options(args)}
        engine = Engine.load(path, pack, **options, **of_pack)
        found[label] = predict_trajectory(engine.policy, samples.observations, steps, seeds)
        if pack is None:
            middle = gripper_middle(engine.policy, samples.observations[0], args.gripper)
    return found, middle


def _arm_rows(found: Mapping[str, TrajectoryFigures]) -> list[list[str]]:
    return [
        [
            arm,
            f"{figures.error:.4g}",
            _number(figures.recorded_error),
            _number(figures.jerk),
            _number(figures.delta_norm),
            _number(figures.gripper_switches),
        ]
        for arm, figures in found.items()
    ]


def _joint_rows(found: Mapping[str, TrajectoryFigures]) -> list[list[str]]:
    return [
        [
            arm,
            str(place),
            f"{joint.error:.4g}",
            f"{joint.worst_error:.4g}",
            _number(joint.recorded_error),
            _number(joint.jerk),
            _number(joint.delta),
        ]
        for arm, figures in found.items()
        for place, joint in enumerate(figures.joints)
    ]


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.4g}"


def _write(
    folder: Path,
    trajectories: Mapping[str, np.ndarray],
    recorded: np.ndarray | None,
    arms: list[list[str]],
    joints: list[list[str]],
    notes: list[str],
    data: Mapping[str, Any],
) -> None:
    from omega_qvla.cli.comparison.table import table_text
    from omega_qvla.evaluation.report.open_loop_page import write_open_loop_page
    from omega_qvla.files import write_text

    tables = [("Arms", ARM_COLUMNS, arms), ("Joints", JOINT_COLUMNS, joints)]
    write_open_loop_page(
        folder / "open-loop.html", "Open loop", trajectories, recorded, tables, notes
    )
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows([JOINT_COLUMNS, *joints])
    contents = {
        "open-loop.csv": text.getvalue(),
        "open-loop.md": "\n".join(
            [
                *(f"- {note}" for note in notes),
                "",
                table_text(ARM_COLUMNS, arms),
                table_text(JOINT_COLUMNS, joints),
            ]
        ),
        "open-loop.json": json.dumps(data, indent=1, allow_nan=False) + "\n",
    }
    for name, content in contents.items():
        write_text(folder / name, content)
