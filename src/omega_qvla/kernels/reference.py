"""The oracle: what a quantized layer means, as plainly as possible. Every backend must agree.

Integer sums are exact: products of integers, summed in float64, one (token group, weight
group) rectangle at a time; each rectangle's sum is then multiplied by its two scales.
"""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor

from omega_qvla.kernels.registry import Capabilities, Kernel, StepLike, table_row
from omega_qvla.numerics.activation import (
    expand_static,
    quantize_per_token,
    quantize_per_token_group,
    quantize_static,
)
from omega_qvla.numerics.layer import QuantizedLayer
from omega_qvla.numerics.qparams import expand_groups
from omega_qvla.numerics.rotation import undo_output_rotation

ACTIVATION_KINDS = frozenset(
    {
        "none",
        "per_token",
        "per_token_group",
        "per_step_tensor",
        "per_step_group",
        "per_step_channel",
    }
)


def transform_input(x: Tensor, layer: QuantizedLayer) -> Tensor:
    """x [..., in] -> smoothed, permuted, rotated x' [..., in], float32."""
    return layer.transform.activations(x.float())


def quantize_input(
    x: Tensor, layer: QuantizedLayer, step: StepLike | None
) -> tuple[Tensor, Tensor]:
    """Transformed x' [n, in] -> (q [n, in] integer-valued, scale [n, in] of each entry)."""
    act, width = layer.scheme.activation, layer.in_features
    if act.kind == "per_token":
        q, scale = quantize_per_token(x, act.bits, act.clip)
    elif act.kind == "per_token_group":
        q, scale = quantize_per_token_group(x, act.bits, act.group, act.clip)
        scale = expand_groups(scale, width, act.group)
    elif act.kind == "none":
        q, scale = x, x.new_ones(1)
    else:
        assert layer.act_scale is not None
        row = layer.act_scale[table_row(layer, step)]
        scale = expand_static(row, width, act.kind, act.group)
        q = quantize_static(x, scale, act.bits)
    return q, scale.expand(x.shape[0], width)


def group_boundaries(layer: QuantizedLayer) -> list[int]:
    """Columns at which the scale of the weight or of the activation may change, 0 .. in."""
    width, act, weight = layer.in_features, layer.scheme.activation, layer.scheme.weight
    cuts = {0, width}
    if weight.group is not None:
        cuts.update(range(0, width, weight.group))
    if act.kind in ("per_token_group", "per_step_group"):
        cuts.update(range(0, width, act.group))
    elif act.kind == "per_step_channel":
        cuts.update(range(width))
    return sorted(cuts)


def product(q: Tensor, x_scale: Tensor, layer: QuantizedLayer) -> Tensor:
    """sum_k q[n, k] x_scale[n, k] qw[o, k] w_scale[o, k] as scaled integer sums, float64."""
    weight = layer.integers().double()
    w_scale = expand_groups(
        layer.weight_scale.double(), layer.in_features, layer.scheme.weight.group
    )
    if layer.scheme.activation.kind == "none":
        return q.double() @ (weight * w_scale).T
    cuts = group_boundaries(layer)
    total = torch.zeros(q.shape[0], layer.out_features, dtype=torch.float64, device=q.device)
    for start, end in pairwise(cuts):
        sums = q[:, start:end].double() @ weight[:, start:end].T
        total += sums * x_scale[:, start, None].double() * w_scale[None, :, start]
    return total


def linear(x: Tensor, layer: QuantizedLayer, step: StepLike | None = None) -> Tensor:
    """The quantized layer: x [..., in] -> y [..., out] in the dtype of x.

    Raises:
        StepError: it has scales per denoising step and runs outside them, or in others.
    """
    rows = x.reshape(-1, x.shape[-1])
    rotated = transform_input(rows, layer)
    q, scale = quantize_input(rotated, layer, step)
    y = product(q, scale, layer)
    if layer.lowrank_a is not None and layer.lowrank_b is not None:
        y += rotated.double() @ layer.lowrank_b.double() @ layer.lowrank_a.double().T
    if layer.output_rotation is not None:
        y = undo_output_rotation(y, layer.output_rotation.double())
    if layer.bias is not None:
        y += layer.bias.double()
    return y.to(x.dtype).reshape(*x.shape[:-1], layer.out_features)


class ReferenceBackend:
    """The oracle as a backend: slow, for checks."""

    name = "reference"

    def capabilities(self) -> Capabilities:
        devices = frozenset({"cpu", "cuda"})
        return Capabilities(self.name, False, ACTIVATION_KINDS, frozenset({4, 6, 8}), devices)

    def available(self) -> tuple[bool, str]:
        return True, "plain torch"

    def prepare(self, layer: QuantizedLayer, device: torch.device) -> Kernel:
        layer = layer.to(device)
        return lambda x, step: linear(x, layer, step)
