"""`calibrate --sweep`: how drift depends on the number of calibration observations."""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from omega_qvla.calibration.samples import ObservationSet, part, pick, select_samples
from omega_qvla.calibration.sources import Source
from omega_qvla.calibration.sources.base import DEFAULT_HELD_OUT, draw
from omega_qvla.cli.console import Console
from omega_qvla.cli.loading import loading
from omega_qvla.cli.measure import drift_seeds
from omega_qvla.cli.parsing import TOKEN_CAPS
from omega_qvla.cli.recordings import held_out_of, open_recordings
from omega_qvla.cli.sources import CALIBRATION_SEED, HELD_OUT_SEED, check_options, from_simulator
from omega_qvla.errors import CalibrationError, ConfigError
from omega_qvla.evaluation.open_loop import chunk_drift, predict_chunks
from omega_qvla.evaluation.summary import drift_numbers
from omega_qvla.pack.apply import apply_pack
from omega_qvla.policies.registry import load_policy
from omega_qvla.quantize import Progress, quantize_policy

if TYPE_CHECKING:
    import numpy as np

    from omega_qvla.cli.checkpoints import Checkpoint
    from omega_qvla.config.recipe import Recipe
    from omega_qvla.policies.base import Policy


def run_sweep(
    args: argparse.Namespace, outline: Checkpoint, recipes: Sequence[Recipe], console: Console
) -> int:
    """Quantize once per recipe and number of observations; show the drift of each.

    The sets are nested, and all are measured on the same held-out observations and noise.
    """
    check_options(args)
    _check_steps(args, outline, recipes)
    sets, held = sweep_sets(args, outline, console)
    outline.policy.prepare(held.observations[:1])
    seeds = drift_seeds(held)
    console.note(f"loading {args.checkpoint}; drift on {len(held)} held-out observations")
    policy = load_policy(outline.path, device=args.device, **loading(args))
    expected = predict_chunks(policy, held.observations, seeds)
    rows = []
    for recipe in recipes:
        for samples in sets:
            chunks, backend = _quantized_chunks(
                args, outline.path, policy, recipe, samples, held, console
            )
            drift = chunk_drift(expected, chunks)
            rows.append(
                {
                    "recipe": recipe.name,
                    "samples": len(samples),
                    "episodes": len({(m.task, m.episode) for m in samples.meta}),
                    **drift_numbers(drift),
                    "backend": backend,
                }
            )
    _show(rows, held, console)
    console.result(
        {
            "checkpoint": str(args.checkpoint),
            "source": held.source,
            "seed": args.seed,
            "sweep": rows,
            "calibration": [[m.task, m.episode, m.step] for m in sets[-1].meta],
            "held_out": [[m.task, m.episode, m.step] for m in held.meta],
        }
    )
    return 0


def _check_steps(args: argparse.Namespace, outline: Checkpoint, recipes: Sequence[Recipe]) -> None:
    """Raise ConfigError where a pack would not run at the steps that drift is measured at."""
    steps = outline.policy.num_steps
    if args.num_steps in (None, steps):
        return
    for recipe in recipes:
        sides = [side for side in (recipe.backbone, recipe.action_head) if side is not None]
        schemes = [scheme for side in sides for scheme in side.schemes]
        if any(scheme.activation.static for scheme in schemes):
            raise ConfigError(
                f"--num-steps {args.num_steps}: recipe {recipe.name!r} has static scales for that "
                f"many steps, and drift is measured at the checkpoint's {steps}; leave it out"
            )


def sweep_sets(
    args: argparse.Namespace, outline: Checkpoint, console: Console
) -> tuple[list[ObservationSet], ObservationSet]:
    """One set per number of --sweep, each within the next, and the held-out observations.

    Raises:
        ConfigError: no observations are named, or nothing is held out.
        CalibrationError: too few observations, or something that cannot be read.
    """
    source: Source | None
    if args.env:
        if args.save_observations:
            raise ConfigError("a sweep keeps no observations: leave out --save-observations")
        size, most = outline.image_size, args.sweep[-1]
        source = from_simulator(args, size, console, most, CALIBRATION_SEED)
        others = from_simulator(args, size, console, args.drift_samples, HELD_OUT_SEED)
        return _nested(args, source, range(len(source.meta))), select_samples(
            others, args.drift_samples, args.seed
        )
    source = open_recordings(args, outline.policy)
    if source is None:
        raise ConfigError(
            "observations are needed: --observations PATH, --dataset DIR or --env metaworld"
        )
    held_out = DEFAULT_HELD_OUT if args.held_out is None else held_out_of(args)
    if not held_out:
        raise ConfigError("a sweep measures drift on held-out episodes: --held-out must not be 0")
    kept, others_at = part(source.meta, held_out)
    count = min(args.drift_samples, len(others_at))
    held = draw(source, count, args.seed, which="held-out", held_out=held_out)
    return _nested(args, source, kept), held


def _nested(args: argparse.Namespace, source: Source, among: Sequence[int]) -> list[ObservationSet]:
    """The set for every number of --sweep; what they share is read once."""
    most = args.sweep[-1]
    if most > len(among):
        raise CalibrationError(
            f"--sweep {most}, but there are only {len(among)} observations to calibrate on: "
            f"{source.source}"
        )
    chosen = {n: pick(source.meta, n, args.seed, among) for n in args.sweep}
    place = {index: i for i, index in enumerate(chosen[most])}
    largest = source.take(chosen[most])
    return [largest.take([place[index] for index in chosen[n]]) for n in args.sweep]


def _quantized_chunks(
    args: argparse.Namespace,
    checkpoint: Path,
    policy: Policy,
    recipe: Recipe,
    samples: ObservationSet,
    held: ObservationSet,
    console: Console,
) -> tuple[np.ndarray, str]:
    """Chunks of the policy quantized on `samples`, for the held-out observations."""
    with tempfile.TemporaryDirectory(prefix="omega-qvla-sweep-") as folder:
        out = Path(folder) / "pack.safetensors"
        with console.bar(f"{recipe.name}, {len(samples)} observations") as tick:

            def show(progress: Progress) -> None:
                tick(progress.done, progress.total, progress.layer or progress.stage)

            quantize_policy(
                policy,
                recipe,
                samples,
                out=out,
                num_steps=args.num_steps,
                token_cap=args.token_cap or TOKEN_CAPS[policy.family],
                seed=args.seed,
                progress=show,
                sides=[s for s in ("backbone", "action_head") if recipe.side(s) is not None],
            )
        quantized = load_policy(checkpoint, device=args.device, **loading(args))
        report = apply_pack(quantized, out, args.backend)
        chunks = predict_chunks(quantized, held.observations, drift_seeds(held))
    return chunks, report.backend


def _show(rows: Sequence[dict[str, Any]], held: ObservationSet, console: Console) -> None:
    episodes = len({(meta.task, meta.episode) for meta in held.meta})
    console.table(
        ["recipe", "observations", "episodes", "cosine median", "cosine min", "relative error",
         "worst channel"],
        [
            (
                row["recipe"],
                row["samples"],
                row["episodes"],
                f"{row['cosine']['median']:.5f}",
                f"{row['cosine']['min']:.5f}",
                _shown(row["relative_error"]),
                f"{row['worst_channel']['index']}: {_shown(row['worst_channel']['nmse'])}",
            )
            for row in rows
        ],
        title=f"Drift on {len(held)} observations of {episodes} held-out episodes",
    )  # fmt: skip


def _shown(value: float | None) -> str:
    """A number, or that there is none: of a channel that full precision never moves."""
    return "inf" if value is None else f"{value:.4f}"
