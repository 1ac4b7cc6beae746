"""`omega-qvla bench`: how fast a checkpoint and its pack run here."""

from __future__ import annotations

import argparse
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from omega_qvla.cli.console import Console
from omega_qvla.cli.loading import add_pack_options, loading, pack_options
from omega_qvla.cli.parsing import add_checkpoint, add_device, at_least

if TYPE_CHECKING:
    from omega_qvla.policies.base import Policy

DESCRIPTION = """\
Time one action chunk in full precision, with the pack emulated in floating point, and
with the pack on integers. The arms take turns in one run: p50 and p95 of the backbone,
of one denoising step and of the whole chunk. fp32 is the control: the same code, not
quantized.
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
    parser.add_argument("--bf16", action="store_true", help="also full precision in bfloat16")
    parser.add_argument("--compile", action="store_true", help="also fp32 under torch.compile")
    add_pack_options(parser)
    add_device(parser)


def run(args: argparse.Namespace, console: Console) -> int:
    """Measure and show."""
    import torch

    from omega_qvla.calibration.samples import read_observations
    from omega_qvla.evaluation.environment import environment
    from omega_qvla.evaluation.latency import STAGES, measure

    observation = read_observations(args.observations).observations[0]
    arms = _arms(args, console)
    results: list[dict[str, Any]] = []
    before = torch.get_num_threads()
    try:
        for threads in args.threads or [before]:
            torch.set_num_threads(threads)
            console.note(f"{args.rounds} rounds of {', '.join(arms)} on {threads} thread(s)")
            found = measure(arms, observation, args.rounds)
            console.table(
                ["arm", *(f"{stage} p50/p95 ms" for stage in STAGES), "chunk over fp32"],
                [
                    [
                        name,
                        *(f"{stages[s].p50:.2f} / {stages[s].p95:.2f}" for s in STAGES),
                        f"{found['fp32']['chunk'].p50 / stages['chunk'].p50:.2f}x",
                    ]
                    for name, stages in found.items()
                ],
                title=f"{threads} thread(s)",
            )
            for name, stages in found.items():
                row = {stage: asdict(latency) for stage, latency in stages.items()}
                results.append({"threads": threads, "arm": name, "ms": row})
    finally:
        torch.set_num_threads(before)
    console.result({"environment": environment(), "rounds": args.rounds, "results": results})
    return 0


def _arms(args: argparse.Namespace, console: Console) -> dict[str, Policy]:
    """Every way to run it, each with a policy of its own."""
    import torch

    from omega_qvla.runtime.engine import Engine

    console.note("loading")
    options = {"device": args.device, **loading(args)}
    arms = {"fp32": Engine.load(args.checkpoint, **options).policy}
    if args.bf16:
        arms["bf16"] = Engine.load(args.checkpoint, dtype=torch.bfloat16, **options).policy
    if args.compile:
        policy = Engine.load(args.checkpoint, **options).policy
        _compile(policy)
        arms["fp32 compiled"] = policy
    for backend in args.backends:
        engine = Engine.load(
            args.checkpoint, args.pack, backend=backend, **options, **pack_options(args)
        )
        arms[f"{args.pack.stem} {engine.backend}"] = engine.policy
    return arms


def _compile(policy: Policy) -> None:
    """torch.compile on every transformer block, in place."""
    from torch import nn

    for stack in policy.module.modules():
        if isinstance(stack, nn.ModuleList):
            for block in stack:
                block.compile()
