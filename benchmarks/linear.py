"""One quantized layer, native, against every other way to run it on this CPU.

    python benchmarks/linear.py --json linear.json
    python benchmarks/linear.py --shapes 10,2048,16384 50,1024,4096 --threads 1

Whole layers: float32 in and out, smoothing, rotation, scale search and rounding included.
Arms take turns, round after round: each runs until its weights are back in the caches, then for
at least two milliseconds; medians, and the spread between the quartiles. `--cold` empties the
caches before each call instead, as the rest of a large policy does. The control is a loop of
products in registers: what the integer units of one core can do at most. Peers that are not
installed are named: pip install onnx onnxruntime openvino.
`--merge` puts the results of several runs (other shapes or thread counts) into one file.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from omega_qvla.config.presets import preset
from omega_qvla.config.recipe import ActivationScheme, Rotation, Scheme, Smoothing, WeightScheme
from omega_qvla.evaluation.environment import environment
from omega_qvla.kernels import _native
from omega_qvla.kernels.registry import resolve_backend
from omega_qvla.numerics.layer import QuantizedLayer
from omega_qvla.numerics.packing import pack_int4
from peers import PEERS, Problem

SHAPES = (
    (1, 2048, 16384), (10, 2048, 16384), (17, 1536, 1536), (50, 1024, 2048), (50, 1024, 4096),
    (50, 4096, 1024), (512, 1536, 6144), (968, 2048, 2048), (968, 2048, 16384),
    (968, 16384, 2048),
)  # fmt: skip
MAIN = "native omega"
BASE = "torch fp32"
_SAMPLE = 2e-3  # seconds of calls in one sample
_WARM = 4e-3  # seconds of calls before it: other arms' weights have to leave the caches
_REST = 5e-3  # seconds between samples: other runtimes' threads spin after their work


@dataclass(frozen=True)
class Timing:
    """Milliseconds a call: median, half the distance of the quartiles over the median, and the
    least, which a busy machine disturbs least."""

    median: float
    spread: float
    least: float


def schemes() -> dict[str, Scheme]:
    """The native arms: name -> scheme."""
    side = preset("omega").backbone
    eight = preset("w4a8").backbone
    assert side is not None and eight is not None
    return {
        MAIN: side.scheme,
        "native groups 128": Scheme(
            Rotation("hadamard"), WeightScheme(),
            ActivationScheme("per_token_group", group=128, clip=0.95), Smoothing(),
        ),
        "native w4a8": eight.scheme,
        "native per token": Scheme(
            Rotation("hadamard"), WeightScheme(), ActivationScheme("per_token", clip=0.9),
            Smoothing(),
        ),
    }  # fmt: skip


def native_call(p: Problem, scheme: Scheme) -> Callable[[], Any]:
    """A layer of this scheme: weights rounded to nearest, which takes as long as any."""
    _, k, n = p.shape
    scale = p.weight.abs().amax(1, keepdim=True) / 7
    layer = QuantizedLayer(
        name="bench",
        side="backbone",
        in_features=k,
        out_features=n,
        scheme=scheme,
        num_steps=None,
        qweight=pack_int4((p.weight / scale).round().to(torch.int8)),
        weight_scale=scale.half(),
        bias=p.bias,
        smooth=torch.ones(k).half() * 1.25,
    )
    kernel = resolve_backend("native", [layer]).prepare(layer, torch.device("cpu"))
    return lambda: kernel(p.x, None)


def problem(shape: tuple[int, int, int], threads: int) -> Problem:
    """Random input and weights."""
    m, k, n = shape
    generator = torch.Generator().manual_seed(0)
    return Problem(
        torch.randn(m, k, generator=generator),
        torch.randn(n, k, generator=generator) / math.sqrt(k),
        torch.randn(n, generator=generator),
        threads,
    )


def build(p: Problem) -> tuple[dict[str, Callable[[], Any]], dict[str, str]]:
    """(arm -> call, arm -> why it is missing)."""
    calls = {name: native_call(p, scheme) for name, scheme in schemes().items()}
    missing: dict[str, str] = {}
    for peer in PEERS:
        try:
            call = peer.make(p)
            call()
            calls[peer.name] = call
        except Exception as error:  # a peer that fails must not end the comparison
            missing[peer.name] = f"{type(error).__name__}: {str(error).splitlines()[0][:120]}"
    return calls, missing


def warm_up(call: Callable[[], Any]) -> None:
    """Calls until the caches hold what this arm reads."""
    until = time.perf_counter() + _WARM
    call()
    while time.perf_counter() < until:
        call()


def repeats(call: Callable[[], Any]) -> int:
    """Calls in one sample."""
    warm_up(call)
    start = time.perf_counter()
    call()
    return max(1, math.ceil(_SAMPLE / max(time.perf_counter() - start, 1e-7)))


def alternate(
    calls: dict[str, Callable[[], Any]], rounds: int, flush: Callable[[], Any] | None
) -> dict[str, Timing]:
    """Time all arms in turn, `rounds` times."""
    counts = {name: 1 if flush else repeats(call) for name, call in calls.items()}
    samples: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(rounds):
        for name, call in calls.items():
            time.sleep(_REST)
            if flush:
                flush()
            else:
                warm_up(call)
            start = time.perf_counter()
            for _ in range(counts[name]):
                call()
            samples[name].append((time.perf_counter() - start) / counts[name] * 1e3)
    return {name: _timing(values) for name, values in samples.items()}


def _timing(values: list[float]) -> Timing:
    median = statistics.median(values)
    if len(values) < 4:
        return Timing(median, 0.0, min(values))
    low, _, high = statistics.quantiles(values, n=4)
    return Timing(median, (high - low) / 2 / median, min(values))


def flusher() -> Callable[[], Any]:
    """Reads and writes more than any cache holds."""
    memory = torch.zeros(32 << 20)  # 128 MiB
    return lambda: memory.add_(1.0)


def compare(ms: dict[str, float]) -> dict[str, Any]:
    """What the bars are about: ours against fp32, the best peer and every 4-bit peer."""
    ours = ms[MAIN]
    peers = {p.name: ms[p.name] for p in PEERS if p.name in ms}
    four = {p.name: peers[p.name] / ours for p in PEERS if p.bits == 4 and p.name in peers}
    best = min(peers, key=peers.__getitem__)
    return {
        "over_fp32": peers[BASE] / ours,
        "best_peer": best,
        "over_best": peers[best] / ours,
        "over_4bit": four,
    }


def geometric_mean(values: list[float]) -> float:
    """Of positive numbers."""
    return math.exp(sum(map(math.log, values)) / len(values))


def run(args: argparse.Namespace) -> dict[str, Any]:
    """All shapes and thread counts; prints each as it is done."""
    rows: list[dict[str, Any]] = []
    peak = _native.peak_rate()
    print(f"control, products in registers: {peak:.0f} G/s on one core")
    flush = flusher() if args.cold else None
    for threads in args.threads:
        torch.set_num_threads(threads)
        for shape in args.shapes:
            with torch.inference_mode():
                calls, missing = build(problem(shape, threads))
                timings = alternate(calls, args.rounds, flush)
            row = {"shape": shape, "threads": threads, "missing": missing}
            row |= compare({name: timing.median for name, timing in timings.items()})
            row["by_least"] = compare({name: timing.least for name, timing in timings.items()})
            row["ms"] = {name: asdict(timing) for name, timing in timings.items()}
            rows.append(row)
            _print(row)
    summary = [_summary(threads, rows) for threads in args.threads]
    return {
        "environment": environment(),
        "load": os.getloadavg(),
        "cold": args.cold,
        "rounds": args.rounds,
        "peak": peak,
        "summary": summary,
        "rows": rows,
    }


def _summary(threads: int, rows: list[dict[str, Any]]) -> dict[str, Any]:
    mine = [row for row in rows if row["threads"] == threads]
    return {"threads": threads, **_means(mine), "by_least": _means([r["by_least"] for r in mine])}


def _means(mine: list[dict[str, Any]]) -> dict[str, Any]:
    return {
        "over_fp32": geometric_mean([row["over_fp32"] for row in mine]),
        "over_best": geometric_mean([row["over_best"] for row in mine]),
        "least_over_4bit": min(
            (ratio for row in mine for ratio in row["over_4bit"].values()), default=None
        ),
    }


def _print_summary(summary: dict[str, Any]) -> None:
    for label, means in (("medians", summary), ("least times", summary["by_least"])):
        least = means["least_over_4bit"]
        print(
            f"{summary['threads']} thread(s), geometric means of {label}: "
            f"{means['over_fp32']:.2f}x torch fp32, {means['over_best']:.2f}x the best peer; "
            "least over a 4-bit peer: " + ("no such peer" if least is None else f"{least:.2f}x")
        )


def _print(row: dict[str, Any]) -> None:
    m, k, n = row["shape"]
    print(
        f"({m}, {k}, {n}), {row['threads']} thread(s): {row['over_fp32']:.2f}x torch fp32, "
        f"{row['over_best']:.2f}x the best peer ({row['best_peer']}); by the least times "
        f"{row['by_least']['over_fp32']:.2f}x, {row['by_least']['over_best']:.2f}x"
    )
    for name, timing in sorted(row["ms"].items(), key=lambda item: item[1]["median"]):
        rate = 2e-6 * m * k * n / timing["median"]
        spread = f"±{100 * timing['spread']:.0f}%"
        print(
            f"    {name:17}{timing['median']:10.3f} ms {spread:>5}{rate:8.0f} G/s"
            f"{timing['least']:10.3f} ms at least"
        )
    for name, why in row["missing"].items():
        print(f"    {name:17}   missing: {why}")


def shape_of(text: str) -> tuple[int, int, int]:
    """ "M,K,N" as numbers."""
    m, k, n = map(int, text.split(","))
    return m, k, n


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path, help="write the results here")
    parser.add_argument("--shapes", type=shape_of, nargs="+", default=SHAPES, metavar="M,K,N")
    parser.add_argument(
        "--threads", type=lambda text: tuple(map(int, text.split(","))), default=(1, 2)
    )
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--merge", type=Path, nargs="+", metavar="FILE", help="run nothing")
    parser.add_argument("--cold", action="store_true", help="empty the caches before each call")
    return parser.parse_args()


def merge(files: list[Path]) -> dict[str, Any]:
    """The rows of several runs as one result, summed up anew; later files win."""
    runs = [json.loads(file.read_text(encoding="utf-8")) for file in files]
    rows = {(row["threads"], *row["shape"]): row for run in runs for row in run["rows"]}
    kept = [rows[key] for key in sorted(rows)]
    threads = sorted({row["threads"] for row in kept})
    summary = [_summary(count, kept) for count in threads]
    return {**runs[-1], "peak": max(r["peak"] for r in runs), "summary": summary, "rows": kept}


def main() -> None:
    """Run, print, and write the JSON."""
    args = arguments()
    results = merge(args.merge) if args.merge else run(args)
    for summary in results["summary"]:
        _print_summary(summary)
    if args.json is not None:
        args.json.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
