"""`omega-qvla inspect`: what is in a pack."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from os.path import commonpath
from pathlib import Path
from typing import TYPE_CHECKING, Any

from omega_qvla.cli.console import Console
from omega_qvla.cli.formats import percent, size
from omega_qvla.cli.layers import add_layers, run_layers
from omega_qvla.cli.parsing import SIDES

if TYPE_CHECKING:
    from omega_qvla.config.recipe import Scheme
    from omega_qvla.numerics.layer import QuantizedLayer
    from omega_qvla.pack.manifest import Manifest
    from omega_qvla.pack.reader import Sizes

DESCRIPTION = """\
Show a pack's manifest (whose layers, by which recipe, from which calibration) and one
line per layer: shape, scheme, bytes, and percent of its 16-bit size. The file is
checked first; a damaged one is named and refused.

With --layers the pack is run beside its checkpoint on observations, and each layer is
looked at: the error of its output (and in which denoising step it is worst), the range of
its input, its largest channel over the median one before and after the change of basis,
how much is clipped, and how the actions drift with this layer alone quantized and with all
but it. At the end stands which layers to leave in 16 bits, and what that costs.
"""
EXAMPLES = """\
  omega-qvla inspect omega.safetensors
  omega-qvla inspect omega.safetensors --json | jq .recipe
  omega-qvla inspect omega.safetensors --layers --checkpoint CHECKPOINT \\
      --observations held-out.safetensors --out runs/layers
"""


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the arguments."""
    parser.add_argument("pack", type=Path, metavar="PACK", help="a pack file")
    parser.add_argument("--no-layers", action="store_true", help="leave the layer table out")
    add_layers(parser)


def run(args: argparse.Namespace, console: Console) -> int:
    """Show it."""
    if args.layers:
        return run_layers(args, console)
    from omega_qvla.pack.reader import read_pack

    pack = read_pack(args.pack)
    manifest, sizes = pack.manifest, pack.sizes()
    rows = [layer_row(layer) for layer in pack.layers.values()]
    console.facts(_facts(args.pack, manifest, sizes))
    if not args.no_layers:
        for side in SIDES:
            _show_side(console, side, [row for row in rows if row["side"] == side])
    console.result(
        {
            "path": str(args.pack),
            "format_version": manifest.format_version,
            "family": manifest.family,
            "num_steps": manifest.num_steps,
            "recipe": dict(manifest.recipe),
            "calibration": dict(manifest.calibration),
            "software": dict(manifest.software),
            "source": dict(manifest.source),
            "layer_bytes": sizes.layer_bytes,
            "layer_bytes_16bit": sizes.layer_bytes_16bit,
            "file_bytes": sizes.file_bytes,
            "layers": rows,
        }
    )
    return 0


def _show_side(console: Console, side: str, rows: list[dict[str, Any]]) -> None:
    """What all layers of a side have in common in words, the rest as a table."""
    if not rows:
        return
    parents = [row["name"].rpartition(".")[0].replace(".", "/") for row in rows]
    prefix = commonpath(parents).replace("/", ".")
    schemes = sorted({row["scheme"] for row in rows})
    common = schemes[0] if len(schemes) == 1 else "several"
    console.facts({side: f"{len(rows)} layers", "under": prefix or "-", "scheme": common})
    columns, left = ["layer", "shape", "bytes", "of 16 bit"], 1
    table = [
        [r["name"].removeprefix(f"{prefix}."), "{} x {}".format(*r["shape"]), size(r["bytes"]),
         percent(r["bytes"] / r["bytes_16bit"], 1)] for r in rows
    ]  # fmt: skip
    if len(schemes) > 1:
        columns, left = ["layer", "scheme", *columns[1:]], 2
        table = [[line[0], row["scheme"], *line[1:]] for line, row in zip(table, rows, strict=True)]
    console.table(columns, table, left=left)


def _facts(path: Path, manifest: Manifest, sizes: Sizes) -> dict[str, Any]:
    calibration = manifest.calibration
    origin = "none needed"
    if calibration:
        parts = calibration.get("parts", [calibration])
        origin = "; ".join(map(_origin, parts))
    return {
        "pack": f"{path} (format {manifest.format_version})",
        "family": manifest.family,
        "recipe": manifest.recipe.get("name"),
        "calibration": origin,
        "denoising steps": manifest.num_steps,
        "built with": ", ".join(f"{k} {v}" for k, v in manifest.software.items()),
        "source": f"{len(manifest.source)} tensors, by sha256",
        "layers": len(manifest.layers),
        "size": f"{size(sizes.layer_bytes)} for {size(sizes.layer_bytes_16bit)} in 16 bits "
        f"({percent(sizes.ratio, 1)}); file {size(sizes.file_bytes)}",
    }


def _origin(calibration: Mapping[str, Any]) -> str:
    """One calibration in words; a converted pack says instead which file it was."""
    if not calibration:
        return "none needed"
    said = calibration.get
    if "count" not in calibration:
        return f"{said('source', 'unknown')} {said('file', '')}".strip()
    words = f"{said('count')} observations ({said('source')}), {said('num_steps')} steps"
    return f"{words}, seed {said('seed')}"


def layer_row(layer: QuantizedLayer) -> dict[str, Any]:
    """One layer's facts, JSON-ready."""
    full = 2 * layer.out_features * (layer.in_features + (layer.bias is not None))
    return {
        "name": layer.name,
        "side": layer.side,
        "shape": [layer.out_features, layer.in_features],
        "scheme": scheme_text(layer.scheme),
        "num_steps": layer.num_steps,
        "bytes": layer.nbytes,
        "bytes_16bit": full,
    }


def scheme_text(scheme: Scheme) -> str:
    """A scheme in a few words: `W4A4 per_token_group/64, hadamard/64, smooth, gptq/row`."""
    weight, activation, rotation = scheme.weight, scheme.activation, scheme.rotation
    if activation.kind == "none":
        words = [f"W{weight.bits}A16"]
    else:
        group = f"/{activation.group}" if activation.kind.endswith("_group") else ""
        words = [f"W{weight.bits}A{activation.bits} {activation.kind}{group}"]
    if scheme.smoothing is not None:
        words.append("smooth")
    if scheme.permutation:
        words.append("zigzag")
    if rotation.kind != "none":
        block = "" if rotation.kind == "full_hadamard" else f"/{rotation.block}"
        words.append(f"{rotation.kind}{block}")
    if scheme.output_rotation:
        words.append("output rotation")
    words.append(f"{weight.method}/{weight.group or 'row'}")
    if weight.rank:
        words.append(f"rank {weight.rank}")
    return ", ".join(words)
