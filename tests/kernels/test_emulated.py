"""The emulated backend equals the oracle for every scheme; its integer sums are exact."""

from __future__ import annotations

import dataclasses
from functools import partial

import pytest
import torch

from numerics.problems import layer_weight, random, stats_of, tokens
from omega_qvla.config.recipe import ActivationScheme, Rotation, Scheme, Smoothing, WeightScheme
from omega_qvla.errors import StepError
from omega_qvla.kernels import arithmetic, emulated, reference
from omega_qvla.kernels.emulated import EmulatedBackend
from omega_qvla.kernels.prologue import build_prologue
from omega_qvla.kernels.reference import transform_input
from omega_qvla.modules.step_context import Step
from omega_qvla.numerics.layer import QuantizedLayer
from omega_qvla.numerics.quantize_layer import quantize_layer

from .natives import CPU, DYNAMIC, codes, integers, whole_numbers

ROTATIONS = (
    Rotation("none"),
    Rotation("hadamard", block=32),
    Rotation("hadamard", block=32, randomized=True),
    Rotation("svd", block=32),
    Rotation("svd_hadamard", block=32),
    Rotation("full_hadamard"),
    Rotation("full_hadamard", randomized=True, seed=2),
)
STATIC = ("per_step_tensor", "per_step_group", "per_step_channel")
KINDS = ("none", *DYNAMIC, *STATIC)


def make(scheme: Scheme, width: int, steps: int | None, out: int = 40) -> QuantizedLayer:
    weight, bias = layer_weight(out, width), random(out)
    stats = stats_of(tokens(40, width, steps or 1))
    return quantize_layer("l", "action_head", weight, bias, scheme, stats, steps)


def agree(layer: QuantizedLayer, x: torch.Tensor, step: Step | None) -> None:
    """Bit for bit where the scheme is defined so; else up to float32 rounding given the same x',
    and on the whole, but for a token or two in which the last bit of an x' tipped a rounding.
    """
    expected = reference.linear(x, layer, step)
    got = EmulatedBackend().prepare(layer, CPU)(x, step)
    assert got.shape == expected.shape and got.dtype == expected.dtype
    if layer.scheme.native:
        assert torch.equal(got, expected)
        return
    if expected.numel() == 0:
        return
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            emulated, "build_prologue", lambda layer, _: partial(transform_input, layer=layer)
        )
        same_input = EmulatedBackend().prepare(layer, CPU)(x, step)
    size = float(expected.abs().max())
    assert float((same_input - expected).abs().max()) < 3e-6 * size
    off = ((got - expected).abs() > 3e-6 * size).reshape(-1, layer.out_features).any(1)
    assert int(off.sum()) <= 2
    assert float((got - expected).abs().max()) < 0.1 * size


@pytest.mark.parametrize("rotation", ROTATIONS, ids=lambda r: f"{r.kind}{int(r.randomized)}")
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("group", [None, 48, 64])
@pytest.mark.parametrize("width", [96, 112, 160])
@pytest.mark.parametrize("extras", [False, True])
def test_equals_the_oracle(
    rotation: Rotation, kind: str, group: int | None, width: int, extras: bool
) -> None:
    """112 = 28 * 4 ends in a smaller rotation block and a short group; 64 and 48 cut unevenly."""
    scheme = Scheme(
        rotation=rotation,
        weight=WeightScheme(group=group, rank=2 if extras else 0),
        activation=ActivationScheme(kind, bits=8 if width == 96 else 4, group=32, clip=0.9),  # type: ignore[arg-type]
        smoothing=Smoothing() if extras else None,
        permutation=extras,
        output_rotation=extras,
    )
    x = tokens(12, width, 3, seed=5)[1].view(2, 6, width)
    agree(make(scheme, width, 3), x, Step(1, 3))
    if not extras:
        agree(make(scheme, width, None), x, None)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "width, act_group, group",
    [(1, 64, None), (5, 2, 3), (7, 1, 1), (100, 64, 128), (130, 64, 128), (64, 128, None)],
)
def test_odd_widths_and_groups(kind: str, width: int, act_group: int, group: int | None) -> None:
    scheme = Scheme(
        rotation=Rotation("hadamard", block=16, randomized=True),
        weight=WeightScheme(group=group),
        activation=ActivationScheme(kind, group=act_group),  # type: ignore[arg-type]
        permutation=True,
        output_rotation=True,
    )
    layer = make(scheme, width, None, out=9)
    for shape in ((1, width), (width,), (0, width), (2, 1, 3, width)):
        agree(layer, random(*shape, seed=4), None)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("kind", [*DYNAMIC, "per_step_tensor", "per_step_group"])
