"""Whole policies, and single denoising steps at true size, on every way to run them here.

    python benchmarks/policy.py --json policy.json
    python benchmarks/policy.py --cases pi05-demo groot-demo --threads 1

Cases: one action chunk (images to actions) of the two bundled policies; one step of pi0.5's
expert (18 layers of 1024, 10 or 50 actions over a prefix of 968) and one of GR00T N1.5's DiT (16
layers of 1536, 49 tokens, 565 features) with random weights. Weights are rounded to nearest,
which takes as long to run as any.

Arms take turns, round after round. `fp32` is plain PyTorch; `control` is full precision on the
very graph that the quantized arms run on (compiled norms, gates and attention, oneDNN products):
what is left between it and `native` is the quantized layers. `fp32 compiled` is torch.compile
over whole stacks.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import os
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from omega_qvla.config.presets import preset
from omega_qvla.config.recipe import Scheme
from omega_qvla.evaluation.bench_arms import compile_stacks, has_bf16
from omega_qvla.evaluation.environment import environment
from omega_qvla.evaluation.latency import Latency, alternate
from omega_qvla.kernels.cpu import isa_names
from omega_qvla.modules.linear import replace_linears
from omega_qvla.modules.step_context import denoising_step
from omega_qvla.numerics.layer import QuantizedLayer
from omega_qvla.numerics.packing import pack_int4
from omega_qvla.policies.base import SIDES, Policy
from omega_qvla.policies.groot_n15.config import TransformerConfig
from omega_qvla.policies.groot_n15.dit import DiT
from omega_qvla.policies.hasten import hasten, hasten_module
from omega_qvla.policies.observation import Observation
from omega_qvla.policies.pi05.config import GEMMA_VARIANTS
from omega_qvla.policies.pi05.gemma import Expert, Rope
from omega_qvla.policies.registry import load_policy
from omega_qvla.policies.targets import select_targets

ASSETS = Path(__file__).resolve().parent.parent / "assets"
DEMOS = {"pi05-demo": "pi05-metaworld", "groot-demo": "groot-n15-metaworld"}
PREFIX, FEATURES, TOKENS = 968, 565, 49  # positions that the true policies read
ARMS = ("fp32", "control", "bf16", "fp32 compiled", "emulated", "native")
Call = Callable[[], Any]


def rounded(name: str, linear: nn.Linear, side: str, scheme: Scheme) -> QuantizedLayer:
    """`linear` with its weight rounded to nearest; smoothing by a constant, a small low rank."""
    weight = linear.weight.detach().float()
    scale = weight.abs().amax(1, keepdim=True).clamp_min(1e-6) / 7
    generator = torch.Generator().manual_seed(0)
    rank = scheme.weight.rank

    def thin(rows: int) -> Tensor | None:
        return 0.01 * torch.randn(rows, rank, generator=generator).half() if rank else None

    return QuantizedLayer(
        name=name,
        side=side,
        in_features=linear.in_features,
        out_features=linear.out_features,
        scheme=scheme,
        num_steps=None,
        qweight=pack_int4((weight / scale).round().clamp(-8, 7).to(torch.int8)),
        weight_scale=scale.half(),
        bias=None if linear.bias is None else linear.bias.detach().float(),
        smooth=torch.full((linear.in_features,), 1.25).half(),
        lowrank_a=thin(linear.out_features),
        lowrank_b=thin(linear.in_features),
    )


# --- one chunk of a bundled policy ---------------------------------------------------------


def demo_calls(case: str) -> dict[str, Call]:
    """arm -> one chunk, images to actions."""
    checkpoint = ASSETS / DEMOS[case]
    calls: dict[str, Call] = {}
    for arm in available_arms():
        dtype = torch.bfloat16 if arm == "bf16" else torch.float32
        policy = load_policy(checkpoint, dtype=dtype)
        if arm in ("emulated", "native"):
            quantize(policy, arm)
        if arm in ("control", "emulated", "native"):
            hasten(policy)
        if arm == "fp32 compiled":
            compile_stacks(policy.module)
        calls[arm] = chunk(policy)
    return calls


def quantize(policy: Policy, backend: str) -> None:
    """The layers of the `omega` recipe, rounded to nearest."""
    recipe, layers = preset("omega"), {}
    for side in SIDES:
        part = recipe.backbone if side == "backbone" else recipe.action_head
        assert part is not None
        for name, scheme in select_targets(policy, part, side):
            layers[name] = rounded(name, policy.module.get_submodule(name), side, scheme)
    replace_linears(
        policy.module, layers, backend, together=[site.consumers for site in policy.sites()]
    )


def chunk(policy: Policy) -> Call:
    """One inference on a random observation."""
    rng = np.random.default_rng(0)
    config = policy.processor.config
    edge = _image_size(policy)
    state = policy.processor.state_dim if hasattr(policy.processor, "state_dim") else None
    observation = Observation(
        {c: rng.integers(0, 256, (edge, edge, 3), np.uint8) for c in policy.cameras},
        np.zeros(config.state_dim if state is None else state, np.float32),
        "open the drawer",
    )

    def call() -> Any:
        with torch.inference_mode():
            inputs = policy.prepare([observation])
            noise = policy.draw_noise(1, 0)
            return policy.finish(policy.sample(policy.encode(inputs), noise), inputs)

    return call


def _image_size(policy: Policy) -> int:
    config = policy.module.config
    vision = config.vision if hasattr(config, "vision") else config.eagle.vision
    return int(vision.image_size)


# --- one denoising step at true size -------------------------------------------------------


def step_calls(case: str) -> dict[str, Call]:
    """arm -> one step of a stack with random weights."""
    family, _, size = case.partition("-step")
    stack = _expert() if family == "pi05" else _dit()
    run = pi05_step(int(size.lstrip("-"))) if family == "pi05" else groot_step(stack)
    arms = {arm: prepared(stack, family, arm) for arm in available_arms()}
    return {arm: run(module, arm) for arm, module in arms.items()}


def _expert() -> Expert:
    return _random(Expert(GEMMA_VARIANTS["gemma_300m"]))


def _dit() -> DiT:
    config = TransformerConfig(
        num_layers=16, num_attention_heads=32, attention_head_dim=48, cross_attention_dim=2048,
        interleave_self_attention=True,
    )  # fmt: skip
    return _random(DiT(config, 1024))


def _random(module: nn.Module) -> Any:
    generator = torch.Generator().manual_seed(0)
    for parameter in module.parameters():
        parameter.requires_grad_(False)
        if parameter.dim() > 1:
            scale = 0.5 / math.sqrt(parameter.shape[1])
            parameter.copy_(scale * torch.randn(parameter.shape, generator=generator))
    return module.eval()


def prepared(stack: nn.Module, family: str, arm: str) -> nn.Module:
    """`stack` as an arm runs it; full-precision arms share its weights."""
    shared: dict[int, Any] = {} if arm == "bf16" else {id(p): p for p in stack.parameters()}
    module = copy.deepcopy(stack, shared)
    if arm == "bf16":
        return module.to(torch.bfloat16) if family == "groot" else _bf16_expert(module)
    if arm == "fp32 compiled":
        compile_stacks(module)
    if arm in ("emulated", "native"):
        head = preset("omega").action_head
        assert head is not None
        layers = {
            name: rounded(name, layer, "action_head", head.scheme)
            for name, layer in module.named_modules()
            if isinstance(layer, nn.Linear) and ("attn" in name or "mlp" in name or "ff." in name)
        }
        replace_linears(module, layers, arm, together=_readers(module, family))
    if arm in ("control", "emulated", "native"):
        hasten_module(module)
    return module


def _bf16_expert(module: nn.Module) -> nn.Module:
    """The mix that openpi runs: norms and modulations stay float32."""
    for name, parameter in module.named_parameters():
        if "norm" not in name:
            parameter.data = parameter.data.to(torch.bfloat16)
    return module


def _readers(module: nn.Module, family: str) -> list[tuple[str, ...]]:
    groups = []
    if family == "pi05":
        for i in range(len(module.layers)):
            attention, mlp = f"layers.{i}.self_attn", f"layers.{i}.mlp"
            groups.append(tuple(f"{attention}.{n}_proj" for n in "qkv"))
            groups.append((f"{mlp}.gate_proj", f"{mlp}.up_proj"))
        return groups
    crossing: list[str] = []
    for i, block in enumerate(module.transformer_blocks):
        here = f"transformer_blocks.{i}.attn1"
        if block.cross:
            crossing += [f"{here}.to_k", f"{here}.to_v"]
        else:
            groups.append((f"{here}.to_q", f"{here}.to_k", f"{here}.to_v"))
    return [*groups, tuple(crossing)]


def pi05_step(actions: int) -> Callable[[Expert, str], Call]:
    """One pass of the expert over `actions` tokens and a cached prefix."""
    config = GEMMA_VARIANTS["gemma_300m"]
    generator = torch.Generator().manual_seed(1)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    x = normal(1, actions, config.width)
    shape = (1, config.num_kv_heads, PREFIX, config.head_dim)
    keys = [normal(*shape) for _ in range(config.depth)]
    values = [normal(*shape) for _ in range(config.depth)]
    condition = normal(1, config.width)
    positions = PREFIX + torch.arange(actions)[None]

    def make(module: Expert, arm: str) -> Call:
        dtype = torch.bfloat16 if arm == "bf16" else torch.float32
        rope = Rope.at(positions, config.head_dim, dtype)
        modulations = module.modulations(condition)
        k, v = (tuple(t.to(dtype) for t in part) for part in (keys, values))
        given = x.to(dtype)

        def call() -> Any:
            with torch.inference_mode(), denoising_step(0, 10):
                return module(given, k, v, rope, None, modulations)

        return call

    return make


def groot_step(stack: DiT) -> Callable[[DiT, str], Call]:
    """One pass of the DiT over 49 tokens and the keys of 565 features."""
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randn(1, TOKENS, stack.width, generator=generator)
    features = torch.randn(1, FEATURES, 2048, generator=generator)

    def make(module: DiT, arm: str) -> Call:
        dtype = torch.bfloat16 if arm == "bf16" else torch.float32
        with torch.inference_mode():
            key_values = module.cross_key_values(features.to(dtype))
            conditioning = module.conditioning(torch.tensor([250]), dtype)
        given = tokens.to(dtype)

        def call() -> Any:
            with torch.inference_mode(), denoising_step(0, 4):
                return module(given, key_values, conditioning, None, keep=16)

        return call

    return make


# --- the run -------------------------------------------------------------------------------

CASES: dict[str, Callable[[str], dict[str, Call]]] = {
    **dict.fromkeys(DEMOS, demo_calls),
    "pi05-step-10": step_calls,
    "pi05-step-50": step_calls,
    "groot-step": step_calls,
}
_CHOSEN: tuple[str, ...] = ARMS


def available_arms() -> tuple[str, ...]:
    """The chosen arms that this machine can run."""
    native = bool(isa_names())
    can = {"bf16": has_bf16(), "native": native}
    return tuple(arm for arm in _CHOSEN if can.get(arm, True))


def compare(times: dict[str, Latency]) -> dict[str, float]:
    """p50 of the other arms over that of the native one."""
    if "native" not in times:
        return {}
    own = times["native"].p50
    return {arm: latency.p50 / own for arm, latency in times.items() if arm != "native"}


def run(args: argparse.Namespace) -> dict[str, Any]:
    """All cases and thread counts; prints each as it is done."""
    rows: list[dict[str, Any]] = []
    for case in args.cases:
        torch.set_num_threads(max(args.threads))
        calls = CASES[case](case)
        for threads in args.threads:
            torch.set_num_threads(threads)
            times = alternate(calls, args.rounds, warm=3)
            row = {
                "case": case,
                "threads": threads,
                "native_over": compare(times),
                "ms": {arm: asdict(latency) for arm, latency in times.items()},
            }
            rows.append(row)
            _print(row)
        del calls
    return {
        "environment": environment(),
        "isa": isa_names(),
        "load": os.getloadavg(),
        "rounds": args.rounds,
        "rows": rows,
    }


def _print(row: dict[str, Any]) -> None:
    print(f"{row['case']}, {row['threads']} thread(s)")
    for arm, ms in row["ms"].items():
        ratio = row["native_over"].get(arm)
        over = "" if ratio is None else f"   native is {ratio:.2f}x as fast"
        print(
            f"    {arm:14}{ms['p50']:9.2f} ms p50 {ms['p95']:9.2f} p95 "
            f"±{100 * ms['spread']:.0f}%{over}",
            flush=True,
        )


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path, help="write the results here")
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES), metavar="CASE")
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=ARMS, metavar="ARM")
    parser.add_argument(
        "--threads", type=lambda text: tuple(map(int, text.split(","))), default=(1, 2)
    )
    parser.add_argument("--rounds", type=int, default=15)
    return parser.parse_args()


def main() -> None:
    """Run, print, and write the JSON."""
    global _CHOSEN
    args = arguments()
    _CHOSEN = tuple(args.arms)
    results = run(args)
    if args.json is not None:
        args.json.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    with torch.no_grad():
        main()
