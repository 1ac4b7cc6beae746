"""`omega-qvla quantize`: a checkpoint in, a 4-bit pack out."""

from __future__ import annotations

import argparse
import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Any

from omega_qvla.cli.building import follow, show_report
from omega_qvla.cli.console import Console
from omega_qvla.cli.formats import percent, size
from omega_qvla.cli.loading import loading
from omega_qvla.cli.overrides import add_overrides, override
from omega_qvla.cli.parsing import SIDES, TOKEN_CAPS, add_calibration, add_checkpoint, add_device
from omega_qvla.cli.published import add_published, convert
from omega_qvla.config.recipe import Recipe
from omega_qvla.errors import ConfigError, RecipeError

if TYPE_CHECKING:
    from omega_qvla.calibration.collect import Calibration
    from omega_qvla.calibration.samples import ObservationSet
    from omega_qvla.cli.checkpoints import Checkpoint

DESCRIPTION = """\
Quantize a checkpoint's linear layers to 4 bits by a recipe, and write them as one pack.
The checkpoint itself is not changed; to act, the pack goes on top of it.

Recipes that look at activations (all but rtn) need observations: recorded ones, ones
collected in the simulator, or a calibration made before. A build that was cut off goes
on where it stopped when it is called again with the same arguments.
"""
EXAMPLES = """\
  omega-qvla quantize assets/pi05-metaworld --env metaworld --num-samples 48 --out pi05.safetensors
  omega-qvla quantize CHECKPOINT --calibration calibration.safetensors --side backbone --out bb.safetensors
  omega-qvla quantize CHECKPOINT --recipe rtn --out naive.safetensors
  omega-qvla quantize CHECKPOINT --observations FILE --cascade --out cascade.safetensors
  omega-qvla quantize CHECKPOINT --from-published quantized.pt --out published.safetensors
  omega-qvla quantize CHECKPOINT --observations FILE --side action_head --exclude 'layers\\.0\\.' --out p.safetensors
"""  # noqa: E501


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the arguments."""
    add_checkpoint(parser)
    parser.add_argument("--out", type=Path, required=True, help="the pack to write")
    parser.add_argument(
        "--recipe",
        default="omega",
        metavar="NAME|FILE",
        help="preset (see `omega-qvla info`) or YAML file (default: omega)",
    )
    parser.add_argument(
        "--side",
        choices=[*SIDES, "both"],
        default="both",
        help="which part of the policy (default: both)",
    )
    parser.add_argument(
        "--include", metavar="REGEX", help="layers to quantize, instead of the recipe's choice"
    )
    parser.add_argument(
        "--exclude", metavar="REGEX", help="layers to leave alone, instead of the recipe's choice"
    )
    parser.add_argument(
        "--allow-protected",
        action="store_true",
        help="accept layers that collapse at 4 bits (small heads, norms, embeddings)",
    )
    parser.add_argument(
        "--calibration", type=Path, metavar="FILE", help="made by `omega-qvla calibrate`"
    )
    parser.add_argument(
        "--cascade",
        action="store_true",
        help="calibrate the action head on what the quantized backbone tells it (takes "
        "observations; a given calibration then serves the backbone)",
    )
    parser.add_argument(
        "--no-resume", action="store_true", help="discard what an earlier build left"
    )
    parser.add_argument(
        "--dtype",
        choices=["float32", "bfloat16"],
        default="float32",
        help="what the policy runs in while it is calibrated; bfloat16, the checkpoints' own, "
        "halves memory and time on processors that have it (default: float32)",
    )
    add_overrides(parser)
    add_published(parser)
    add_device(parser)
    add_calibration(parser)


def run(args: argparse.Namespace, console: Console) -> int:
    """Build the pack and show its sizes."""
    from omega_qvla.pack.files import check_replaceable
    from omega_qvla.pack.writer import FORMAT_NAME

    check_replaceable(args.out, FORMAT_NAME)
    if args.from_published is not None:
        convert(args, console)
        console.result(show_sizes(args.out, console))
        return 0
    if args.activation is not None:
        raise ConfigError("--activation completes --from-published; a recipe says its own")
    import torch

    from omega_qvla.cli.checkpoints import open_checkpoint
    from omega_qvla.config.presets import resolve_recipe
    from omega_qvla.policies.weights import open_policy
    from omega_qvla.quantize import BuildReport, quantize_policy

    sides = SIDES if args.side == "both" else (args.side,)
    recipe = override(adjust(resolve_recipe(args.recipe), args, sides), args, sides)
    options = loading(args)
    outline = open_checkpoint(args.checkpoint, **options)
    samples, calibration = _seen(args, outline, recipe, console)
    policy, weights = open_policy(
        outline.path, device=args.device, dtype=getattr(torch, args.dtype), **options
    )
    console.note(f"recipe {recipe.name}, {args.side}")
    reports: list[BuildReport] = []
    with console.bar(f"building {args.out.name}") as tick:
        quantize_policy(
            policy,
            recipe,
            samples,
            out=args.out,
            sides=sides,
            num_steps=args.num_steps,
            token_cap=args.token_cap or TOKEN_CAPS[outline.family],
            seed=args.seed,
            calibration=calibration,
            resume=not args.no_resume,
            cascade=args.cascade,
            progress=follow(console, tick),
            weights=weights,
            on_report=reports.append,
        )
    sizes = show_sizes(args.out, console)
    console.text()
    console.result({**sizes, "build": show_report(reports[0], console)})
    return 0


def _seen(
    args: argparse.Namespace, outline: Checkpoint, recipe: Recipe, console: Console
) -> tuple[ObservationSet | None, Calibration | None]:
    """What the build calibrates on; whatever can be refused is, before anything large is read.

    Raises:
        ConfigError: neither where the recipe needs one, or both. RecipeError: it fits no layer.
        CalibrationError, ObservationError: unreadable, or not the policy's.
    """
    from omega_qvla.calibration.collect import Calibration
    from omega_qvla.cli.sources import given_observations
    from omega_qvla.numerics.quantize_layer import needs_stats
    from omega_qvla.quantize import plan

    jobs = plan(outline.policy, recipe, args.num_steps or outline.policy.num_steps)
    if args.calibration and (args.observations or args.dataset or args.env) and not args.cascade:
        raise ConfigError("--calibration already holds its observations; give one of them")
    calibration = Calibration.load(args.calibration) if args.calibration else None
    samples = given_observations(args, outline, console)
    if samples is None and calibration is None and any(needs_stats(job.scheme) for job in jobs):
        raise ConfigError(
            f"recipe {recipe.name!r} needs calibration: give --observations PATH, --dataset DIR, "
            "--env metaworld or --calibration FILE (rtn needs none)"
        )
    return samples, calibration


def adjust(recipe: Recipe, args: argparse.Namespace, sides: tuple[str, ...]) -> Recipe:
    """The recipe with --side, --include, --exclude and --allow-protected applied."""
    changes: dict[str, Any] = {}
    for side in SIDES:
        side_recipe = recipe.side(side)
        if side not in sides:
            changes[side] = None
        elif side_recipe is not None:
            include = side_recipe.include if args.include is None else args.include
            exclude = side_recipe.exclude if args.exclude is None else args.exclude
            changes[side] = dataclasses.replace(side_recipe, include=include, exclude=exclude)
    protected = recipe.allow_protected or args.allow_protected
    adjusted = dataclasses.replace(recipe, allow_protected=protected, **changes)
    if adjusted.backbone is None and adjusted.action_head is None:
        raise RecipeError(f"recipe {recipe.name!r} leaves {' and '.join(sides)} as they are")
    return adjusted


def show_sizes(path: Path, console: Console) -> dict[str, Any]:
    """A table of a pack's sizes by side; returns the same as JSON."""
    from omega_qvla.pack.reader import read_pack

    pack = read_pack(path, verify=False)
    rows: list[tuple[Any, ...]] = []
    data: dict[str, Any] = {"out": str(path), "sides": {}}
    for side in SIDES:
        layers = [layer for layer in pack.layers.values() if layer.side == side]
        stored = sum(layer.nbytes for layer in layers)
        full = sum(2 * x.out_features * (x.in_features + (x.bias is not None)) for x in layers)
        data["sides"][side] = {"layers": len(layers), "bytes": stored, "bytes_16bit": full}
        if layers:
            rows.append((side, len(layers), size(full), size(stored), percent(stored / full, 1)))
    sizes = pack.sizes()
    rows.append(
        ("all", len(pack.layers), size(sizes.layer_bytes_16bit), size(sizes.layer_bytes),
         percent(sizes.ratio, 1))
    )  # fmt: skip
    console.table(["side", "layers", "in 16 bit", "in the pack", "of 16 bit"], rows)
    console.text(f"{path}: {size(sizes.file_bytes)}, header and manifest included")
    return {
        **data,
        "layers": len(pack.layers),
        "layer_bytes": sizes.layer_bytes,
        "layer_bytes_16bit": sizes.layer_bytes_16bit,
        "file_bytes": sizes.file_bytes,
    }
