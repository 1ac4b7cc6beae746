"""The oracle: what a quantized layer means, as plainly as possible. Every backend must agree.

Schemes that run on integers are defined to the bit, for finite inputs. Each operation is one in
float32, rounded, in this order (docs/native.md has the reasons):

1.  u = x * m, m = 1 / smooth times the signs; then the permutation.
2.  Hadamard blocks: butterflies (a, b) -> (a + b, a - b) at distance 1, 2, 4, ... inside each
    block, nothing else; a block smaller than the others is multiplied by sqrt(block / size). Full
    width: butterflies inside each run of 2^k, then for each output the sum, from the first run to
    the last, of the runs with the signs of the base matrix. Dense blocks: sums in float64, rounded
    once. What is left out, norm = 1 / sqrt(order), goes into the scales.
3.  scale = max(absmax(u) * (clip / qmax * norm), smallest normal float), or from the static
    table; scales of groups are rounded to bfloat16. q = u * (norm / scale), to the nearest
    integer, halves to even, cut to qmin .. qmax.
    Signed scales: with e the value of largest magnitude (the negative one of two) and m the
    largest magnitude of the other sign (0 if there is none), scale = max(|e| * (norm / -qmin),
    m * (clip / qmax * norm), smallest normal float), negative where e > 0, so that e falls on
    qmin, or nearer to 0 where m needs the room; then as above, the sign being kept by every
    step. Weight scales of either sign need nothing: products and sums round alike on both sides
    of zero.
4.  Integer sums of each segment (`arithmetic.segmentation`): exact, converted to float32. Each is
    multiplied by the group's activation scale, where groups have one, then by the group's weight
    scale, likewise, and added to the segments before it.
5.  times the scale of the token or step; times the weight scale of the row (where there is one);
    plus the low-rank terms, first to last, share_i * a_i with share = u b * norm summed in
    float64 and rounded to 12 bits; the output rotation; plus the bias.

The sums in float64 could in principle come out differently in another order; a difference would
have to survive the rounding that follows, which in practice never happens.

`per_step_channel` and weight-only schemes are defined by value: float64 after the rounding.
"""

from __future__ import annotations

import torch
from torch import Tensor

from omega_qvla.kernels import arithmetic
from omega_qvla.kernels.registry import Capabilities, Kernel, StepLike, table_row
from omega_qvla.numerics.activation import expand_static
from omega_qvla.numerics.duquant import apply_shared
from omega_qvla.numerics.hadamard import base_matrix, block_sizes, split_width
from omega_qvla.numerics.layer import QuantizedLayer
from omega_qvla.numerics.qparams import expand_groups, qrange
from omega_qvla.numerics.rotation import apply_blocks, undo_output_rotation

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
WEIGHT_BITS = frozenset({2, 3, 4, 8, 16})


def transform_input(x: Tensor, layer: QuantizedLayer) -> Tensor:
    """x [..., in] -> smoothed, permuted, rotated x' [..., in], float32, as the build has it."""
    return layer.transform.activations(x.float())


def rotate_input(x: Tensor, layer: QuantizedLayer) -> Tensor:
    """x [..., in] float32 -> u [..., in]; times `rotation_norm` it is x' but for last bits."""
    factor = arithmetic.multiplier(layer)
    if factor is not None:
        x = x * factor
    if layer.first_rotation is not None:
        x = apply_shared(x.double(), layer.first_rotation).float()
    if layer.permutation is not None:
        x = x[..., layer.permutation.long()]
    kind = layer.scheme.rotation.kind
    if kind == "none":
        return x
    if kind == "full_hadamard":
        return _full_hadamard(x)
    if kind == "hadamard":
        return _hadamard_blocks(x, layer.scheme.rotation.block)
    assert layer.rotation is not None
    if kind == "duquant":
        return apply_shared(x.double(), layer.rotation).float()
    return apply_blocks(x.double(), layer.rotation.double()).float()


def _hadamard_blocks(x: Tensor, block: int) -> Tensor:
    parts = []
    for part in torch.split(x, list(block_sizes(x.shape[-1], block)), dim=-1):
        size = part.shape[-1]
        part = butterflies(part)
        parts.append(part if size == block else part * arithmetic.tail_factor(block, size))
    return torch.cat(parts, dim=-1)


