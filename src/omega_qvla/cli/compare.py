"""`omega-qvla compare`: two or more arms side by side, paired."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from omega_qvla.cli.comparison.verb import HELD_OUT, add_recipes, run_recipes
from omega_qvla.cli.console import Console
from omega_qvla.cli.episode import add_episode, run_episode
from omega_qvla.cli.flips import check_settings, configure_pairs, show_pairs
from omega_qvla.cli.formats import percent, rate, size
from omega_qvla.cli.loading import add_loading, add_pack_options, loading, pack_options
from omega_qvla.cli.parsing import (
    DRIFT_SAMPLES,
    add_backend,
    add_recordings,
    at_least,
    labelled,
)
from omega_qvla.errors import ConfigError, EvaluationError

if TYPE_CHECKING:
    from omega_qvla.evaluation.open_loop import Drift
    from omega_qvla.evaluation.records import ArmKey, EpisodeRecord

DESCRIPTION = """\
Compare arms with a reference (the full-precision one unless told otherwise).

From results files (`omega-qvla eval`): success with Wilson intervals, the difference of
the paired success rates with its interval (Tango), McNemar's exact p, and the jerk of
the executed actions relative to the reference's; which tasks and episodes differ, how
many episodes a difference would take to be seen, and films of the flipped episodes.
With --checkpoint, --pack and --observations or --dataset: drift, the cosine between the
action chunks of the packs and of the checkpoint on the same observations and the same
noise. Of a dataset or a folder, only the episodes that calibration leaves alone are used.

With --episode as well: the packs along one recorded episode, in open loop. The actions that
each arm commands are joined to a trajectory and compared joint by joint: error, jerk, size
of the steps, gripper switches.

With --recipes: everything from the beginning. Each recipe is built on each checkpoint from
one shared calibration, its drift is measured on held-out observations, and all arms play
the same episodes in the simulator; OUT gets the records (drift.jsonl, episodes.jsonl), the
tables (comparison.md, comparison.csv, summary.json) and report.html. A run that was cut off
goes on where it was; more recipes, checkpoints or episodes may join later.
"""
EXAMPLES = """\
  omega-qvla compare results.jsonl --videos flips
  omega-qvla compare results.jsonl --checkpoint CHECKPOINT --pack omega=omega.safetensors \\
      --observations held-out.safetensors --markdown comparison.md
  omega-qvla compare --checkpoint CHECKPOINT --pack omega=omega.safetensors --pack rtn=naive.safetensors \\
      --observations held-out.safetensors --json
  omega-qvla compare --checkpoint CHECKPOINT --pack omega=omega.safetensors \\
      --dataset DATASET --episode 3 --out runs/open-loop
  omega-qvla compare --recipes rtn,quarot-w4a4,omega --checkpoint assets/pi05-metaworld \\
      --checkpoint assets/groot-n15-metaworld --outliers --out runs/comparison
  omega-qvla compare --recipes ablations,omega@10 --checkpoint CHECKPOINT --dataset DATASET \\
      --out runs/ablations
"""  # noqa: E501


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the arguments."""
    parser.add_argument("results", nargs="*", type=Path, help="results files of `eval`")
    parser.add_argument("--reference", metavar="ARM", help="compare with this arm")
    parser.add_argument("--arms", nargs="+", metavar="ARM", help="only these (and the reference)")
    parser.add_argument("--markdown", type=Path, metavar="FILE", help="also write a table there")
    configure_pairs(parser)
    drift = parser.add_argument_group("drift")
    drift.add_argument(
        "--checkpoint",
        action="append",
        type=Path,
        metavar="DIR",
        help="may be repeated with --recipes",
    )
    drift.add_argument(
        "--pack", action="append", type=labelled, metavar="LABEL=FILE", help="may be repeated"
    )
    add_recordings(drift)
    drift.add_argument(
        "--num-samples",
        type=at_least(1),
        metavar="N",
        help=f"use so many of them (default: all of a file, {DRIFT_SAMPLES} of a dataset; "
        f"{HELD_OUT} with --recipes)",
    )
    drift.add_argument("--variant", default="plain", help="of the checkpoint (default: plain)")
    add_loading(parser)
    add_pack_options(parser)
    add_backend(parser)
    add_episode(parser)
    add_recipes(parser)


def run(args: argparse.Namespace, console: Console) -> int:
    """Compare and show."""
    from omega_qvla.evaluation.records import REFERENCE

    if args.recipes:
        return run_recipes(args, console)
    if args.episode is not None:
        return run_episode(args, console)
    if args.out is not None:
        raise ConfigError("--out goes with --recipes and --episode")
    if not args.results and not args.pack:
        raise ConfigError(
            "nothing to compare: give results files, --checkpoint with --pack, or --recipes"
        )
    check_settings(args.results)
    reference = args.reference or REFERENCE
    records = _records(args, reference)
    drift, sizes = _drift(args, console) if args.pack else ({}, {})
    summary = _summary(records, drift, sizes, reference)
    rows = [
        _row(family, variant, arm, values)
        for family, variants in summary.items()
        for variant, arms in variants.items()
        for arm, values in arms.items()
    ]
    columns, rows = _filled(rows)
    console.table(columns, rows, left=_NAMES)
    pairs = show_pairs(args, records, reference, console)
    if args.markdown is not None:
        _write_markdown(args.markdown, columns, rows)
        console.text(f"table in {args.markdown}")
    console.result({"reference": reference, "families": summary, "pairs": pairs})
    return 0


