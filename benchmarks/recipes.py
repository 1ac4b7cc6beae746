"""Which ingredients make a good recipe: drift of the action chunk, one variant at a time.

    python benchmarks/recipes.py --checkpoints assets/pi05-metaworld assets/groot-n15-metaworld \
        --observations calibration.safetensors held_out.safetensors --out docs/results/recipes

Every variant is built from the same calibration and measured on the same held-out
observations and noise, on each checkpoint as it is and with outlier channels put in. Writes
`<out>.json` and `<out>.md`; finished rows are kept, so a run goes on where it stopped.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from omega_qvla.calibration.collect import Calibration, collect, provenance
from omega_qvla.calibration.samples import ObservationSet, read_observations
from omega_qvla.config.presets import preset
from omega_qvla.config.recipe import (
    ActivationScheme,
    Recipe,
    Rotation,
    Scheme,
    SideRecipe,
    Smoothing,
    WeightScheme,
)
from omega_qvla.evaluation.environment import environment
from omega_qvla.evaluation.open_loop import chunk_cosines, chunk_drift, predict_chunks
from omega_qvla.pack.apply import apply_pack
from omega_qvla.policies.outliers import add_outliers
from omega_qvla.policies.registry import load_policy
from omega_qvla.quantize import plan, quantize_policy

HADAMARD = Rotation("hadamard", 64)
FULL = Rotation("full_hadamard", randomized=True)
SVD_HADAMARD = Rotation("svd_hadamard", 64)
GPTQ = WeightScheme(method="gptq", grid="fine", act_order=True)
RTN = WeightScheme(method="rtn", grid="fine")
SMOOTH = Smoothing(0.5, robust=True)
TOKEN = ActivationScheme("per_token", clip=0.9)
GROUP = ActivationScheme("per_token_group", group=64, clip=0.95)


def variants() -> dict[str, Recipe]:
    """Name -> recipe: the presets, and one change at a time from `omega` without its low rank."""
    base = Scheme(HADAMARD, GPTQ, GROUP, SMOOTH)

    def change(**parts: Any) -> Scheme:
        return dataclasses.replace(base, **parts)

    def smooth(alpha: float, robust: bool = True) -> Scheme:
        return change(smoothing=Smoothing(alpha, robust=robust))

    def group(size: int, clip: float) -> Scheme:
        return change(activation=ActivationScheme("per_token_group", group=size, clip=clip))

    schemes = {
        "no low rank": base,
        "no smoothing": change(smoothing=None),
        "plain smoothing": smooth(0.5, robust=False),
        "alpha .3": smooth(0.3),
        "alpha .7": smooth(0.7),
        "no rotation": change(rotation=Rotation("none")),
        "full Hadamard": change(rotation=FULL),
        "full Hadamard, alpha .7": change(rotation=FULL, smoothing=Smoothing(0.7)),
        "random signs": change(rotation=Rotation("hadamard", 64, randomized=True)),
        "SVD·Hadamard": change(rotation=SVD_HADAMARD),
        "no smoothing, SVD·Hadamard": change(rotation=SVD_HADAMARD, smoothing=None),
        "permutation": change(permutation=True),
        "weights RTN": change(weight=RTN),
        "weights GPTQ per 64": change(weight=dataclasses.replace(GPTQ, group=64)),
        "weights GPTQ per 128": change(weight=dataclasses.replace(GPTQ, group=128)),
        "weights GPTQ in column order": change(weight=dataclasses.replace(GPTQ, act_order=False)),
        "clip 1": group(64, 1.0),
        "clip .9": group(64, 0.9),
        "groups of 32": group(32, 0.95),
        "groups of 128": group(128, 0.95),
        "per token": change(activation=TOKEN),
        "per token, full Hadamard": change(activation=TOKEN, rotation=FULL),
        "per step": change(activation=ActivationScheme("per_step_tensor")),
        "per step, group 64": change(activation=ActivationScheme("per_step_group", group=64)),
        "per step, channel (emulated)": change(activation=ActivationScheme("per_step_channel")),
    }
    recipes = {name: preset(name) for name in ("rtn", "omega-paper", "omega", "w4a16", "w4a8")}
    both = {n: Recipe("variant", SideRecipe(s), SideRecipe(s)) for n, s in schemes.items()}
    rank = {r: change(weight=dataclasses.replace(GPTQ, rank=r)) for r in (4, 8)}
    pairs = {
        "rank 4 in the backbone": (rank[4], base),
        "rank 4 in both": (rank[4], rank[4]),
        "rank 8 in the action head": (base, rank[8]),
        "rank 8 in both": (rank[8], rank[8]),
    }
    sides = {n: Recipe("variant", SideRecipe(b), SideRecipe(h)) for n, (b, h) in pairs.items()}
    return recipes | both | sides


Row = dict[str, Any]


def measure(
    checkpoint: Path,
    outliers: float | None,
    calibration_set: ObservationSet,
    held_out: ObservationSet,
    draws: int,
    done: set[str],
) -> Iterator[Row]:
    """One row per variant that is not in `done`; `draws` noises per held-out observation."""

    def fresh() -> Any:
        policy = load_policy(checkpoint)
        if outliers is not None:
            add_outliers(policy, ratio=outliers)
        return policy

    todo = {name: recipe for name, recipe in variants().items() if name not in done}
    if not todo:
        return
    policy = fresh()
    names = [job.name for job in plan(policy, preset("omega"), policy.num_steps)]
    calibration = Calibration(
        collect(policy, calibration_set, names), provenance(policy, calibration_set)
    )
    observations = list(held_out.observations) * draws
    seeds = list(range(len(observations)))
    reference = predict_chunks(policy, observations, seeds)
    for name, recipe in todo.items():
        start = time.perf_counter()
        with tempfile.TemporaryDirectory() as folder:
            pack = quantize_policy(
                policy, recipe, None, out=Path(folder) / "pack", calibration=calibration
            )
            build_s = time.perf_counter() - start
            quantized = fresh()
            sizes = apply_pack(quantized, pack, backend="emulated")
        chunks = predict_chunks(quantized, observations, seeds)
        drift = chunk_drift(reference, chunks)
        yield {
            "family": policy.family,
            "variant": "plain" if outliers is None else "outliers",
            "recipe": name,
            "build_s": round(build_s, 2),
            "layer_bytes": sizes.layer_bytes,
            "layer_bytes_16bit": sizes.layer_bytes_16bit,
            **dataclasses.asdict(drift),
            "cosine_p1": float(np.quantile(chunk_cosines(reference, chunks), 0.01)),
        }


def table(rows: list[Row]) -> str:
    """Markdown: 1 - cosine in thousandths (median, worst hundredth, worst) per checkpoint."""
    columns = sorted({(row["family"], row["variant"]) for row in rows}, reverse=True)
    cells = {(row["family"], row["variant"], row["recipe"]): row for row in rows}
    head = (
        "| recipe | "
        + " | ".join(f"{f} {v}: median, 99 %, worst" for f, v in columns)
        + " | bytes |"
    )
    lines = [head, "|" + "---|" * (len(columns) + 2)]
    for name in dict.fromkeys(row["recipe"] for row in rows):
        found = [cells.get((*column, name)) for column in columns]
        texts = [
            "" if c is None
            else f"{1e3 * (1 - c['cosine_median']):.2f}, {1e3 * (1 - c['cosine_p1']):.1f}, "
            f"{1e3 * (1 - c['cosine_min']):.0f}"
            for c in found
        ]  # fmt: skip
        shares = [c["layer_bytes"] / c["layer_bytes_16bit"] for c in found if c]
        lines.append(f"| {name} | " + " | ".join(texts) + f" | {100 * max(shares):.1f} % |")
    return "\n".join(lines) + "\n"


def _write(path: Path, text: str) -> None:
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(text)
    os.replace(temporary, path)


def run(args: argparse.Namespace, each: Callable[[], None]) -> list[Row]:
    """Measure what `<out>.json` does not hold yet, saving after every row."""
    sets = [read_observations(path) for path in args.observations]
    path = args.out.with_suffix(".json")
    rows: list[Row] = json.loads(path.read_text())["rows"] if path.exists() else []
    args.out.parent.mkdir(parents=True, exist_ok=True)
    for checkpoint in args.checkpoints:
        family = load_policy(checkpoint).family
        for outliers in (None, args.ratio):
            variant = "plain" if outliers is None else "outliers"
            done = {r["recipe"] for r in rows if (r["family"], r["variant"]) == (family, variant)}
            for row in measure(checkpoint, outliers, *sets, args.draws, done):
                rows.append(row)
                record = {
                    "environment": environment(),
                    "outlier_ratio": args.ratio,
                    "calibration": len(sets[0]),
                    "held_out": len(sets[1]),
                    "draws": args.draws,
                    "rows": rows,
                }
                _write(path, json.dumps(record, indent=1) + "\n")
                _write(args.out.with_suffix(".md"), table(rows))
                each()
    return rows


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--checkpoints", type=Path, nargs="+", required=True)
    parser.add_argument("--observations", type=Path, nargs=2, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--ratio", type=float, default=100.0, help="of the outlier channels")
    parser.add_argument("--draws", type=int, default=2, help="noises per held-out observation")
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    with tqdm(total=len(variants()) * 2 * len(args.checkpoints), unit="build") as bar:
        rows = run(args, bar.update)
    print(table(rows))


if __name__ == "__main__":
    main()
