"""What a build costs per layer: the published procedure against this one, at true size.

    python benchmarks/build.py pi05 CHECKPOINT OBSERVATIONS --json OUT [--threads 1]

CHECKPOINT and OBSERVATIONS may come from `benchmarks/true_size.py`. For one layer of every
shape, on the same data and the same number of threads:

* published, from its description: the whole policy runs over the calibration observations for
  every layer anew to collect that layer's Hessian; then GPTQ on each block of 128 columns
  alone, column by column in Python, steps from five candidates. Written here for this
  comparison only.
* ours: the policy runs once for all layers (a layer's share of that is charged), the Hessian
  is summed by symmetric products and shared by layers with one input, and the layer is
  smoothed, rotated and rounded by full GPTQ (`quantize_layer`), with a residual of rank 4 in
  the action head.

A pass of the whole policy is timed on one observation (without reading weights) and multiplied
by their number. Inputs of the layers are random with a few large channels, weights are random.
Shapes that OUT already holds are not measured again, so a run goes on where it stopped.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from omega_qvla.calibration.observers import exact_products
from omega_qvla.calibration.samples import read_observations
from omega_qvla.calibration.streaming import stream
from omega_qvla.config.presets import preset
from omega_qvla.config.recipe import Scheme
from omega_qvla.evaluation.environment import environment
from omega_qvla.numerics.phases import Stopwatch
from omega_qvla.numerics.quantize_layer import quantize_layer
from omega_qvla.numerics.smoothing import robust_energy
from omega_qvla.numerics.stats import LayerStats
from omega_qvla.numerics.symmetric import add_gram_, mirror_
from omega_qvla.policies.base import Policy
from omega_qvla.policies.observation import Observation
from omega_qvla.policies.pi05.policy import Pi05Policy
from omega_qvla.policies.weights import Weights, open_policy
from omega_qvla.quantize import plan

SAMPLES = 10
BLOCK, DAMP, ALPHAS = 128, 0.05, (0.5, 0.75, 1.0, 1.25, 1.5)


@dataclass(frozen=True)
class Shape:
    """Layers of one size: `count` of them; `sharing`: how many read one input, on average."""

    side: str
    rows: int
    width: int
    count: int
    sharing: float
    tokens: int


@dataclass(frozen=True)
class Row:
    """Seconds per layer of one shape: the pass of the policy, the Hessian, the rounding."""

    side: str
    rows: int
    width: int
    count: int
    published_pass: float
    published_hessian: float
    published_round: float
    ours_pass: float
    ours_hessian: float
    ours_round: float

    def charged(self, one_pass: float, layers: int) -> Row:
        """With the policy's passes: one per layer for them, one for all layers for us."""
        return replace(self, published_pass=one_pass, ours_pass=one_pass / layers)

    @property
    def published(self) -> float:
        return self.published_pass + self.published_hessian + self.published_round

    @property
    def ours(self) -> float:
        return self.ours_pass + self.ours_hessian + self.ours_round


def clock(run: Callable[[], Any]) -> tuple[float, Any]:
    """(seconds, result) of one run."""
    begun = time.perf_counter()
    result = run()
    return time.perf_counter() - begun, result


def published_rounding(weight: Tensor, hessian: Tensor) -> Tensor:
    """GPTQ of each block of 128 columns alone, one column after the other; W [out, in]."""
    weight, q = weight.clone(), torch.zeros_like(weight)
    for start in range(0, weight.shape[1], BLOCK):
        part = slice(start, min(start + BLOCK, weight.shape[1]))
        block, h = weight[:, part].clone(), hessian[part, part].clone()
        h.diagonal().add_(DAMP * h.diagonal().mean())
        inverse = torch.cholesky_inverse(torch.linalg.cholesky(h))
        factor = torch.linalg.cholesky(inverse, upper=True)
        step = _best_step(block)
        for j in range(block.shape[1]):
            column = block[:, j]
            rounded = (column / step).round().clamp(-8, 7)
            q[:, start + j] = rounded
            error = (column - rounded * step) / factor[j, j]
            block[:, j + 1 :] -= error[:, None] * factor[j, j + 1 :]
    return q