def butterflies(x: Tensor) -> Tensor:
    """Unnormalized Walsh-Hadamard transform of the last dimension, a power of two."""
    shape, distance = x.shape, 1
    while distance < shape[-1]:
        pairs = x.reshape(*shape[:-1], shape[-1] // (2 * distance), 2, distance)
        a, b = pairs[..., 0, :], pairs[..., 1, :]
        x = torch.stack((a + b, a - b), dim=-2).reshape(shape)
        distance *= 2
    return x


def _full_hadamard(x: Tensor) -> Tensor:
    factors = split_width(x.shape[-1])
    assert factors is not None  # the layer was built with this width
    base, power = factors
    runs = butterflies(x.reshape(*x.shape[:-1], base, power))
    signs = base_matrix(base).to(x)
    total = torch.zeros_like(runs)
    for i in range(base):
        total = total + runs[..., i : i + 1, :] * signs[i, :, None]
    return total.reshape(x.shape)


def quantize_input(
    u: Tensor, layer: QuantizedLayer, step: StepLike | None
) -> tuple[Tensor, Tensor]:
    """`rotate_input`'s u [n, in] -> (q [n, in] integer-valued, scale [n, groups]).

    groups: 1, or as many as the inputs have groups with a scale of their own. Native schemes.
    """
    act, width = layer.scheme.activation, layer.in_features
    group = arithmetic.activation_group(layer) or width
    low, high = qrange(act.bits)
    if act.static:
        assert layer.act_scale is not None
        scale = layer.act_scale[table_row(layer, step)].expand(u.shape[0], -1)
    else:
        parts = torch.split(u, group, dim=1)
        factor, largest = arithmetic.clip_factor(layer), arithmetic.sign_factor(layer)
        scale = torch.cat([arithmetic.dynamic_scale(p, factor, largest) for p in parts], dim=1)
    scale = arithmetic.round_scale(scale, layer)
    inverse = arithmetic.inverse_scale(scale, layer)
    inverse = expand_groups(inverse, width, group)
    return (u * inverse).round().clamp(low, high), scale


def product(q: Tensor, scale: Tensor, layer: QuantizedLayer) -> Tensor:
    """q [n, in], scale [n, groups] as `quantize_input` gives them -> scaled sums f32 [n, out]."""
    width = layer.in_features
    act_group, weight_group = arithmetic.activation_group(layer), arithmetic.weight_group(layer)
    size, _ = arithmetic.segmentation(layer)
    weight, weight_scale = layer.integers().double(), layer.weight_scale.float()
    total = torch.zeros(q.shape[0], layer.out_features, device=q.device)
    for start in range(0, width, size):
        part = slice(start, start + size)
        sums = (q[:, part].double() @ weight[:, part].T).float()
        if act_group:
            sums = sums * scale[:, start // act_group, None]
        if weight_group:
            sums = sums * weight_scale[:, start // weight_group]
        total = total + sums
    if not act_group:
        total = total * scale
    return total if weight_group else total * weight_scale[:, 0]


def add_low_rank(y: Tensor, u: Tensor, layer: QuantizedLayer) -> Tensor:
    """y [n, out] plus (x' b) aᵀ."""
    assert layer.lowrank_a is not None and layer.lowrank_b is not None
    b = layer.lowrank_b.float() * arithmetic.rotation_norm(layer)
    shares = arithmetic.round_share(u.double() @ b.double())
    for share, a in zip(shares.T, layer.lowrank_a.float().T, strict=True):
        y = y + share[:, None] * a
    return y


def linear(x: Tensor, layer: QuantizedLayer, step: StepLike | None = None) -> Tensor:
    """The quantized layer: x [..., in] -> y [..., out] in the dtype of x.

    Raises:
        StepError: it has scales per denoising step and runs outside them, or in others.
    """
    rows = x.reshape(-1, x.shape[-1]).float()
    y = (_linear if layer.scheme.native else _linear_by_value)(rows, layer, step)
    return y.to(x.dtype).reshape(*x.shape[:-1], layer.out_features)


def _linear(x: Tensor, layer: QuantizedLayer, step: StepLike | None) -> Tensor:
    u = rotate_input(x, layer)
    y = product(*quantize_input(u, layer, step), layer)
    if layer.lowrank_a is not None:
        y = add_low_rank(y, u, layer)
    if layer.output_rotation is not None:
        y = undo_output_rotation(y, layer.output_rotation.float())
    return y if layer.bias is None else y + layer.bias


def _linear_by_value(x: Tensor, layer: QuantizedLayer, step: StepLike | None) -> Tensor:
    """Schemes whose scales do not leave the sum: x' (rounded per channel or not) in float64."""
    rotated = transform_input(x, layer)
    if layer.scheme.activation.kind == "none":
        q = rotated.double()
    else:
        assert layer.act_scale is not None
        act = layer.scheme.activation
        row = layer.act_scale[table_row(layer, step)]
        scale = expand_static(row, layer.in_features, act.kind, act.group)
        q = (rotated / scale).round().clamp(*qrange(act.bits)).double() * scale.double()
    group = layer.scheme.weight.group
    scales = expand_groups(layer.weight_scale.double(), layer.in_features, group)
    y = q @ (layer.integers().double() * scales).T
    if layer.lowrank_a is not None and layer.lowrank_b is not None:
        y += rotated.double() @ layer.lowrank_b.double() @ layer.lowrank_a.double().T
    if layer.output_rotation is not None:
        y = undo_output_rotation(y, layer.output_rotation.double())
    return y if layer.bias is None else y + layer.bias.double()


def every_scheme(name: str) -> Capabilities:
    """Of a backend in plain torch: every scheme, 4, 6 and 8 bits, CPU and CUDA; not native."""
    return Capabilities(
        name,
        False,
        ACTIVATION_KINDS,
        frozenset({4, 6, 8}),
        frozenset({"cpu", "cuda"}),
        weight_bits=WEIGHT_BITS,
        two_rotations=True,
        signed_activations=True,
    )


class ReferenceBackend:
    """The oracle as a backend: slow, for checks."""

    name = "reference"

    def capabilities(self) -> Capabilities:
        return every_scheme(self.name)

    def available(self) -> tuple[bool, str]:
        return True, "plain torch"

    def prepare(self, layer: QuantizedLayer, device: torch.device) -> Kernel:
        layer = layer.to(device)
        return lambda x, step: linear(x, layer, step)
