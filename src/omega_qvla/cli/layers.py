"""`inspect --layers`: what each layer of a pack does to the drift, and which to leave out."""

from __future__ import annotations

import argparse
import csv
import io
import json
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from omega_qvla.cli.console import Console
from omega_qvla.cli.formats import percent, size
from omega_qvla.cli.parsing import add_backend, add_recordings, at_least
from omega_qvla.errors import ConfigError

if TYPE_CHECKING:
    from omega_qvla.calibration.samples import ObservationSet
    from omega_qvla.evaluation.layer_findings import LayerFinding
    from omega_qvla.evaluation.sensitivity import LeaveOut, Sensitivity
    from omega_qvla.pack.reader import Pack
    from omega_qvla.policies.base import Policy

SAMPLES = 12
COLUMNS = (
    "layer", "side", "error", "worst step", "accumulated", "largest/bulk", "channels before",
    "after", "clipped", "alone", "without", "gain", "more bytes",
)  # fmt: skip


def add_layers(parser: argparse.ArgumentParser) -> None:
    """--layers and what it needs."""
    group = parser.add_argument_group("diagnosis of the layers")
    group.add_argument(
        "--layers",
        action="store_true",
        help="run the pack on observations: error, ranges, clipping and sensitivity of each layer",
    )
    group.add_argument("--checkpoint", type=Path, metavar="DIR", help="that the pack belongs to")
    add_recordings(group)
    group.add_argument(
        "--num-samples",
        type=at_least(1),
        default=SAMPLES,
        metavar="N",
        help=f"observations, balanced over tasks and episodes (default: {SAMPLES})",
    )
    group.add_argument(
        "--no-sensitivity",
        action="store_true",
        help="leave out what takes two runs per layer, and with it the suggestion",
    )
    group.add_argument(
        "--out", type=Path, metavar="DIR", help="also write layers.{html,md,csv,json} there"
    )
    add_backend(parser)


def run_layers(args: argparse.Namespace, console: Console) -> int:
    """Diagnose and show."""
    from omega_qvla.cli.measure import drift_seeds
    from omega_qvla.evaluation.layer_findings import find_layers
    from omega_qvla.evaluation.report.names import short_name
    from omega_qvla.evaluation.sensitivity import suggest
    from omega_qvla.pack.apply import check_source
    from omega_qvla.pack.reader import read_pack
    from omega_qvla.policies.registry import load_policy

    if args.checkpoint is None:
        raise ConfigError("--layers runs the policy: give its --checkpoint and --observations")
    pack = read_pack(args.pack)
    samples = _samples(args)
    seeds = drift_seeds(samples)
    console.note(f"loading {args.checkpoint}")
    policy: Policy = load_policy(args.checkpoint, device=args.device)
    check_source(policy, pack.manifest)
    drift = _layer_drift(args, policy, pack, samples, seeds, console)
    sensitivity: Sensitivity | None = None
    curve: tuple[LeaveOut, ...] = ()
    if not args.no_sensitivity:
        sensitivity, curve = _sensitivity(args, policy, pack, samples, seeds, console)
    console.note("inputs of the layers")
    findings = find_layers(policy, pack.layers, samples.observations, seeds, drift, sensitivity)
    chosen = suggest(curve) if curve else None
    rows = [_row(finding, sensitivity) for finding in findings]
    console.table(COLUMNS, [[short_name(name), *row] for name, *row in rows], left=2)
    words = [*_words(policy, pack, curve, chosen)]
    for line in words:
        console.text(line)
    data = _json(args, findings, sensitivity, curve, chosen, samples)
    if args.out is not None:
        _write(args.out, args.pack.name, findings, rows, curve, chosen, words, data)
        console.text(f"{args.out / 'layers.html'}")
    console.result(data)
    return 0


def _samples(args: argparse.Namespace) -> ObservationSet:
    """Observations that calibration has left alone, as far as that can be known."""
    from omega_qvla.cli.checkpoints import open_checkpoint
    from omega_qvla.cli.recordings import check_unseen, draw_checked, held_out_of, open_recordings

    outline = open_checkpoint(args.checkpoint).policy
    source = open_recordings(args, outline)
    if source is None:
        raise ConfigError("--layers needs observations: --observations PATH or --dataset DIR")
    count = min(args.num_samples, len(source.meta))
    samples = draw_checked(args, source, "held-out", count, outline)
    if held_out_of(args):
        check_unseen(args.pack.name, args.pack, samples)
    return samples


def _layer_drift(
    args: argparse.Namespace,
    policy: Policy,
    pack: Pack,
    samples: ObservationSet,
    seeds: list[int],
    console: Console,
) -> Any:
    from omega_qvla.evaluation.layer_drift import layer_drift
    from omega_qvla.pack.apply import apply_pack
    from omega_qvla.policies.registry import load_policy

    console.note(f"error of {len(pack.layers)} layers on {len(samples)} observations")
    quantized: Policy = load_policy(args.checkpoint, device=args.device)
    apply_pack(quantized, pack, args.backend)
    return layer_drift(policy, quantized, samples.observations, seeds, list(pack.layers))