def _best_step(block: Tensor) -> Tensor:
    best_error, best = None, None
    for alpha in ALPHAS:
        step = (block.abs().amax(1) / (7 * alpha)).clamp_min(1e-8)
        rounded = (block / step[:, None]).round().clamp(-8, 7) * step[:, None]
        error = (block - rounded).square().sum(1)
        if best_error is None or best is None:
            best_error, best = error, step
            continue
        best = torch.where(error < best_error, step, best)
        best_error = torch.minimum(error, best_error)
    assert best is not None
    return best


def shapes(policy: Any, prefix: int, suffix: int) -> list[Shape]:
    """Every shape that the default recipe quantizes; tokens over all observations."""
    found: dict[tuple[str, int, int, int], list[str]] = {}
    sharing = {n: len(site.consumers) for site in policy.sites() for n in site.consumers}
    for job in plan(policy, preset("omega"), policy.num_steps):
        steps = 1 if job.num_steps is None else job.num_steps
        tokens = SAMPLES * (prefix if job.num_steps is None else suffix * steps)
        found.setdefault((job.side, *job.shape, tokens), []).append(job.name)
    return [
        Shape(
            side,
            rows,
            width,
            len(names),
            len(names) / sum(1 / sharing[n] for n in names),
            tokens,
        )
        for (side, rows, width, tokens), names in found.items()
    ]


