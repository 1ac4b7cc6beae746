"""`omega-qvla eval`: policies act in a simulator, and successes are counted."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from omega_qvla.cli.console import Console
from omega_qvla.cli.eval_plan import configure_executor, configure_world, make_executor, make_plan
from omega_qvla.cli.formats import percent
from omega_qvla.cli.loading import add_pack_options
from omega_qvla.cli.parsing import add_backend, add_checkpoint, labelled
from omega_qvla.errors import ConfigError

if TYPE_CHECKING:
    from omega_qvla.evaluation.records import EpisodeRecord

DESCRIPTION = """\
Let a checkpoint, and packs of it, act in closed loop: every arm plays the same tasks
from the same initial states with the same noise. Episodes run in parallel processes, or
on a Ray cluster; each one finished is a line of the results file, and calling the verb
again with the same file goes on where it stopped (or adds arms and episodes).

Success rates come with 95% Wilson intervals, and stand with everything that they depend
on in a summary beside the results file. `omega-qvla compare` does the paired statistics.
"""
EXAMPLES = """\
  omega-qvla eval assets/pi05-metaworld --episodes 20 --out fp.jsonl
  omega-qvla eval CHECKPOINT --arm omega=omega.safetensors --arm rtn=naive.safetensors \\
      --tasks drawer-open door-open --episodes 20 --workers 2 --out results.jsonl
  omega-qvla eval CHECKPOINT --arm omega=omega.safetensors --suite libero_object libero_goal \\
      --protocol openpi --executor ray --address auto --workers 32 --gpus 1 --out libero.jsonl
  omega-qvla eval --policy oracle --policy random --suite libero_object --trials 10 --out o.jsonl
  omega-qvla eval --policy ws://127.0.0.1:8000 --suite libero_goal --out served.jsonl
  omega-qvla eval --merge machine-1.jsonl machine-2.jsonl --out merged.jsonl
"""


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the arguments."""
    add_checkpoint(parser, optional=True)
    parser.add_argument("--out", type=Path, required=True, help="results file (JSON lines)")
    parser.add_argument(
        "--arm",
        action="append",
        type=labelled,
        metavar="LABEL=PACK",
        help="a pack (or a bundle) to evaluate under this name; may be repeated",
    )
    parser.add_argument(
        "--policy",
        action="append",
        metavar="[LABEL=]NAME",
        help="what acts instead of a checkpoint: random, oracle, ws://HOST:PORT of a served "
        "policy, or module:function; may be repeated",
    )
    parser.add_argument(
        "--no-reference", action="store_true", help="leave the full-precision arm out"
    )
    parser.add_argument(
        "--variant", default="plain", help="name of the checkpoint in the records (default: plain)"
    )
    parser.add_argument(
        "--merge",
        nargs="+",
        type=Path,
        metavar="FILE",
        help="play nothing: join these results files, of one evaluation, into --out",
    )
    parser.add_argument(
        "--record", action="store_true", help="keep frames and actions of each task's first episode"
    )
    configure_world(parser)
    configure_executor(parser)
    add_pack_options(parser)
    add_backend(parser)


def run(args: argparse.Namespace, console: Console) -> int:
    """Play what is missing (or join files), and show the table."""
    from omega_qvla.evaluation.counting import arm_counts, seconds_per_episode
    from omega_qvla.evaluation.merged import summary_path, write_summary

    records = _merge(args) if args.merge else _play(args, console)
    write_summary(args.out)
    keys = list(dict.fromkeys(record.key for record in records))
    data = {}
    for key in keys:
        played = [record for record in records if record.key == key]
        data[str(key)] = {**arm_counts(played), "seconds": seconds_per_episode(played)}
    show_success(data, console)
    console.text(f"results in {args.out}, with their circumstances in {summary_path(args.out)}")
    console.result({"out": str(args.out), "summary": str(summary_path(args.out)), "arms": data})
    return 0


def _merge(args: argparse.Namespace) -> list[EpisodeRecord]:
    from omega_qvla.evaluation.merged import merge_results

    if args.checkpoint or args.arm or args.policy:
        raise ConfigError("--merge joins results files and plays nothing: leave the arms out")
    return merge_results(args.merge, args.out)


def _play(args: argparse.Namespace, console: Console) -> list[EpisodeRecord]:
    from omega_qvla.evaluation.executor import run_evaluation

    plan, executor = make_plan(args), make_executor(args)
    first = plan.episodes[0].seed
    record = [episode for episode in plan.episodes if args.record and episode.seed == first]
    console.note(f"{len(plan.arms)} arm(s), {len(plan.episodes)} episodes each")
    return run_evaluation(plan, args.out, executor=executor, record=record, progress=console.live)


def show_success(arms: Mapping[str, Mapping[str, Any]], console: Console) -> None:
    """Two tables: success by arm, and by task."""
    rows = []
    for name, arm in arms.items():
        low, high = arm["interval"]
        rows.append(
            (name, arm["episodes"], percent(arm["success"]), f"{percent(low)} to {percent(high)}",
             arm["errors"] or "", arm["policy_ms"],
             " / ".join(f"{value:.1f}" for value in arm["seconds"].values()))
        )  # fmt: skip
    columns = ("arm", "episodes", "success", "95% interval", "stopped by an error", "ms per chunk")
    console.table([*columns, "s per episode: simulation / rendering / policy"], rows)
    tasks = sorted({task for arm in arms.values() for task in arm["tasks"]})
    console.table(
        ["task", *arms],
        [
            (task, *("{successes} / {episodes}".format(**arm["tasks"][task])
                     for arm in arms.values()))
            for task in tasks
        ],
    )  # fmt: skip
