"""`omega-qvla bench`: how fast a checkpoint and its pack run here, and in how much memory."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from omega_qvla.cli.console import Console
from omega_qvla.cli.loading import add_pack_options, loading, pack_options
from omega_qvla.cli.memory_process import peak_memory
from omega_qvla.cli.parsing import add_checkpoint, add_device, at_least

if TYPE_CHECKING:
    from omega_qvla.evaluation.latency import Latency
    from omega_qvla.evaluation.layer_latency import Kind
    from omega_qvla.policies.base import Policy
    from omega_qvla.policies.observation import Observation

DESCRIPTION = """\
Time one action chunk in full precision, with the pack emulated in floating point, and
with the pack on integers. The arms take turns in one run: p50 and p95 of the image
encoder, the rest of the prefix, one denoising step and the whole chunk; then of each
kind of quantized layer, and the peak memory of each arm in a process of its own.

fp32 is plain PyTorch. `control` is full precision on the very graph that the pack runs
on: the same compiled norms, gates and attention, nothing quantized.
"""
EXAMPLES = """\
  omega-qvla bench CHECKPOINT --pack omega.safetensors --observations held-out.safetensors
  omega-qvla bench CHECKPOINT --pack omega.safetensors --observations held-out.safetensors \\
      --threads 1 2 --compile --json
"""


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the arguments."""
    add_checkpoint(parser)
    parser.add_argument("--pack", type=Path, required=True, metavar="FILE")
    parser.add_argument(
        "--observations", type=Path, required=True, metavar="FILE", help="the first one is used"
    )
    parser.add_argument("--rounds", type=at_least(1), default=20, metavar="N")
    parser.add_argument(
        "--threads", type=at_least(1), nargs="+", metavar="N", help="default: as torch has it"
    )
    parser.add_argument(
        "--backends",
        nargs="+",
        default=["emulated", "auto"],
        metavar="NAME",
        help="that run the pack (default: emulated auto)",
    )
    parser.add_argument(
        "--bf16",
        action=argparse.BooleanOptionalAction,
        default=None,
        help="full precision in bfloat16 (default: where the CPU multiplies it in hardware)",
    )
    parser.add_argument("--compile", action="store_true", help="also fp32 under torch.compile")
    parser.add_argument(
        "--layers", action=argparse.BooleanOptionalAction, default=True, help="time the layers"
    )
    parser.add_argument(
        "--memory", action=argparse.BooleanOptionalAction, default=True, help="measure the memory"
    )
    add_pack_options(parser)
    add_device(parser)


def run(args: argparse.Namespace, console: Console) -> int:
    """Measure and show."""
    import torch

    from omega_qvla.calibration.samples import read_observations
    from omega_qvla.evaluation.environment import environment

    observation = read_observations(args.observations).observations[0]
    kinds = _kinds(args)
    data: dict[str, Any] = {"environment": environment(), "rounds": args.rounds}
    data["memory"] = _memory(args, kinds, console)
    arms = _arms(args, kinds, console)
    data["results"], data["layers"] = [], []
    before = torch.get_num_threads()
    try:
        for threads in args.threads or [before]:
            torch.set_num_threads(threads)
            console.note(f"{args.rounds} rounds of {', '.join(arms)} on {threads} thread(s)")
            data["results"] += _chunks(args, arms, observation, threads, console)
            if args.layers:
                data["layers"] += _layers(args, arms, observation, threads, console)
    finally:
        torch.set_num_threads(before)
    console.result(data)
    return 0


def _kinds(args: argparse.Namespace) -> list[str]:
    """The arms, as `evaluation.bench_arms` calls them."""
    from omega_qvla.evaluation.bench_arms import has_bf16

    bf16 = args.device == "cpu" and has_bf16() if args.bf16 is None else args.bf16
    kinds = ["fp32", "control"]
    kinds += ["bf16"] if bf16 else []
    kinds += ["fp32 compiled"] if args.compile else []
    return [*kinds, *args.backends]


def _arms(args: argparse.Namespace, kinds: list[str], console: Console) -> dict[str, Policy]:
    """Every way to run it, each with a policy of its own."""
    from omega_qvla.evaluation.bench_arms import BenchArm

    console.note("loading")
    options = {"device": args.device, **loading(args)}
    arms: dict[str, Policy] = {}
    for kind in kinds:
        arm = BenchArm(kind)
        engine = arm.load(args.checkpoint, args.pack, **options, **pack_options(args))
        arms[f"{args.pack.stem} {engine.backend}" if arm.quantized else kind] = engine.policy
    return arms


def _chunks(
    args: argparse.Namespace,
    arms: Mapping[str, Policy],
    observation: Observation,
    threads: int,
    console: Console,
) -> list[dict[str, Any]]:
    from omega_qvla.evaluation.latency import STAGES, measure

    found = measure(arms, observation, args.rounds)
    plain, control = found["fp32"]["chunk"].p50, found["control"]["chunk"].p50
    console.table(
        ["arm", *(f"{stage} p50/p95 ms" for stage in STAGES), "fp32 / it", "control / it"],
        [
            [
                name,
                *(_both(stages[s]) for s in STAGES),
                f"{plain / stages['chunk'].p50:.2f}x",
                f"{control / stages['chunk'].p50:.2f}x",
            ]
            for name, stages in found.items()
        ],
        title=f"{threads} thread(s), one chunk",
    )
    return [
        {"threads": threads, "arm": name, "ms": {s: asdict(x) for s, x in stages.items()}}
        for name, stages in found.items()
    ]


def _layers(
    args: argparse.Namespace,
    arms: Mapping[str, Policy],
    observation: Observation,
    threads: int,
    console: Console,
) -> list[dict[str, Any]]:
    from omega_qvla.evaluation.layer_latency import measure_layers

    found = measure_layers(arms, observation, args.rounds)
    console.table(
        ["layer (of how many)", "rows, in, out", *(f"{name} p50/p95 ms" for name in arms)],
        [
            [
                f"{_short(kind)} ({kind.count})",
                f"{kind.rows}, {kind.in_features}, {kind.out_features}",
                *(_both(times[name]) for name in arms),
            ]
            for kind, times in found
        ],
        title=f"{threads} thread(s), one layer of each kind",
    )
    return [
        {
            "threads": threads,
            **asdict(kind),
            "ms": {name: asdict(latency) for name, latency in times.items()},
        }
        for kind, times in found
    ]


def _memory(args: argparse.Namespace, kinds: list[str], console: Console) -> list[dict[str, Any]]:
    from omega_qvla.evaluation.peak_memory import available

    if not args.memory or not available() or args.device != "cpu":
        return []
    console.note("measuring the peak memory of each arm")
    options = {**loading(args), **pack_options(args)}
    measured = {
        kind: peak_memory(kind, args.checkpoint, args.pack, args.observations, options)
        for kind in kinds
    }
    console.table(
        ["arm", "interpreter MiB", "loading, peak above it", "running, peak above it"],
        [
            [kind, *(f"{n / 2**20:.1f}" for n in (m.base, m.load - m.base, m.run - m.base))]
            for kind, m in measured.items()
        ],
        title="memory, each arm in a process of its own",
    )
    return [{"arm": kind, "bytes": asdict(m)} for kind, m in measured.items()]


def _both(latency: Latency) -> str:
    return f"{latency.p50:.3f} / {latency.p95:.3f}"


def _short(kind: Kind) -> str:
    """The names from the block on: what comes before is the same for all."""
    return " + ".join(name.rpartition("*.")[2] for name in kind.name.split(" + "))
