"""The oracle against a plain fake-quantized product written out by hand."""

from __future__ import annotations

import pytest
import torch

from numerics.problems import layer_weight, random, stats_of, tokens
from omega_qvla.config.recipe import ActivationScheme, Rotation, Scheme, Smoothing, WeightScheme
from omega_qvla.kernels import reference
from omega_qvla.modules.step_context import Step
from omega_qvla.numerics.quantize_layer import quantize_layer
from omega_qvla.numerics.rtn import dequantize


def fake_quantize(x: torch.Tensor, kind: str, group: int, table: torch.Tensor) -> torch.Tensor:
    """Rounded x on its grid, in float64, written independently of the package."""
    x = x.double()
    if kind == "none":
        return x
    if kind.startswith("per_token"):
        size = group if kind.endswith("group") else x.shape[1]
        parts = []
        for part in x.split(size, dim=1):
            scale = part.abs().amax(1, keepdim=True) * 0.95 / 7
            scale = scale.bfloat16().double() if kind.endswith("group") else scale
            parts.append((part / scale).round().clamp(-8, 7) * scale)
        return torch.cat(parts, 1)
    scale = table.double()
    if kind == "per_step_group":
        scale = scale.bfloat16().double().repeat_interleave(group)[: x.shape[1]]
    return (x / scale).round().clamp(-8, 7) * scale


def twelve_bits(x: torch.Tensor) -> torch.Tensor:
    """To the nearest float of 12 significant bits."""
    mantissa, exponent = torch.frexp(x)
    return torch.ldexp((mantissa * 4096).round(), exponent - 12)


@pytest.mark.parametrize(
    "kind",
    [
        "none",
        "per_token",
        "per_token_group",
        "per_step_tensor",
        "per_step_group",
        "per_step_channel",
    ],
)
def test_oracle_is_the_fake_quantized_product(kind: str) -> None:
    width, out = 80, 32
    scheme = Scheme(
        rotation=Rotation("svd_hadamard", block=16),
        weight=WeightScheme(group=16, rank=2),
        activation=ActivationScheme(kind, group=32, clip=0.95),  # type: ignore[arg-type]
        smoothing=Smoothing(),
        permutation=True,
        output_rotation=True,
    )
    samples, weight, bias = tokens(30, width, 2), layer_weight(out, width), random(out)
    layer = quantize_layer("l", "action_head", weight, bias, scheme, stats_of(samples), 2)
    assert layer.smooth is not None and layer.permutation is not None
    assert layer.rotation is not None and layer.output_rotation is not None
    assert layer.lowrank_a is not None and layer.lowrank_b is not None
    x = samples[1]
    # The rotation by hand in float64; the oracle rounds what float32 gives, so start from that.
    by_hand = (x.double() / layer.smooth.double())[:, layer.permutation.long()]
    by_hand = by_hand @ torch.block_diag(*layer.rotation.double())
    rotated = reference.transform_input(x, layer)
    if layer.scheme.native:
        rotated = reference.rotate_input(x, layer)
    torch.testing.assert_close(rotated.double(), by_hand, rtol=1e-5, atol=1e-4)
    table = layer.act_scale[1] if layer.act_scale is not None else torch.ones(1)
    wq = dequantize(layer.integers(), layer.weight_scale.double())
    y = fake_quantize(rotated, kind, 32, table) @ wq.T
    shares = rotated.double() @ layer.lowrank_b.double()
    shares = twelve_bits(shares) if layer.scheme.native else shares
    y = y + shares @ layer.lowrank_a.double().T
    y = y @ torch.block_diag(*layer.output_rotation.double()) + bias.double()
    got = reference.linear(x, layer, Step(1, 2))
    torch.testing.assert_close(got.double(), y, rtol=1e-5, atol=1e-4)


def test_shapes_and_dtypes() -> None:
    layer = quantize_layer("l", "backbone", layer_weight(3, 8), None, Scheme(), None, None)
    for shape in ((8,), (1, 8), (2, 5, 8), (0, 8)):
        assert reference.linear(random(*shape), layer).shape == (*shape[:-1], 3)
    assert reference.linear(random(2, 8).bfloat16(), layer).dtype == torch.bfloat16
