"""`omega-qvla eval`: policies act in a simulator, and successes are counted."""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from omega_qvla.cli.console import Console
from omega_qvla.cli.formats import percent
from omega_qvla.cli.loading import add_pack_options, loading, pack_options
from omega_qvla.cli.parsing import add_backend, add_checkpoint, at_least, labelled, unique
from omega_qvla.errors import ConfigError

if TYPE_CHECKING:
    from omega_qvla.cli.checkpoints import Checkpoint
    from omega_qvla.evaluation.plan import Plan
    from omega_qvla.evaluation.records import Arm, EpisodeRecord

DESCRIPTION = """\
Let a checkpoint, and packs of it, act in closed loop: every arm plays the same tasks
from the same initial states with the same noise. Episodes run in parallel processes;
each one finished is a line of the results file, and calling the verb again with the
same file goes on where it stopped (or adds arms and episodes).

Success rates come with 95% Wilson intervals. `omega-qvla compare` does the paired
statistics on the results file.
"""
EXAMPLES = """\
  omega-qvla eval assets/pi05-metaworld --episodes 20 --out fp.jsonl
  omega-qvla eval CHECKPOINT --arm omega=omega.safetensors --arm rtn=naive.safetensors \\
      --tasks drawer-open door-open --episodes 20 --workers 2 --out results.jsonl
"""
#: Name of the arm that a bundle is, where it stands in the checkpoint's place.
BUNDLE = "bundle"


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the arguments."""
    add_checkpoint(parser)
    parser.add_argument("--out", type=Path, required=True, help="results file (JSON lines)")
    parser.add_argument(
        "--arm",
        action="append",
        type=labelled,
        metavar="LABEL=PACK",
        help="a pack (or a bundle) to evaluate under this name; may be repeated",
    )
    parser.add_argument(
        "--no-reference", action="store_true", help="leave the full-precision arm out"
    )
    parser.add_argument(
        "--variant", default="plain", help="name of the checkpoint in the records (default: plain)"
    )
    parser.add_argument("--tasks", nargs="+", metavar="TASK", help="default: all of the simulator")
    parser.add_argument(
        "--episodes", type=at_least(1), default=20, metavar="N", help="per task (default: 20)"
    )
    parser.add_argument(
        "--first-seed", type=at_least(0), default=0, metavar="N", help="skip this many seeds"
    )
    parser.add_argument(
        "--workers", type=at_least(0), default=2, metavar="N", help="processes (default: 2)"
    )
    parser.add_argument(
        "--env",
        default="metaworld",
        metavar="NAME",
        help="metaworld, or module:function that makes an environment for a task "
        "(then name --tasks)",
    )
    parser.add_argument(
        "--execute", type=at_least(1), default=5, metavar="N", help="actions used of each chunk"
    )
    parser.add_argument(
        "--max-steps", type=at_least(1), default=200, metavar="N", help="then it has failed"
    )
    parser.add_argument(
        "--record", action="store_true", help="keep frames and actions of each task's first episode"
    )
    add_pack_options(parser)
    add_backend(parser)


def run(args: argparse.Namespace, console: Console) -> int:
    """Play what is missing, and show the table."""
    from omega_qvla.evaluation.executor import run_evaluation

    plan = make_plan(args)
    first = plan.episodes[0].seed
    record = [episode for episode in plan.episodes if args.record and episode.seed == first]
    console.note(f"{len(plan.arms)} arm(s), {len(plan.episodes)} episodes each")
    records = run_evaluation(
        plan, args.out, workers=args.workers, record=record, progress=console.live
    )
    data = {str(arm.key): arm_result([r for r in records if r.key == arm.key]) for arm in plan.arms}
    show_success(data, console)
    console.text(f"results in {args.out}")
    console.result({"out": str(args.out), "arms": data})
    return 0


def make_plan(args: argparse.Namespace) -> Plan:
    """The evaluation that the arguments describe. Raises ConfigError, CheckpointError."""
    from omega_qvla.cli.checkpoints import open_checkpoint
    from omega_qvla.envs.metaworld import TASKS, eval_seeds
    from omega_qvla.evaluation.plan import Plan, episodes
    from omega_qvla.evaluation.records import Protocol

    options = loading(args)
    outline = open_checkpoint(args.checkpoint, **options)
    env_options: dict[str, Any] = {}
    tasks: Sequence[str] = args.tasks or ()
    if args.env == "metaworld":
        from omega_qvla.cli.sources import check_tasks

        tasks = check_tasks(tasks or list(TASKS))
        env_options = {"size": outline.image_size}
    if not tasks:
        raise ConfigError(f"--tasks is needed for the environment {args.env}")
    return Plan(
        arms=_arms(args, outline, options),
        episodes=episodes(list(tasks), eval_seeds(args.episodes, args.first_seed)),
        protocol=Protocol(execute=args.execute, max_steps=args.max_steps),
        env=args.env,
        env_options=env_options,
    )


def _arms(
    args: argparse.Namespace, outline: Checkpoint, options: Mapping[str, Any]
) -> tuple[Arm, ...]:
    from omega_qvla.bundle.manifest import is_bundle
    from omega_qvla.evaluation.records import REFERENCE

    reference = BUNDLE if is_bundle(args.checkpoint) else REFERENCE
    packs: dict[str, str | None] = {} if args.no_reference else {reference: None}
    for label, pack in unique(args.arm, "arm").items():
        if label in packs:
            raise ConfigError(f"the arm {REFERENCE!r} is the checkpoint itself; rename the pack's")
        if pack is not None and is_bundle(args.checkpoint):
            raise ConfigError(f"{args.checkpoint} is a bundle: it takes no pack, leave {label} out")
        packs[label] = pack
    if not packs:
        raise ConfigError("--no-reference leaves nothing to evaluate: give --arm LABEL=PACK")
    if args.act_bits is not None and not any(packs.values()) and not is_bundle(outline.path):
        raise ConfigError("--act-bits are of a pack's activations: give --arm LABEL=PACK")
    return tuple(_arm(args, label, pack, outline, options) for label, pack in packs.items())


def _arm(
    args: argparse.Namespace,
    label: str,
    pack: str | None,
    outline: Checkpoint,
    options: Mapping[str, Any],
) -> Arm:
    """The checkpoint (or the bundle in its place), the checkpoint with a pack, or a bundle."""
    from omega_qvla.bundle.manifest import is_bundle
    from omega_qvla.evaluation.records import Arm

    subject = str(outline.path) if pack is None or not is_bundle(pack) else pack
    quantized = pack is not None or is_bundle(subject)
    settled: dict[str, Any] = pack_options(args) if quantized else {}
    if not is_bundle(subject):
        settled |= {
            "settings": options["settings"],
            "tokenizer": None if args.tokenizer is None else str(args.tokenizer),
            "offline": args.offline,
            "pack": pack,
        }
    return Arm(
        label,
        subject,
        outline.family,
        args.variant,
        backend=args.backend,
        device=args.device,
        **settled,
    )


def arm_result(records: Sequence[EpisodeRecord]) -> dict[str, Any]:
    """Success of one arm, JSON-ready."""
    from omega_qvla.evaluation.statistics import wilson

    successes = sum(record.success for record in records)
    tasks: dict[str, list[bool]] = {}
    for record in records:
        tasks.setdefault(record.task, []).append(record.success)
    times = sorted(1000 * r.policy_s / r.replans for r in records if r.replans)
    return {
        "episodes": len(records),
        "successes": successes,
        "success": successes / len(records),
        "interval": list(wilson(successes, len(records))),
        "tasks": {t: {"episodes": len(o), "successes": sum(o)} for t, o in tasks.items()},
        "errors": sum(record.error is not None for record in records),
        "policy_ms": round(times[len(times) // 2], 2) if times else None,
    }


def show_success(arms: Mapping[str, Mapping[str, Any]], console: Console) -> None:
    """Two tables: success by arm, and by task."""
    rows = []
    for name, arm in arms.items():
        low, high = arm["interval"]
        rows.append(
            (name, arm["episodes"], percent(arm["success"]), f"{percent(low)} to {percent(high)}",
             arm["errors"] or "", arm["policy_ms"])
        )  # fmt: skip
    console.table(
        ["arm", "episodes", "success", "95% interval", "stopped by an error", "ms per chunk"], rows
    )
    tasks = sorted({task for arm in arms.values() for task in arm["tasks"]})
    console.table(
        ["task", *arms],
        [
            (task, *("{successes} / {episodes}".format(**arm["tasks"][task])
                     for arm in arms.values()))
            for task in tasks
        ],
    )  # fmt: skip