def _sensitivity(
    args: argparse.Namespace,
    policy: Policy,
    pack: Pack,
    samples: ObservationSet,
    seeds: list[int],
    console: Console,
) -> tuple[Sensitivity, tuple[LeaveOut, ...]]:
    from omega_qvla.evaluation.sensitivity import leave_out_curve, partial_policy, sensitivity

    console.note(f"sensitivity: {2 * len(pack.layers)} runs")
    with (
        partial_policy(policy, pack.layers, samples.observations, seeds, args.backend) as partial,
        console.bar("sensitivity") as tick,
    ):
        found = sensitivity(partial, lambda done, total: tick(done, total, ""))
        return found, leave_out_curve(partial, found)


def _row(finding: LayerFinding, sensitivity: Sensitivity | None) -> list[str]:
    spread = max(finding.largest[step] / max(finding.bulk[step], 1e-12) for step in finding.largest)
    step = "" if finding.worst_step < 0 else f" ({finding.worst_step + 1})"
    measured = ["", "", ""]
    if sensitivity is not None:
        measured = [
            f"{finding.alone:.4f}",
            f"{finding.without:.4f}",
            percent(sensitivity.gain(finding.name), 1),
        ]
    return [
        finding.name,
        finding.side,
        f"{finding.error:.5f}",
        f"{finding.worst_error:.5f}{step}",
        f"{finding.accumulated:.5f}",
        f"{spread:.1f}",
        f"{finding.ratio_before:.1f}",
        f"{finding.ratio_after:.1f}",
        percent(finding.clip_rate, 2),
        *measured,
        size(finding.extra_bytes),
    ]


def _words(
    policy: Policy, pack: Pack, curve: tuple[LeaveOut, ...], chosen: LeaveOut | None
) -> list[str]:
    """The suggestion in sentences."""
    if not curve or chosen is None:
        return []
    whole, sizes = curve[0], pack.sizes()
    lines = [
        f"whole pack: relative error {whole.error:.4f}, cosine median {whole.cosine_median:.4f}, "
        f"min {whole.cosine_min:.4f}; {size(sizes.layer_bytes)}"
    ]
    lines += [
        f"without {len(entry.layers)} layer(s): error {entry.error:.4f}, cosine median "
        f"{entry.cosine_median:.4f}, min {entry.cosine_min:.4f}; {size(entry.extra_bytes)} more "
        f"({percent(entry.extra_bytes / sizes.layer_bytes, 1)})"
        for entry in curve[1:]
    ]
    if not chosen.layers:
        return [*lines, "suggestion: leave none out; no layer is worth its bytes"]
    lines.append(
        f"suggestion: leave out {', '.join(chosen.layers)}: the error falls by "
        f"{percent(1 - chosen.error / whole.error)} for {size(chosen.extra_bytes)}"
    )
    return [*lines, *_flags(policy, pack, chosen)]


def _flags(policy: Policy, pack: Pack, chosen: LeaveOut) -> list[str]:
    """The --exclude of a build without those layers, side by side with the family's own."""
    from omega_qvla.policies.base import check_side

    flags = []
    for side in dict.fromkeys(pack.layers[name].side for name in chosen.layers):
        names = [re.escape(n) for n in chosen.layers if pack.layers[n].side == side]
        known = pack.manifest.recipe.get(side) or {}
        own = known.get("exclude") or policy.targets(check_side(side))[1]
        regex = "|".join([*([own] if own else []), f"^(?:{'|'.join(names)})$"])
        flags.append(f"  omega-qvla quantize ... --side {side} --exclude '{regex}'")
    return flags


def _json(
    args: argparse.Namespace,
    findings: tuple[LayerFinding, ...],
    sensitivity: Sensitivity | None,
    curve: tuple[LeaveOut, ...],
    chosen: LeaveOut | None,
    samples: ObservationSet,
) -> dict[str, Any]:
    return {
        "pack": args.pack.name,
        "observations": len(samples),
        "source": samples.source,
        "everything": sensitivity.everything if sensitivity else None,
        "layers": [finding.to_dict() for finding in findings],
        "leave_out": [vars(entry) | {"layers": list(entry.layers)} for entry in curve],
        "suggestion": list(chosen.layers) if chosen else None,
    }


def _write(
    folder: Path,
    name: str,
    findings: tuple[LayerFinding, ...],
    rows: list[list[str]],
    curve: tuple[LeaveOut, ...],
    chosen: LeaveOut | None,
    words: list[str],
    data: dict[str, Any],
) -> None:
    from omega_qvla.cli.comparison.table import table_text
    from omega_qvla.evaluation.report.layer_page import LayerPage, write_layer_page
    from omega_qvla.files import write_text

    notes = [*words, f"{data['observations']} observations: {data['source']}"]
    page = LayerPage(f"Layers of {name}", findings, curve, chosen, notes, (COLUMNS, rows))
    write_layer_page(page, folder / "layers.html")
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerows([COLUMNS, *rows])
    summary = "".join(f"- {line.strip()}\n" for line in notes)
    contents = {
        "layers.csv": text.getvalue(),
        "layers.md": f"{summary}\n{table_text(COLUMNS, rows)}",
        "layers.json": json.dumps(data, indent=1, allow_nan=False) + "\n",
    }
    for file, content in contents.items():
        write_text(folder / file, content)