def _records(args: argparse.Namespace, reference: str) -> list[EpisodeRecord]:
    from omega_qvla.evaluation.results import read_results

    found: dict[tuple[Any, Any], EpisodeRecord] = {}
    for path in args.results:
        for record in read_results(path)[1]:
            if args.arms is None or record.arm in (*args.arms, reference):
                known = found.setdefault((record.key, record.episode), record)
                if known.outcome() != record.outcome():
                    raise EvaluationError(
                        f"{path}: {record.key} on {record.task}, seed {record.seed}, went "
                        "differently in another of the results files; compare one run at a time"
                    )
    arms = {record.arm for record in found.values()}
    missing = sorted({*(args.arms or ()), reference} - arms) if args.results else []
    if missing:
        raise EvaluationError(
            f"no episodes of {', '.join(missing)} in the results; there are: "
            f"{', '.join(sorted(arms)) or 'none'}"
        )
    return list(found.values())


def _drift(
    args: argparse.Namespace, console: Console
) -> tuple[dict[ArmKey, Drift], dict[ArmKey, tuple[int, int]]]:
    """Drift and sizes of every --pack."""
    from omega_qvla.cli.checkpoints import open_checkpoint
    from omega_qvla.cli.measure import drift_seeds, named_packs
    from omega_qvla.cli.recordings import check_unseen, draw_checked, held_out_of, open_recordings
    from omega_qvla.evaluation.open_loop import chunk_drift, predict_chunks
    from omega_qvla.evaluation.records import ArmKey
    from omega_qvla.runtime.engine import Engine

    if not args.checkpoint or (args.observations is None) == (args.dataset is None):
        raise ConfigError(
            "drift takes --checkpoint, --pack and --observations together (or --dataset for "
            "--observations)"
        )
    if len(args.checkpoint) > 1:
        raise ConfigError("packs are of one checkpoint: give one --checkpoint")
    (checkpoint,) = args.checkpoint
    packs = named_packs(args)
    options = loading(args)
    outline = open_checkpoint(checkpoint, **options)
    source = open_recordings(args, outline.policy)
    assert source is not None
    count = args.num_samples
    if count is None and held_out_of(args):  # a dataset: all its frames could be a million
        count = DRIFT_SAMPLES
    samples = draw_checked(args, source, "held-out", count, outline.policy)
    if held_out_of(args):
        for label, pack in packs.items():
            check_unseen(label, pack, samples)
    observations, seeds = samples.observations, drift_seeds(samples)
    console.note(f"drift on {len(samples)} observations: full precision")
    options |= {"device": args.device}
    policy = Engine.load(outline.path, **options).policy
    expected = predict_chunks(policy, observations, seeds)
    drift, sizes = {}, {}
    for label, pack in packs.items():
        console.note(f"drift: {label}")
        engine = Engine.load(
            outline.path, pack, backend=args.backend, **options, **pack_options(args)
        )
        key = ArmKey(policy.family, args.variant, label)
        drift[key] = chunk_drift(expected, predict_chunks(engine.policy, observations, seeds))
        if engine.report is not None:
            sizes[key] = (engine.report.layer_bytes, engine.report.layer_bytes_16bit)
    return drift, sizes


def _summary(
    records: list[EpisodeRecord],
    drift: Mapping[ArmKey, Drift],
    sizes: Mapping[ArmKey, tuple[int, int]],
    reference: str,
) -> dict[str, Any]:
    from omega_qvla.evaluation.summary import add_drift, summarise

    return add_drift(summarise(records, drift, sizes, reference=reference), drift, sizes)


COLUMNS = (
    "family", "variant", "arm", "success (95%)", "difference (95%), points", "only reference / "
    "only arm", "p", "cosine median", "cosine min", "jerk", "layers",
)  # fmt: skip
_NAMES = 3  # columns that say whose row it is


def _row(family: str, variant: str, arm: str, values: Mapping[str, Any]) -> tuple[str, ...]:
    paired, cosine, jerk = (values.get(k) for k in ("paired", "cosine", "jerk_ratio"))
    difference = pair = p = ""
    if paired:
        low, high = (100 * bound for bound in paired["interval"])
        difference = f"{100 * paired['difference']:+.1f} ({low:+.1f} to {high:+.1f})"
        pair, p = f"{paired['b']} / {paired['c']}", f"{paired['p']:.3f}"
    stored, full = values.get("layer_bytes"), values.get("layer_bytes_16bit")
    return (
        family,
        variant,
        arm,
        rate(values["success"], values["interval"]) if "success" in values else "",
        difference,
        pair,
        p,
        f"{cosine['median']:.4f}" if cosine else "",
        f"{cosine['min']:.4f}" if cosine else "",
        f"x{jerk['actions']:.2f}" if jerk else "",
        f"{size(stored)} ({percent(stored / full)})" if stored and full else "",
    )


def _filled(rows: list[tuple[str, ...]]) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    """Columns and rows without what is empty in all rows: success where drift alone was asked."""
    kept = [i for i in range(len(COLUMNS)) if i < _NAMES or any(row[i] for row in rows)]
    return tuple(COLUMNS[i] for i in kept), [tuple(row[i] for i in kept) for row in rows]


def _write_markdown(path: Path, columns: tuple[str, ...], rows: list[tuple[str, ...]]) -> None:
    from omega_qvla.cli.comparison.table import table_text
    from omega_qvla.files import write_text

    text = table_text(columns, rows)
    write_text(path, text)