@pytest.mark.parametrize("group", [None, 64])
def test_native_sums_are_exact_integers(kind: str, bits: int, group: int | None) -> None:
    """With all scales 1 the result is the int64 product, bit for bit."""
    layer = integers(kind, 4096, 8, bits, group)
    x = whole_numbers(5, layer)
    expected = (x @ codes(4096, 8).long().T).float()
    assert torch.equal(reference.linear(x.float(), layer, None), expected)
    assert torch.equal(EmulatedBackend().prepare(layer, CPU)(x.float(), None), expected)


def test_sums_too_large_for_float32_go_in_float64() -> None:
    layer = make(Scheme(activation=ActivationScheme("per_token", bits=8)), 96, None)
    assert emulated._sum_dtype(layer, 16384) == torch.float32
    assert emulated._sum_dtype(layer, 16385) == torch.float64
    layer = make(Scheme(activation=ActivationScheme("per_token", bits=4)), 96, None)
    assert emulated._sum_dtype(layer, 1 << 18) == torch.float32


def test_many_groups_are_summed_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    scheme = Scheme(
        weight=WeightScheme(group=16), activation=ActivationScheme("per_token_group", group=8)
    )
    layer, x = make(scheme, 160, None), random(6, 160)
    whole = EmulatedBackend().prepare(layer, CPU)(x, None)
    monkeypatch.setattr(emulated, "_PARTIAL_SUMS", 3 * 6 * 40)
    parts = EmulatedBackend().prepare(layer, CPU)(x, None)
    torch.testing.assert_close(parts, whole, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("rotation", ROTATIONS, ids=lambda r: f"{r.kind}{int(r.randomized)}")
@pytest.mark.parametrize("width", [48, 160, 576])
def test_prologue_is_the_transform(rotation: Rotation, width: int) -> None:
    scheme = Scheme(
        rotation=rotation,
        activation=ActivationScheme("per_token"),
        smoothing=Smoothing(),
        permutation=True,
    )
    layer, x = make(scheme, width, None), random(3000, width)
    expected = layer.transform.activations(x)
    got = build_prologue(layer, CPU)(x)
    assert torch.equal(got, reference.rotate_input(x, layer))
    assert torch.equal(build_prologue(layer, CPU)(x[7:8]), got[7:8])
    got = got * arithmetic.rotation_norm(layer)
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5 * float(expected.abs().max()))


@pytest.mark.parametrize("kind", STATIC)
@pytest.mark.parametrize("run", ["reference", "emulated"])
def test_static_tables_follow_the_step(kind: str, run: str) -> None:
    layer = make(Scheme(activation=ActivationScheme(kind)), 64, 3)  # type: ignore[arg-type]
    kernel = (
        EmulatedBackend().prepare(layer, CPU)
        if run == "emulated"
        else reference.ReferenceBackend().prepare(layer, CPU)
    )
    x = tokens(5, 64)[0]
    outputs = [kernel(x, Step(i, 3)) for i in range(3)]
    assert not torch.equal(outputs[0], outputs[2])
    for i in range(3):
        assert layer.act_scale is not None
        row = dataclasses.replace(layer, num_steps=None, act_scale=layer.act_scale[i : i + 1])
        torch.testing.assert_close(outputs[i], reference.linear(x, row, None))
    with pytest.raises(StepError, match=r"layer l .*inside denoising_step"):
        kernel(x, None)
    with pytest.raises(StepError, match="calibrated for 3 denoising steps, not 4"):
        kernel(x, Step(0, 4))


