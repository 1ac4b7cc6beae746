"""Small layers in full precision against torch; blocks made of them."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import gelu, layer_norm, linear, scaled_dot_product_attention, silu

from numerics.problems import random
from omega_qvla.errors import NumericsError
from omega_qvla.kernels import rows
from omega_qvla.kernels.block import BlockLayers, BlockShape, NativeBlock
from omega_qvla.kernels.dense import SMALL, PackedDense

pytestmark = pytest.mark.skipif(rows.compiled() is None, reason="the native kernels are not built")


@pytest.fixture(autouse=True)
def inference() -> object:
    with torch.inference_mode():
        yield


def packed(out: int, width: int, bias: bool, seed: int = 0) -> tuple[PackedDense, nn.Linear]:
    layer = nn.Linear(width, out, bias=bias)
    layer.weight = nn.Parameter(random(out, width, seed=seed), requires_grad=False)
    if bias:
        layer.bias = nn.Parameter(random(out, seed=seed + 1), requires_grad=False)
    made = PackedDense.of(layer.weight, layer.bias)
    assert made is not None
    return made, layer


@pytest.mark.parametrize("out", [1, 7, 16, 17, 33, 48, 49, 192, 200])
@pytest.mark.parametrize("width", [1, 5, 64, 768])
@pytest.mark.parametrize("count", [1, 2, 3, 7, 8, 15, 64, 65, 130])
def test_products(count: int, width: int, out: int) -> None:
    made, layer = packed(out, width, bias=out % 2 == 0)
    x = random(count, width, seed=2)
    y = made(x)
    assert y is not None
    wide = linear(x.double(), layer.weight.double())
    terms = x.double().abs() @ layer.weight.double().abs().T
    if layer.bias is not None:
        wide, terms = wide + layer.bias, terms + layer.bias.abs()
    # Measured: at most 2.5e-7 of the sum of the terms' magnitudes.
    assert float(((y - wide).abs() / terms).max()) < 1e-6


def test_bits_depend_on_neither_rows_nor_threads() -> None:
    made, _ = packed(100, 300, bias=True)
    x = random(131, 300)
    whole = made(x)
    assert whole is not None
    torch.set_num_threads(2)
    try:
        assert torch.equal(whole, made(x))  # type: ignore[arg-type]
    finally:
        torch.set_num_threads(1)
    for first, last in ((0, 1), (3, 10), (64, 131)):
        assert torch.equal(whole[first:last], made(x[first:last]))  # type: ignore[arg-type]
    assert torch.equal(whole.view(1, 131, 100), made(x[None]))  # type: ignore[arg-type]


def test_what_is_not_taken() -> None:
    weight = random(4, 8)
    assert PackedDense.of(weight.bfloat16(), None) is None
    assert PackedDense.of(weight, random(4).double()) is None
    assert PackedDense.of(torch.empty(SMALL // 8 + 1, 8), None) is None
    made = PackedDense.of(weight, None)
    assert made is not None and made(random(2, 8).bfloat16()) is None
    with torch.inference_mode(False), torch.enable_grad():
        assert made(torch.ones(2, 8)) is None
    with pytest.raises(NumericsError, match=r"8 inputs was given \[2, 7\]; pass \[\.\.\., 8\]"):
        made(random(2, 7))


HEADS, KV_HEADS, DIM, WIDTH, INNER = 4, 2, 24, 40, 56
EPS = 1e-6


def attention(q: Tensor, k: Tensor, v: Tensor, causal: bool) -> Tensor:
    """Heads [B, T, heads * dim] attended with, queries the last of them."""
    q, k, v = (t.view(*t.shape[:2], -1, DIM).transpose(1, 2) for t in (q, k, v))
    out = scaled_dot_product_attention(q, k, v, is_causal=causal, enable_gqa=True)
    return out.transpose(1, 2).flatten(2)


def rms(x: Tensor, gain: Tensor) -> Tensor:
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + EPS) * gain


def turned(x: Tensor, gain: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    first, second = rms(x.view(*x.shape[:2], -1, DIM), gain).chunk(2, -1)
    cos, sin = cos[:, None], sin[:, None]
    return torch.cat([first * cos - second * sin, second * cos + first * sin], -1).flatten(2)


def test_a_causal_block_with_normalized_heads() -> None:
    (into, a), (out, b), (up, c), (down, d) = (
        packed((HEADS + 2 * KV_HEADS) * DIM, WIDTH, False, 1),
        packed(WIDTH, HEADS * DIM, False, 2),
        packed(2 * INNER, WIDTH, False, 3),
        packed(WIDTH, INNER, False, 4),
    )
    gains = (random(DIM, seed=5), random(DIM, seed=6))
    shape = BlockShape(
        HEADS, KV_HEADS, DIM, EPS, "rms", "silu", gated=True, causal=True, plain=True
    )
    block = NativeBlock(BlockLayers(into, out, up, down), shape, gains)
    x, before, after = random(2, 11, WIDTH), random(1, WIDTH, seed=7), random(1, WIDTH, seed=8)
    angles = random(11, DIM // 2, seed=9)
    rope = (angles.cos(), angles.sin())
    found = block(x, (before, None, None), (after, None, None), rope=rope)
    assert found is not None

    q, k, v = a(rms(x, before)).split([HEADS * DIM, KV_HEADS * DIM, KV_HEADS * DIM], -1)
    attended = attention(turned(q, gains[0], *rope), turned(k, gains[1], *rope), v, causal=True)
    middle = x + b(attended)
    gate, value = c(rms(middle, after)).chunk(2, -1)
    expected = middle + d(silu(gate) * value)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5 * float(expected.abs().max()))
    # The last tokens behind keys and values of the first.
    plain = ((before, None, None), (after, None, None))
    first = x[:, :4].contiguous()
    _, k, v = a(rms(first, before)).split([HEADS * DIM, KV_HEADS * DIM, KV_HEADS * DIM], -1)
    turned_k = turned(k, gains[1], *(part[:4] for part in rope))
    cache = tuple(t.view(2, 4, KV_HEADS, DIM).transpose(1, 2) for t in (turned_k, v))
    rest = block(x[:, 4:].contiguous(), *plain, cache, tuple(part[4:] for part in rope))
    torch.testing.assert_close(
        rest, found[:, 4:], rtol=1e-5, atol=1e-5 * float(expected.abs().max())
    )
    # It takes nothing else: no rows left out, no heads without their angles.
    assert block(x, *plain, rope=rope, keep=3) is None
    assert block(x, *plain) is None


@pytest.mark.parametrize("keep", [None, 11, 4, 1])
@pytest.mark.parametrize("apart", [False, True])
def test_a_block_that_computes_the_last_tokens(apart: bool, keep: int | None) -> None:
    q, k, v = (packed(HEADS * DIM, WIDTH, True, seed)[1] for seed in (1, 3, 5))

    def joint(*layers: nn.Linear) -> PackedDense:
        weight, bias = (torch.cat([getattr(p, n) for p in layers]) for n in ("weight", "bias"))
        return PackedDense(weight, bias)

    (out, b), (up, c), (down, d) = (
        packed(WIDTH, HEADS * DIM, True, 7),
        packed(INNER, WIDTH, True, 9),
        packed(WIDTH, INNER, True, 11),
    )
    layers = BlockLayers(joint(k, v), out, up, down, joint(q))
    if not apart:
        layers = BlockLayers(joint(q, k, v), out, up, down)
    block = NativeBlock(layers, BlockShape(HEADS, HEADS, DIM, EPS, "layer", "gelu"))
    x, gain, shift = random(6, 11, WIDTH), random(3, WIDTH, seed=12), random(3, WIDTH, seed=13)
    found = block(x, (gain, shift, None), (None, None, None), keep=keep)
    assert found is not None

    last = slice(-(keep or 11), None)
    wide_gain, wide_shift = (t.repeat_interleave(2, 0)[:, None] for t in (gain, shift))
    normed = layer_norm(x, (WIDTH,), eps=EPS) * (1 + wide_gain) + wide_shift
    middle = x[:, last] + b(attention(q(normed[:, last]), k(normed), v(normed), causal=False))
    inner = gelu(c(layer_norm(middle, (WIDTH,), eps=EPS)), approximate="tanh")
    expected = middle + d(inner)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5 * float(expected.abs().max()))


def test_what_does_not_fit_a_block_is_refused_by_name() -> None:
    """It reads by address: a row too short would be read beyond its end."""

    def block(cross: bool) -> NativeBlock:
        into = packed((1 if cross else 3) * HEADS * DIM, WIDTH, False)[0]
        out, up = packed(WIDTH, HEADS * DIM, False)[0], packed(INNER, WIDTH, False)[0]
        layers = BlockLayers(into, out, up, packed(WIDTH, INNER, False)[0])
        return NativeBlock(layers, BlockShape(HEADS, HEADS, DIM, EPS, "rms", "gelu", cross=cross))

    none = (None, None, None)
    x, made, crossing = random(2, 5, WIDTH), block(False), block(True)
    keys = random(2, HEADS, 3, DIM)
    assert made(x, none, none) is not None and crossing(x, none, none, (keys, keys)) is not None
    assert crossing(x, none, none) is None  # there is nothing to attend to
    assert made(x[:0], none, none) is None and made(x[..., 1:].contiguous(), none, none) is None
    assert made(x, (torch.ones(3, 1, WIDTH), None, None), none) is None
    assert made(x, (torch.ones(1, WIDTH), None, None), (torch.ones(2, WIDTH), None, None)) is None
    for bad in (torch.ones(1, WIDTH - 1), torch.empty(0, WIDTH), torch.ones(WIDTH, 1)):
        for place in range(3):
            row = (*none[:place], bad, *none[place + 1 :])
            for pair in ((row, none), (none, row)):
                with pytest.raises(NumericsError, match=f"does not fit rows of {WIDTH} values"):
                    made(x, *pair)
    for wrong in (keys[:, :-1], keys[..., :-1], keys[0]):
        with pytest.raises(NumericsError, match=r"pass \[B, 4, L, 24\]"):
            crossing(x, none, none, (wrong, wrong))
    table = random(5, DIM // 2)
    assert made(x, none, none, rope=(table, table)) is not None
    for rope in ((table[:, :-1], table[:, :-1]), (table, table[:3]), (table[:0], table[:0])):
        with pytest.raises(NumericsError, match="pass rows of 12"):
            made(x, none, none, rope=rope)
