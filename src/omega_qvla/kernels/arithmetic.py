"""The numbers that the defined arithmetic of a layer is made of, the same for every backend.

`kernels.reference` says in which order they are used; docs/native.md says why.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from omega_qvla.numerics.layer import QuantizedLayer
from omega_qvla.numerics.qparams import group_count, qrange, signed_scale

# Smallest dynamic scale: tokens and groups of zeros get it, and still round to zeros.
TINY = torch.finfo(torch.float32).tiny
# Sums of a segment of products stay below this (csrc/layout.hpp reads them as floats).
_MAX_SEGMENT_SUM = 1 << 22
_SHORTEST = 16  # inputs: pieces of a cut segment are multiples of it
_SHARE = float((1 << 41) + 1)  # splits a double so that 12 bits stay


def multiplier(layer: QuantizedLayer) -> Tensor | None:
    """1 / smooth, times the signs that follow the permutation: f32 [in] in the order of the
    input, or None where there is neither."""
    result = None if layer.smooth is None else 1.0 / layer.smooth.float()
    if layer.signs is None:
        return result
    signs = layer.signs.float()
    if layer.permutation is not None:
        signs = torch.empty_like(signs).index_copy_(0, layer.permutation.long(), signs)
    return signs if result is None else result * signs


def rotation_norm(layer: QuantizedLayer) -> float:
    """What the additions of the layer's Hadamard transform leave out, a float32.

    It goes into the scales instead: (1 / 8 for blocks of 64), 1 for other rotations.
    """
    kind = layer.scheme.rotation.kind
    if kind not in ("hadamard", "full_hadamard"):
        return 1.0
    order = layer.in_features if kind == "full_hadamard" else layer.scheme.rotation.block
    return float(1.0 / torch.tensor(float(order)).sqrt())


def tail_factor(block: int, size: int) -> float:
    """A Hadamard block smaller than the others is multiplied by sqrt(block / size), a float32."""
    return float(torch.tensor(block / size).sqrt())


def clip_factor(layer: QuantizedLayer) -> float:
    """Dynamic scale over absmax before the norm: clip / qmax * norm, in float32; of signed scales
    over the largest magnitude of the other side."""
    activation = layer.scheme.activation
    _, high = qrange(activation.bits)
    return float(torch.tensor(activation.clip) / high * rotation_norm(layer))


def sign_factor(layer: QuantizedLayer) -> float | None:
    """Signed dynamic scale over absmax before the norm, where the other side does not need more:
    norm / -qmin, a float32. None where scales have no sign."""
    activation = layer.scheme.activation
    if not activation.signed:
        return None
    low, _ = qrange(activation.bits)
    return float(torch.tensor(1.0) / -low * rotation_norm(layer))


def dynamic_scale(values: Tensor, factor: float, sign_factor: float | None) -> Tensor:
    """values [..., inputs that share a scale] -> [..., 1], before `round_scale`.

    factor: `clip_factor`; sign_factor: that of the layer if its scales are signed, else None.
    """
    if sign_factor is None:
        return values.abs().amax(-1, keepdim=True).mul_(factor).clamp_min_(TINY)
    return signed_scale(values, sign_factor, factor, TINY)


def round_scale(scale: Tensor, layer: QuantizedLayer) -> Tensor:
    """Activation scales as they are used: those of groups with the 8 bits of a bfloat16.

    A scale of 8 bits times a sum of up to 2^16 is exact: a backend may add it with a fused
    instruction, which then rounds as a product and a sum do.
    """
    return scale.bfloat16().float() if activation_group(layer) else scale


def activation_group(layer: QuantizedLayer) -> int:
    """Inputs that share an activation scale; 0: all of them."""
    activation = layer.scheme.activation
    grouped = activation.kind in ("per_token_group", "per_step_group")
    return activation.group if grouped and activation.group < layer.in_features else 0


def weight_group(layer: QuantizedLayer) -> int:
    """Inputs that share a weight scale; 0: all of them."""
    group = layer.scheme.weight.group
    return group if group is not None and group < layer.in_features else 0


def segmentation(layer: QuantizedLayer) -> tuple[int, int]:
    """(inputs per segment, segments): each segment's integer sum is exact and is scaled once.

    The largest runs in which neither scale changes; halved where sums could pass 2^22.
    """
    group = math.gcd(activation_group(layer), weight_group(layer))
    if not group:
        return layer.in_features, 1
    weight_bits = max(4, layer.scheme.weight.bits)
    largest = -qrange(weight_bits)[0] * -qrange(layer.scheme.activation.bits)[0]
    while group > _MAX_SEGMENT_SUM // largest - 1 and group % (2 * _SHORTEST) == 0:
        group //= 2
    return group, group_count(layer.in_features, group)


def round_share(share: Tensor) -> Tensor:
    """float64 -> float32 of 12 bits (Veltkamp's splitting): times a 16-bit float it is exact."""
    raised = share * _SHARE
    return (raised - (raised - share)).float()


def inverse_scale(scale: Tensor, layer: QuantizedLayer) -> Tensor:
    """norm / scale, one division: what takes a rotated input before its norm to the integers."""
    return torch.full_like(scale, rotation_norm(layer)).div_(scale)
