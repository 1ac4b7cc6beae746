"""`omega-qvla bundle`: a checkpoint and its pack become one folder that stands alone."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from omega_qvla.cli.console import Console
from omega_qvla.cli.formats import percent, size
from omega_qvla.cli.loading import loading
from omega_qvla.cli.parsing import add_backend, add_checkpoint, at_least
from omega_qvla.errors import BundleError

if TYPE_CHECKING:
    from omega_qvla.bundle.manifest import BundleManifest

DESCRIPTION = """\
Write a folder that runs without the checkpoint: the pack, the other tensors, tokenizer,
statistics, processor, and a manifest with the sha256 of every file. Wherever a verb takes
a checkpoint to run it (eval, info, verify), it takes the bundle too.

Without options the actions are those of the checkpoint with the pack, bit for bit. Layers
that nothing runs are left out; of GR00T's per-embodiment weights, only the policy's own
are kept. --bake-steps stores the outputs of the time layers in their place (the actions
stay the same, the number of steps is fixed). The int8 options halve what they name; with
--observations their cost is measured, as drift from the checkpoint with the pack.
"""
EXAMPLES = """\
  omega-qvla bundle CHECKPOINT omega.safetensors --out policy.bundle
  omega-qvla bundle CHECKPOINT omega.safetensors --out policy.bundle --bake-steps 10 \\
      --embed int8 --vision int8 --connector int8 --observations held-out.safetensors
"""
_WEIGHTS = ["keep", "int8"]


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the arguments."""
    add_checkpoint(parser)
    parser.add_argument("pack", type=Path, metavar="PACK", help="a pack of this checkpoint")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="new folder")
    store = parser.add_argument_group("how the tensors outside the pack are stored")
    store.add_argument(
        "--rest",
        choices=["keep", "bfloat16", "float16"],
        default="keep",
        help="their dtype (default: keep, as the checkpoint has them)",
    )
    for name, what in (
        ("embed", "the embedding table"),
        ("vision", "the vision tower's linear layers"),
        ("connector", "the linear layers between backbone and action head"),
    ):
        store.add_argument(
            f"--{name}", choices=_WEIGHTS, default="keep", help=f"{what} (default: keep)"
        )
    store.add_argument(
        "--bake-steps",
        type=at_least(1),
        metavar="N",
        help="store the time layers' outputs for N denoising steps in place of the layers",
    )
    drift = parser.add_argument_group("drift of what is stored with loss")
    drift.add_argument("--observations", type=Path, metavar="FILE", help="held-out ones")
    drift.add_argument(
        "--num-samples", type=at_least(1), default=16, metavar="N", help="of them (default: 16)"
    )
    add_backend(parser)


def run(args: argparse.Namespace, console: Console) -> int:
    """Write the bundle; show its sizes and, if asked, its drift."""
    from omega_qvla.bundle.options import BundleOptions
    from omega_qvla.bundle.writer import write_bundle

    options = BundleOptions(args.rest, args.embed, args.vision, args.connector, args.bake_steps)
    if args.observations is not None and not args.observations.is_file():
        raise BundleError(f"{args.observations}: no such observations; nothing was written")
    console.note(f"bundling {args.checkpoint}")
    manifest = write_bundle(args.checkpoint, args.pack, args.out, options, **loading(args))
    data = show_bundle(args.out, manifest, console)
    if args.observations is not None:
        data["drift"] = _drift(args, console)
    elif options.lossy:
        console.note("--observations FILE would measure what the lossy storage costs")
    console.result(data)
    return 0


def show_bundle(path: Path, manifest: BundleManifest, console: Console) -> dict[str, Any]:
    """A table of a bundle's sizes by part; returns the same as JSON."""
    options = manifest.options
    total = sum(manifest.parts.values())
    lossy = [f"{name} {getattr(options, name)}" for name in options.lossy]
    baked = options.bake_steps
    console.facts(
        {
            "bundle": path,
            "family": manifest.family,
            "denoising steps": f"{manifest.num_steps}{' (baked)' if baked is not None else ''}",
            "stored with loss": ", ".join(lossy) or "nothing",
            "left out": f"{len(manifest.absent)} layers",
        }
    )
    console.text()
    console.table(
        ["part", "bytes", "of all"],
        [(part, size(n), percent(n / total, 1)) for part, n in manifest.parts.items()],
    )
    console.text(f"{path}: {size(manifest.total_bytes)} in {len(manifest.files)} files")
    return {
        "out": str(path),
        "family": manifest.family,
        "num_steps": manifest.num_steps,
        "baked": baked is not None,
        "embodiment": manifest.embodiment,
        "lossy": list(options.lossy),
        "parts": dict(manifest.parts),
        "bytes": manifest.total_bytes,
        "absent": list(manifest.absent),
    }


def _drift(args: argparse.Namespace, console: Console) -> dict[str, Any]:
    """How far the bundle's actions are from those of the checkpoint with the pack."""
    from omega_qvla.calibration.samples import read_observations, select_samples
    from omega_qvla.cli.measure import drift_seeds
    from omega_qvla.evaluation.open_loop import chunk_drift, predict_chunks
    from omega_qvla.runtime.engine import Engine

    samples = read_observations(args.observations)
    samples = select_samples(samples, min(args.num_samples, len(samples)))
    observations, seeds = samples.observations, drift_seeds(samples)
    console.note(f"drift on {len(samples)} observations")
    loaded = Engine.load(args.out, backend=args.backend, device=args.device).policy
    found = predict_chunks(loaded, observations, seeds)
    source = Engine.load(
        args.checkpoint, args.pack, backend=args.backend, device=args.device, **loading(args)
    )
    steps = loaded.num_steps
    if source.policy.num_steps != steps:
        console.note(f"the checkpoint runs {source.policy.num_steps} steps, the bundle {steps}")
    drift = chunk_drift(predict_chunks(source.policy, observations, seeds), found)
    console.text(
        f"drift from the checkpoint with the pack on {drift.count} observations: cosine "
        f"{drift.cosine_mean:.6f} mean, {drift.cosine_min:.6f} least; relative error "
        f"{drift.relative_error:.4f}"
    )
    return {
        "count": drift.count,
        "cosine": drift.cosine(),
        "relative_error": drift.relative_error,
        "backend": source.backend,
    }
