"""How long the quantized layers take by themselves, on the inputs that they get in an inference.

Layers that read one input and are joined count as one. Layers of the same name up to numbers
(`layers.0.mlp.gate_proj`, `layers.1.mlp.gate_proj`, ...) are one kind.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from omega_qvla.evaluation.latency import Latency, alternate
from omega_qvla.modules.linear import QuantLinear
from omega_qvla.modules.shared import project
from omega_qvla.modules.step_context import Step, current_step, denoising_step
from omega_qvla.policies.base import Policy
from omega_qvla.policies.observation import Observation


@dataclass(frozen=True)
class Kind:
    """Layers of one kind: names with `*` for numbers, rows of its input, widths, how many."""

    name: str
    rows: int
    in_features: int
    out_features: int
    count: int


@dataclass(frozen=True)
class _Seen:
    """Layers that run together, and the input and step of their last call."""

    names: tuple[str, ...]
    x: Tensor
    step: Step | None


def measure_layers(
    arms: Mapping[str, Policy], observation: Observation, rounds: int
) -> list[tuple[Kind, dict[str, Latency]]]:
    """For each kind of quantized layer: arm -> latency of one of its layers, the first.

    `arms` must have a quantized one, which says what is measured; joined are the layers that
    are in any arm. The inputs are those of the first arm.
    """
    quantized = min((p for p in arms.values() if _groups(p)), key=lambda p: len(_groups(p)))
    seen = _inputs(next(iter(arms.values())), _groups(quantized), observation)
    kinds: dict[str, list[_Seen]] = {}
    for one in seen:
        kinds.setdefault(" + ".join(re.sub(r"\d+", "*", n) for n in one.names), []).append(one)
    results = []
    for name, members in kinds.items():
        first = members[0]
        layers = [quantized.module.get_submodule(n) for n in first.names]
        width = first.x.shape[-1]
        kind = Kind(
            name=" + ".join(dict.fromkeys(name.split(" + "))),
            rows=first.x.numel() // width,
            in_features=width,
            out_features=sum(int(getattr(layer, "out_features")) for layer in layers),  # noqa: B009
            count=len(members),
        )
        calls = {arm: _call(policy, first) for arm, policy in arms.items()}
        with torch.inference_mode():
            results.append((kind, alternate(calls, rounds)))
    return results


def _groups(policy: Policy) -> list[tuple[str, ...]]:
    """Names of the quantized layers, those of one joined product together."""
    groups: dict[int, list[str]] = {}
    for name, layer in policy.module.named_modules():
        if isinstance(layer, QuantLinear):
            key = id(layer) if layer.shared is None else id(layer.shared)
            groups.setdefault(key, []).append(name)
    return [tuple(names) for names in groups.values()]


def _inputs(policy: Policy, groups: list[tuple[str, ...]], observation: Observation) -> list[_Seen]:
    """What the first layer of each group read last, in the order of the groups."""
    found: dict[str, tuple[Tensor, Step | None]] = {}
    with ExitStack() as stack:
        for names in groups:

            def see(module: nn.Module, args: tuple[Tensor, ...], name: str = names[0]) -> None:
                found[name] = (args[0].detach().clone(), current_step())

            layer = policy.module.get_submodule(names[0])
            stack.callback(layer.register_forward_pre_hook(see).remove)
        policy.infer(observation)
    return [_Seen(names, *found[names[0]]) for names in groups if names[0] in found]


def _call(policy: Policy, seen: _Seen) -> Callable[[], object]:
    layers = [policy.module.get_submodule(name) for name in seen.names]
    dtype = next((p.dtype for layer in layers for p in layer.parameters()), torch.float32)
    x = seen.x.to(dtype)
    if seen.step is None:
        return lambda: project(x, *layers)
    index, total = seen.step.index, seen.step.total

    def within() -> object:
        with denoising_step(index, total):
            return project(x, *layers)

    return within