def inputs(shape: Shape) -> Tensor:
    """bfloat16 [tokens, width] with a few channels tens of times the others."""
    generator = torch.Generator().manual_seed(shape.width)
    x = torch.empty(shape.tokens, shape.width).normal_(generator=generator)
    x[:, :: shape.width // 8] *= 20
    return x.bfloat16()


def scheme_of(side: str, rounding: str) -> Scheme:
    """`omega`'s scheme of a side; with `rounding` "published", weights as the backbone's are there
    (each block of 128 columns alone), without the smoothing and residual that it does not have."""
    scheme = getattr(preset("omega"), side).scheme
    if rounding == "omega":
        return scheme
    weight = preset("omega-paper").backbone.scheme.weight
    return replace(scheme, weight=weight, smoothing=None)


def measure(shape: Shape, rounding: str) -> Row:
    """Both procedures on one layer, the passes of the policy not yet charged."""
    x = inputs(shape)
    weight = torch.empty(shape.rows, shape.width).normal_(
        generator=torch.Generator().manual_seed(shape.rows)
    )
    weight *= shape.width**-0.5

    def their_hessian() -> Tensor:
        hessian = torch.zeros(shape.width, shape.width)
        for part in x.split(1024):
            wide = part.float()
            hessian += wide.T @ wide
        return hessian / len(x)

    def our_stats() -> LayerStats:
        hessian = torch.zeros(shape.width, shape.width)
        energy, count = torch.zeros(shape.width, dtype=torch.float64), 0
        for part in x.split(2048):
            found, counted = robust_energy(part.float())
            energy += found
            count += counted
            with exact_products(part.dtype):
                add_gram_(hessian, part.float())
        mirror_(hessian.div_(len(x)), to="lower")
        profile = (energy / count).sqrt().float()
        return LayerStats(hessian, profile, (x[:1].float(),), len(x))

    their_time, hessian = clock(their_hessian)
    their_round, _ = clock(partial(published_rounding, weight, hessian))
    del hessian
    our_time, stats = clock(our_stats)
    scheme = scheme_of(shape.side, rounding)

    def our_layer() -> Any:
        return quantize_layer("layer", shape.side, weight, None, scheme, stats, None, consume=True)

    our_round, _ = clock(our_layer)
    return Row(
        shape.side,
        shape.rows,
        shape.width,
        shape.count,
        0.0,
        their_time,
        their_round,
        0.0,
        our_time / shape.sharing,
        our_round,
    )


def lengths(policy: Policy, observation: Observation) -> tuple[int, int]:
    """Tokens of the prefix and of one denoising step."""
    with torch.device("cpu"):
        prepared = policy.processor.prepare([observation])  # type: ignore[attr-defined]
    if isinstance(policy, Pi05Policy):
        images = 256 * sum(int(mask.sum()) for mask in prepared.image_masks)
        return images + int(prepared.token_mask.sum()), policy.action_horizon
    return prepared.input_ids.shape[1], policy.action_horizon + 33  # state, future tokens


def time_of_pass(policy: Policy, weights: Weights, observation: Observation) -> float:
    """Seconds that the whole policy runs for one observation; reading its weights is left out.

    With one thread the processor's seconds, which other processes do not lengthen. The last
    layer is watched, so that the inference goes to its end; its block is run twice.
    """
    name = plan(policy, preset("omega"), policy.num_steps)[-1].name
    watch = Stopwatch()
    with watch.running():
        for _ in stream(policy, weights, [observation], [name], token_cap=1):
            pass
    spent = watch.phases["collect"]
    return spent.cpu if torch.get_num_threads() == 1 else spent.wall


def table(rows: list[Row]) -> str:
    """Markdown."""
    lines = [
        "| side | out x in | layers | published: pass + Hessian + rounding | ours | ratio |",
        "|---|---|---|---|---|---|",
    ]
    for row in rows:
        theirs = " + ".join(
            f"{t:.1f}" for t in (row.published_pass, row.published_hessian, row.published_round)
        )
        ours = " + ".join(f"{t:.2f}" for t in (row.ours_pass, row.ours_hessian, row.ours_round))
        lines.append(
            f"| {row.side} | {row.rows} x {row.width} | {row.count} | {theirs} = "
            f"{row.published:.1f} s | {ours} = {row.ours:.1f} s | {row.published / row.ours:.1f} |"
        )
    return "\n".join(lines)


def summary(rows: list[Row]) -> dict[str, float]:
    """Ratio over all layers (weighted by their number) and geometric mean over the shapes."""
    theirs = sum(row.published * row.count for row in rows)
    ours = sum(row.ours * row.count for row in rows)
    logs = [math.log(row.published / row.ours) for row in rows]
    return {
        "published_s": theirs,
        "ours_s": ours,
        "ratio_total": theirs / ours,
        "ratio_geometric": math.exp(sum(logs) / len(logs)),
    }


def main() -> None:
    """Measure one family and write what came out."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("family", choices=["pi05", "groot_n15"])
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("observations", type=Path)
    parser.add_argument("--json", type=Path, required=True, metavar="OUT")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument(
        "--rounding",
        choices=["omega", "published"],
        default="omega",
        help="ours with full GPTQ, or with the published block-local one (default: omega)",
    )
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    policy, weights = open_policy(args.checkpoint, dtype=torch.bfloat16)
    observation = read_observations(args.observations).observations[0]
    todo = shapes(policy, *lengths(policy, observation))
    layers = sum(shape.count for shape in todo)
    record = read_record(args)
    known = {(row["side"], row["rows"], row["width"]): Row(**row) for row in record["rows"]}
    rows = []
    for shape in todo:
        found = known.get((shape.side, shape.rows, shape.width))
        rows.append(measure(shape, args.rounding) if found is None else found)
        write_record(args, record, rows)
        print(rows[-1], flush=True)
    one = time_of_pass(policy, weights, observation)
    rows = [row.charged(one * SAMPLES, layers) for row in rows]
    totals = summary(rows)
    print(table(rows), totals, sep="\n\n")
    write_record(args, {**record, "pass_of_one_observation_s": one, **totals}, rows)


def read_record(args: argparse.Namespace) -> dict[str, Any]:
    """What an earlier run has measured, or an empty record."""
    if args.json.exists():
        record: dict[str, Any] = json.loads(args.json.read_text(encoding="utf-8"))
        asked = (args.family, args.threads, args.rounding)
        if (record["family"], record["threads"], record.get("rounding", "omega")) != asked:
            raise SystemExit(f"{args.json} is of another family, number of threads or rounding")
        return record
    return {
        "family": args.family,
        "threads": args.threads,
        "rounding": args.rounding,
        "samples": SAMPLES,
        "rows": [],
        "environment": environment(),
    }


def write_record(args: argparse.Namespace, record: dict[str, Any], rows: list[Row]) -> None:
    """Everything measured so far."""
    text = json.dumps({**record, "rows": [asdict(row) for row in rows]}, indent=1)
    args.json.write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
