"""`omega-qvla calibrate`: statistics of a checkpoint's activations, for later builds."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from omega_qvla.cli.console import Console
from omega_qvla.cli.formats import size
from omega_qvla.cli.loading import loading
from omega_qvla.cli.parsing import (
    DRIFT_SAMPLES,
    SIDES,
    TOKEN_CAPS,
    add_calibration,
    add_checkpoint,
    add_device,
    at_least,
    counts,
)
from omega_qvla.errors import CalibrationError, ConfigError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from omega_qvla.config.recipe import Recipe
    from omega_qvla.policies.base import Policy

DESCRIPTION = """\
Run the checkpoint on a few observations and keep what its layers saw: for every layer
the second moments of its inputs, and for every denoising step a sample of them.

The file can serve several builds (`quantize --calibration FILE`). Observations come from
recordings (a file, a folder, a LeRobot dataset), or from scripted experts that act in the
simulator.

With --sweep, no file is written: the checkpoint is quantized once for each number of
observations, and the drift of the actions on held-out episodes is shown for each.
"""
EXAMPLES = """\
  omega-qvla calibrate assets/pi05-metaworld --env metaworld --num-samples 48 \\
      --save-observations observations.safetensors --out calibration.safetensors
  omega-qvla calibrate CHECKPOINT --env libero_object --num-samples 50 --out calibration.safetensors
  omega-qvla calibrate CHECKPOINT --observations observations.safetensors \\
      --recipe omega --recipe omega-paper --out calibration.safetensors
  omega-qvla calibrate CHECKPOINT --dataset DATASET --camera base=observation.images.ego_view \\
      --state-key observation.state=22:29,29:35 --out calibration.safetensors
  omega-qvla calibrate CHECKPOINT --dataset DATASET --sweep 10,50,100
"""


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the arguments."""
    add_checkpoint(parser)
    parser.add_argument("--out", type=Path, help="the file to write")
    parser.add_argument(
        "--recipe",
        action="append",
        metavar="NAME|FILE",
        help="whose layers to observe; may be repeated (default: omega)",
    )
    add_sweep(parser)
    add_device(parser)
    add_calibration(parser)


def add_sweep(parser: argparse.ArgumentParser) -> None:
    """--sweep and how its drift is measured."""
    group = parser.add_argument_group("sweep")
    group.add_argument(
        "--sweep",
        type=counts,
        metavar="N,N,...",
        help="quantize with each of these numbers of observations and show the drift",
    )
    group.add_argument(
        "--drift-samples",
        type=at_least(1),
        default=DRIFT_SAMPLES,
        metavar="N",
        help=f"held-out observations that drift is measured on (default: {DRIFT_SAMPLES})",
    )
    group.add_argument(
        "--backend", default="auto", help="what runs the quantized layers (default: auto)"
    )


def run(args: argparse.Namespace, console: Console) -> int:
    """Calibrate and write the file."""
    from omega_qvla.calibration.collect import FORMAT_NAME, calibrate
    from omega_qvla.cli.checkpoints import open_checkpoint
    from omega_qvla.cli.sources import given_observations
    from omega_qvla.cli.sweep import run_sweep
    from omega_qvla.config.presets import resolve_recipe
    from omega_qvla.pack.files import check_replaceable
    from omega_qvla.pack.lock import output_lock
    from omega_qvla.policies.registry import load_policy

    if bool(args.out) == bool(args.sweep):
        raise ConfigError("give either --out FILE or --sweep N,N,...: a sweep keeps no calibration")
    if args.out:
        check_replaceable(args.out, FORMAT_NAME, CalibrationError)
    recipes = [resolve_recipe(name) for name in args.recipe or ["omega"]]
    options = loading(args)
    outline = open_checkpoint(args.checkpoint, **options)
    names = layer_names(outline.policy, recipes)
    if args.sweep:
        return run_sweep(args, outline, recipes, console)
    samples = given_observations(args, outline, console)
    if samples is None:
        raise ConfigError(
            "observations are needed: --observations PATH, --dataset DIR or --env NAME"
        )
    console.note(f"loading {args.checkpoint}")
    policy = load_policy(outline.path, device=args.device, **options)
    console.note(f"observing {len(names)} layers on {len(samples)} observations")
    with output_lock(args.out, CalibrationError), console.bar("calibrating") as tick:
        calibration = calibrate(
            policy,
            samples,
            names,
            num_steps=args.num_steps,
            token_cap=args.token_cap or TOKEN_CAPS[outline.family],
            seed=args.seed,
            progress=lambda done, total: tick(done, total, ""),
        )
        calibration.save(args.out)
    data: dict[str, Any] = {
        "out": str(args.out),
        "bytes": args.out.stat().st_size,
        "layers": len(names),
        "observations": len(samples),
        "num_steps": calibration.provenance["num_steps"],
        "digest": calibration.digest(),
    }
    console.text(
        f"{args.out}: {len(names)} layers, {len(samples)} observations, "
        f"{data['num_steps']} denoising steps, {size(data['bytes'])}"
    )
    console.result(data)
    return 0


def layer_names(policy: Policy, recipes: Sequence[Recipe]) -> list[str]:
    """Every layer that one of the recipes quantizes, in the module's order.

    Raises:
        RecipeError: a recipe matches nothing, or a protected layer.
    """
    from omega_qvla.policies.targets import select_targets

    wanted: set[str] = set()
    for recipe in recipes:
        for side in SIDES:
            side_recipe = recipe.side(side)
            if side_recipe is not None:
                chosen = select_targets(policy, side_recipe, side, recipe.allow_protected)
                wanted.update(chosen.names)
    return [name for name, _ in policy.module.named_modules() if name in wanted]