@pytest.mark.parametrize("kind", ["none", *DYNAMIC])
def test_dynamic_schemes_do_not_care_about_steps(kind: str) -> None:
    layer = make(Scheme(activation=ActivationScheme(kind)), 64, 3)  # type: ignore[arg-type]
    kernel, x = EmulatedBackend().prepare(layer, CPU), random(5, 64)
    assert torch.equal(kernel(x, None), kernel(x, Step(6, 9)))


@pytest.mark.parametrize("kind", KINDS)
def test_nan_comes_out_and_dtypes_stay(kind: str) -> None:
    layer = make(Scheme(activation=ActivationScheme(kind)), 64, None)  # type: ignore[arg-type]
    kernel = EmulatedBackend().prepare(layer, CPU)
    x = random(3, 64)
    y16 = kernel(x.bfloat16(), None)
    assert y16.dtype == torch.bfloat16
    torch.testing.assert_close(
        y16.float(), kernel(x.bfloat16().float(), None), rtol=1e-2, atol=1e-2
    )
    x[1, 7] = float("nan")
    y = kernel(x, None)
    assert bool(y[1].isnan().all()) and bool(torch.isfinite(y[[0, 2]]).all())


@pytest.mark.parametrize("kind", KINDS)
def test_the_input_is_left_alone_and_calls_do_not_interfere(kind: str) -> None:
    scheme = Scheme(
        rotation=Rotation("hadamard", block=32),
        activation=ActivationScheme(kind, group=32),  # type: ignore[arg-type]
    )
    kernel = EmulatedBackend().prepare(make(scheme, 64, None), CPU)
    x = random(4, 64)
    before = x.clone()
    with torch.inference_mode():
        first = kernel(x, None)
        kernel(random(9, 64, seed=1), None)
        again = kernel(x, None)
    assert torch.equal(x, before) and torch.equal(first, again)


@pytest.mark.parametrize("rotation", ROTATIONS, ids=lambda r: f"{r.kind}{int(r.randomized)}")
@pytest.mark.parametrize("kind", DYNAMIC)
@pytest.mark.parametrize("group", [None, 48])
@pytest.mark.parametrize("width", [96, 112])
def test_signed_scales_equal_the_oracle(
    rotation: Rotation, kind: str, group: int | None, width: int
) -> None:
    """Tokens of zeros, and of two values as large with either sign, among them."""
    scheme = Scheme(
        rotation=rotation,
        weight=WeightScheme(group=group, rank=2, signed=True),
        activation=ActivationScheme(kind, group=32, clip=0.95, signed=True),  # type: ignore[arg-type]
    )
    layer = make(scheme, width, None)
    x = tokens(12, width, seed=5)[0]
    x[0], x[1] = 0.0, torch.tensor([2.0, -2.0]).repeat(width // 2)
    agree(layer, x, None)


def test_signed_inputs_use_every_integer_and_zeros_stay_zeros() -> None:
    activation = ActivationScheme("per_token_group", group=16, signed=True)
    layer = make(Scheme(activation=activation), 64, None)
    u = random(300, 64, seed=8)
    u[0] = 0.0
    q, scale = reference.quantize_input(u, layer, None)
    assert set(q.unique().tolist()) == set(range(-8, 8))
    blocks = u.view(300, 4, 16)
    largest = blocks.gather(-1, blocks.abs().argmax(-1, keepdim=True)).squeeze(-1)
    assert torch.equal(scale > 0, largest <= 0)
    assert torch.equal(scale, scale.bfloat16().float())
    assert not q[0].any() and bool((scale[0] > 0).all())
    unsigned = make(Scheme(activation=dataclasses.replace(activation, signed=False)), 64, None)
    q7, scale7 = reference.quantize_input(u, unsigned, None)
    errors = [
        float((blocks - integers.view(300, 4, 16) * steps.unsqueeze(-1)).square().sum())
        for integers, steps in ((q, scale), (q7, scale7))
    ]
    assert errors[0] < 0.86 * errors[1]
