"""Scales with a sign on every instruction set that runs here."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from numerics.problems import random, tokens
from omega_qvla.config.recipe import ActivationScheme, Rotation, Scheme, Smoothing, WeightScheme
from omega_qvla.kernels import cpu, reference
from omega_qvla.kernels.cpu import NativeLayer
from omega_qvla.kernels.emulated import EmulatedBackend
from omega_qvla.kernels.registry import resolve_backend
from omega_qvla.modules.step_context import Step

from .natives import CPU, DYNAMIC, KINDS, integers, needs_native
from .test_emulated import ROTATIONS, make

pytestmark = needs_native


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("group", [None, 64])
@pytest.mark.parametrize("rank", [0, 3])
def test_weights_of_signed_scales_have_the_bits_of_the_oracle(
    isa: str, kind: str, group: int | None, rank: int
) -> None:
    scheme = Scheme(
        rotation=Rotation("hadamard", block=32),
        weight=WeightScheme(group=group, rank=rank, signed=True),
        activation=ActivationScheme(kind, group=64, clip=0.95),  # type: ignore[arg-type]
        smoothing=Smoothing(),
    )
    for width, out, rows in ((160, 40, 9), (320, 130, 50)):
        layer = make(scheme, width, 3, out)
        assert bool((layer.weight_scale < 0).any()) and bool((layer.weight_scale > 0).any())
        x = tokens(rows, width, 3, seed=rows)[1]
        expected = reference.linear(x, layer, Step(1, 3))
        assert torch.equal(NativeLayer(layer, isa)(x, Step(1, 3)), expected)


def signed_tokens(rows: int, width: int, seed: int) -> torch.Tensor:
    """Tokens with all that a sign turns on: zeros of both signs, one sign, ties, the tiny."""
    x = tokens(rows + 7, width, seed=seed)[0]
    x[0] = 0.0
    x[1] = -0.0
    x[2] = x[2].abs()
    x[3] = -x[3].abs()
    x[4] = torch.tensor([2.0, -2.0]).repeat(width)[:width]
    x[5] = x[5].clamp(-0.5, 0.5)  # many as large, of both signs
    x[6] = 1e-44 * x[6].sign()
    return x


@pytest.mark.parametrize("rotation", ROTATIONS, ids=lambda r: f"{r.kind}{int(r.randomized)}")
@pytest.mark.parametrize("kind", DYNAMIC)
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("clip", [0.9, 0.95, 1.0])
def test_signed_activations_have_the_bits_of_the_oracle(
    isa: str, rotation: Rotation, kind: str, bits: int, clip: float
) -> None:
    """Integers, scales and results; the emulated backend's results too."""
    activation = ActivationScheme(kind, bits=bits, group=32, clip=clip, signed=True)  # type: ignore[arg-type]
    for width, group, signed in ((96, None, False), (112, 48, True), (160, 64, True)):
        weight = WeightScheme(group=group, rank=2, signed=signed)
        layer = make(Scheme(rotation, weight, activation, smoothing=Smoothing()), width, None)
        native, x = NativeLayer(layer, isa), signed_tokens(9, width, seed=width)
        q, scale = reference.quantize_input(reference.rotate_input(x, layer), layer, None)
        got, got_scale = native.quantize(x)
        assert torch.equal(got.float(), q) and torch.equal(got_scale, scale)
        assert bool((scale < 0).any()) and bool((scale > 0).any()) and float(q.min()) < 0
        expected = reference.linear(x, layer)
        assert torch.equal(native(x, None), expected)
        assert torch.equal(native(x[3:4], None), expected[3:4])
        assert torch.equal(EmulatedBackend().prepare(layer, CPU)(x, None), expected)


@pytest.mark.parametrize("width", [16, 48, 80, 128, 1000])
def test_the_sign_is_that_of_the_largest_wherever_it_is(isa: str, width: int) -> None:
    """One value above the others, at every place in turn; of two as large the negative counts, and
    the other one, wherever it is, makes the scale what it is without a sign."""
    layer = make(Scheme(activation=ActivationScheme("per_token", signed=True)), width, None, out=8)
    native, others = NativeLayer(layer, isa), random(width, width, seed=5).clamp(-3, 3)
    here = torch.arange(width)
    lowest = torch.full((width,), -8, dtype=torch.int8)
    unsigned = torch.full((width, 1), float(torch.tensor(1.0) / 7 * 4))
    for sign in (1.0, -1.0):
        one = others.clone()
        one[here, here] = 4.0 * sign
        q, scale = native.quantize(one)
        assert torch.equal(scale, torch.full((width, 1), -0.5 * sign))
        assert torch.equal(q[here, here], lowest) and torch.equal(q.amin(1), lowest)
        for there in ((here + 1) % width, (here + width // 2) % width):
            two = one.clone()
            two[here, there] = -4.0 * sign
            q, scale = native.quantize(two)
            assert torch.equal(scale, unsigned)
            assert torch.equal(q[here, here if sign < 0 else there], lowest + 1)
            assert torch.equal(q[here, there if sign < 0 else here], -1 - lowest)


@pytest.mark.parametrize("kind", DYNAMIC)
def test_zeros_have_a_positive_scale(isa: str, kind: str) -> None:
    activation = ActivationScheme(kind, group=64, signed=True)  # type: ignore[arg-type]
    layer = make(Scheme(Rotation(), WeightScheme(), activation), 128, None)
    native = NativeLayer(layer, isa)
    x = torch.zeros(4, 128)
    x[1], x[2, 77] = -0.0, 3.0
    q, scale = native.quantize(x)
    tiny = float(torch.finfo(torch.float32).smallest_normal)
    assert torch.equal(scale[:2], torch.full_like(scale[:2], tiny))
    assert float(scale[2, -1]) == -0.375 and int(q[2, 77]) == -8 and int(q.abs().sum()) == 8
    assert layer.bias is not None
    assert torch.equal(native(x, None)[:2], layer.bias.expand(2, -1))


@pytest.mark.parametrize("kind", DYNAMIC)
@pytest.mark.parametrize("bad", [float("nan"), -float("nan"), float("inf"), -float("inf")])
def test_signed_or_not_what_is_not_finite_stays_so(isa: str, kind: str, bad: float) -> None:
    activation = ActivationScheme(kind, signed=True)  # type: ignore[arg-type]
    layer = make(Scheme(rotation=Rotation("hadamard"), activation=activation), 128, None)
    native, x = NativeLayer(layer, isa), random(3, 128)
    expected = native(x, None)
    x[1, 7] = bad
    y = native(x, None)
    assert not bool(torch.isfinite(y[1]).any())
    assert not bool(torch.isfinite(reference.linear(x, layer)[1]).any())
    assert torch.equal(y[[0, 2]], expected[[0, 2]])


def test_a_table_has_no_sign(monkeypatch: pytest.MonkeyPatch) -> None:
    """The compiled part refuses it too; no recipe can ask for it."""
    module = cpu.compiled()
    assert module is not None
    signed = SimpleNamespace(Linear=lambda **of: module.Linear(**{**of, "signed_scales": True}))
    monkeypatch.setattr(cpu, "compiled", lambda: signed)
    with pytest.raises(ValueError, match="scales of a table have no sign"):
        NativeLayer(integers("per_step_tensor", 64, 24))


def test_signed_schemes_are_native() -> None:
    for weight in (WeightScheme(), WeightScheme(signed=True)):
        for kind in DYNAMIC:
            activation = ActivationScheme(kind, signed=True)  # type: ignore[arg-type]
            layer = make(Scheme(Rotation(), weight, activation), 64, None)
            assert resolve_backend("auto", [layer]).name == "native"
