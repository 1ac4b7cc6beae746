"""What a layer's activations look like to a 4-bit quantizer, before and after rotation."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from omega_qvla.errors import EvaluationError
from omega_qvla.evaluation.layer_drift import ONCE, hooked, step_key
from omega_qvla.evaluation.open_loop import batches
from omega_qvla.modules.step_context import Step
from omega_qvla.policies.observation import Observation

if TYPE_CHECKING:
    from omega_qvla.numerics.layer import QuantizedLayer
    from omega_qvla.policies.base import Policy


@dataclass(frozen=True)
class Range:
    """Distribution of the values of a layer's input.

    low, p01, p99, high: minimum, 1st and 99th percentile, maximum.
    """

    low: float
    p01: float
    p99: float
    high: float


@dataclass(frozen=True)
class LayerDiagnostics:
    """Inputs of one layer before and after everything the recipe does to them.

    ranges_before, ranges_after: by denoising step (`ONCE` outside the loop).
    channels_before, channels_after: float32 [in_features], max |x| per channel.
    clip_rates: by step, the share of entries that rounding cuts off at the end of its range.
    """

    name: str
    side: str
    ranges_before: Mapping[int, Range]
    ranges_after: Mapping[int, Range]
    channels_before: np.ndarray
    channels_after: np.ndarray
    clip_rates: Mapping[int, float] = field(default_factory=dict)

    @property
    def ratio_before(self) -> float:
        """Largest channel over the median channel: how much of the range outliers take."""
        return _channel_ratio(self.channels_before)

    @property
    def ratio_after(self) -> float:
        """The same after the transform."""
        return _channel_ratio(self.channels_after)


def diagnose_layers(
    policy: Policy,
    observations: Sequence[Observation],
    layers: Mapping[str, QuantizedLayer],
    *,
    seeds: Sequence[int] | None = None,
    batch: int = 4,
) -> tuple[LayerDiagnostics, ...]:
    """Watch the inputs of `layers` in the full-precision `policy`.

    The transform is the pack's own (smoothing, permutation, rotation). Keeps all inputs
    of `layers` in memory: give it the few layers to be shown and a few observations.

    Args:
        layers: qualified name -> quantized layer, as in `Pack.layers`.
        seeds: noise seeds, one per observation; default 0, 1, ...

    Raises:
        EvaluationError: a layer does not exist or never ran.
    """
    from omega_qvla.kernels.reference import transform_input

    seen: dict[str, dict[int, list[Tensor]]] = {name: {} for name in layers}

    def keep(name: str, x: Tensor, _: Tensor) -> None:
        rows = x.detach().float().reshape(-1, x.shape[-1]).cpu()
        seen[name].setdefault(step_key(), []).append(rows)

    noise_seeds = list(range(len(observations))) if seeds is None else seeds
    with hooked(policy, list(layers), keep), torch.inference_mode():
        for inputs, noise in batches(policy, observations, noise_seeds, batch):
            policy.sample(policy.encode(inputs), noise)
    result = []
    for name, layer in layers.items():
        if not seen[name]:
            raise EvaluationError(f"layer {name!r} never ran: nothing to diagnose")
        before = {step: torch.cat(rows) for step, rows in sorted(seen[name].items())}
        after = {step: transform_input(rows, layer).float() for step, rows in before.items()}
        clipped = {step: clip_rate(rows, layer, step) for step, rows in after.items()}
        result.append(_diagnose(name, layer.side, before, after, clipped))
    return tuple(result)


def clip_rate(x: Tensor, layer: QuantizedLayer, step: int = ONCE) -> float:
    """Share of the entries of transformed inputs x [n, in] that lie beyond the range of integers.

    By more than half a step, so that rounding moves them further than it moves any other; 0
    where the layer does not round its inputs.
    """
    from omega_qvla.numerics.qparams import qrange

    activation = layer.scheme.activation
    if activation.kind == "none":
        return 0.0
    steps = x / _scales(x, layer, step)
    low, high = qrange(activation.bits)
    beyond = (steps < low - 0.5) | (steps > high + 0.5)
    return float(beyond.double().mean())


def _scales(x: Tensor, layer: QuantizedLayer, step: int) -> Tensor:
    """The scale of every entry of transformed inputs x [n, in], as far as it broadcasts."""
    from omega_qvla.kernels.registry import table_row
    from omega_qvla.numerics.activation import expand_static, token_scale
    from omega_qvla.numerics.qparams import expand_groups, split_groups

    activation, width = layer.scheme.activation, layer.in_features
    if activation.static:
        assert layer.act_scale is not None  # a static scheme was built with its table
        running = None if step == ONCE else Step(step, layer.num_steps or step + 1)
        row = layer.act_scale[table_row(layer, running)]
        return expand_static(row, width, activation.kind, activation.group)
    group = activation.group if activation.kind == "per_token_group" else width
    blocks = split_groups(x, group)
    scale = token_scale(blocks, activation.bits, activation.clip, activation.signed)
    return expand_groups(scale.squeeze(-1), width, group)


def worst_layers(errors: Mapping[str, Mapping[int, float]], count: int = 1) -> list[str]:
    """Names of the layers with the largest mean error, worst first."""
    return sorted(errors, key=lambda name: -float(np.mean(list(errors[name].values()))))[:count]


def _diagnose(
    name: str,
    side: str,
    before: Mapping[int, Tensor],
    after: Mapping[int, Tensor],
    clipped: Mapping[int, float],
) -> LayerDiagnostics:
    return LayerDiagnostics(
        name=name,
        side=side,
        ranges_before={step: _range(x) for step, x in before.items()},
        ranges_after={step: _range(x) for step, x in after.items()},
        channels_before=torch.cat(list(before.values())).abs().amax(0).numpy(),
        channels_after=torch.cat(list(after.values())).abs().amax(0).numpy(),
        clip_rates=clipped,
    )


def _range(x: Tensor) -> Range:
    values = x.numpy().ravel()
    low, p01, p99, high = np.percentile(values, (0, 1, 99, 100))
    return Range(float(low), float(p01), float(p99), float(high))


def _channel_ratio(channels: np.ndarray) -> float:
    median = float(np.median(channels))
    return float(channels.max()) / median if median > 0 else float("inf")


__all__ = ["ONCE", "LayerDiagnostics", "Range", "clip_rate", "diagnose_layers", "worst_layers"]
