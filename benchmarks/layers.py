"""Layers with the statistics of the real checkpoints: the published rotation against `omega`.

    python benchmarks/layers.py --json docs/results/layers.json --markdown docs/results/layers.md

Reads the fitted parameters (benchmarks/synthetic_layers.json), draws every layer, and compares
the error of the inputs and of the outputs on tokens that calibration did not see: the published
backbone scheme (SVD·Hadamard, static scale per channel), and both sides of `omega`.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from omega_qvla.config import Recipe, Scheme, resolve_recipe
from omega_qvla.kernels.arithmetic import activation_group
from omega_qvla.kernels.reference import linear, quantize_input, rotate_input, transform_input
from omega_qvla.numerics.activation import quantize_static
from omega_qvla.numerics.layer import QuantizedLayer
from omega_qvla.numerics.metrics import channel_ratio, nmse
from omega_qvla.numerics.qparams import expand_groups
from omega_qvla.numerics.quantize_layer import quantize_layer
from omega_qvla.numerics.smoothing import robust_profile
from omega_qvla.numerics.stats import LayerStats
from synthetic_layers import MEASURED, TOKENS, Shape, draw, static_errors

PARAMETERS = Path(__file__).with_name("synthetic_layers.json")
Row = dict[str, Any]


def shapes(path: Path = PARAMETERS) -> dict[str, Shape]:
    """The fitted parameters by layer name."""
    return {name: Shape(**values) for name, values in json.loads(path.read_text()).items()}


def scheme_of(recipe: Recipe, name: str) -> tuple[str, Scheme]:
    """(side, scheme) that a recipe gives a layer: `LLM` is the backbone, all else the head."""
    side = "backbone" if " LLM " in name else "action_head"
    found = recipe.side(side)
    assert found is not None
    return side, found.scheme


def build(name: str, scheme: Scheme, side: str, weight: Tensor, tokens: Tensor) -> QuantizedLayer:
    """The layer as a build makes it from calibration tokens [n, in]."""
    stats = LayerStats(
        tokens.T @ tokens / len(tokens), robust_profile(tokens), (tokens,), len(tokens)
    )
    return quantize_layer(name, side, weight, None, scheme, stats, None)


def input_error(layer: QuantizedLayer, x: Tensor) -> float:
    """NMSE of the rounded inputs in the layer's own basis, as the published numbers are."""
    rotated = transform_input(x, layer)
    if layer.act_scale is not None:
        scale = layer.act_scale[0]
        return nmse(rotated, quantize_static(rotated, scale) * scale)
    q, scale = quantize_input(rotate_input(x, layer), layer, None)
    group = activation_group(layer) or None
    return nmse(rotated, q * expand_groups(scale, layer.in_features, group))


def measure(
    name: str,
    published: tuple[float, float, float],
    shape: Shape,
    recipes: tuple[str, ...] = ("omega-paper", "omega"),
) -> Row:
    """One layer: how near the published statistics it is, and the errors of both recipes.

    The three reproduced numbers are taken on the tokens that they were fitted to; recipes are
    built on four times as many of another draw, and judged on as many that no one has seen.
    """
    tokens, weight = draw(shape)
    reproduced = static_errors(tokens, weight)
    ratio = channel_ratio(tokens)
    tokens, weight = draw(shape, 5 * TOKENS)
    seen, held_out = tokens[: 4 * TOKENS], tokens[4 * TOKENS :]
    exact = held_out @ weight.T
    row: Row = {
        "layer": name,
        "published": list(published),
        "reproduced": [round(value, 5) for value in reproduced],
        "channel_ratio": round(ratio, 1),
    }
    for label in recipes:
        side, scheme = scheme_of(resolve_recipe(label), name)
        layer = build(name, scheme, side, weight, seen)
        row[f"{label} inputs"] = input_error(layer, held_out)
        row[f"{label} outputs"] = nmse(exact, linear(held_out, layer))
    return row


def table(rows: list[Row]) -> str:
    """Markdown of `measure`'s rows."""
    lines = [
        "| layer | published raw / SVD / SVD·H | this layer | max/median | omega-paper in, out "
        "| omega in, out |",
        "|---|---|---|---|---|---|",
    ]
    for row in rows:
        triples = [
            " / ".join(f"{value:.3f}" for value in row[key]) for key in ("published", "reproduced")
        ]
        errors = [
            f"{row[f'{label} inputs']:.4f}, {row[f'{label} outputs']:.4f}"
            for label in ("omega-paper", "omega")
        ]
        lines.append(
            f"| {row['layer']} | {triples[0]} | {triples[1]} | {row['channel_ratio']:.0f} | "
            f"{errors[0]} | {errors[1]} |"
        )
    return "\n".join(lines) + "\n"


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--json", type=Path)
    parser.add_argument("--markdown", type=Path)
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    fitted = shapes()
    rows = [measure(name, (a, b, c), fitted[name]) for name, a, b, c in MEASURED]
    if args.json:
        record = {"rows": rows, "shapes": {n: dataclasses.asdict(s) for n, s in fitted.items()}}
        args.json.write_text(json.dumps(record, indent=1) + "\n")
    if args.markdown:
        args.markdown.write_text(table(rows))
    print(table(rows))


if __name__ == "__main__":
    main()
