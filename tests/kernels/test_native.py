"""The native backend equals the oracle, on every instruction set that runs here."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from numerics.problems import random, tokens
from omega_qvla.config.recipe import ActivationScheme, Rotation, Scheme, Smoothing, WeightScheme
from omega_qvla.kernels import reference
from omega_qvla.kernels.cpu import NativeLayer
from omega_qvla.kernels.emulated import EmulatedBackend
from omega_qvla.kernels.rows import compiled
from omega_qvla.modules.step_context import Step
from omega_qvla.numerics.layer import QuantizedLayer
from omega_qvla.numerics.packing import pack_int4

from .natives import CPU, DYNAMIC, ISAS, KINDS, integers, needs_native, whole_numbers
from .test_emulated import ROTATIONS, make

pytestmark = needs_native


def same_integers(layer: QuantizedLayer, rows: int, isa: str) -> None:
    x = whole_numbers(rows, layer)
    expected = (x @ layer.integers().long().T).float()
    got = NativeLayer(layer, isa)(x.float(), None)
    assert torch.equal(got, expected), (layer.scheme, layer.in_features, layer.out_features, rows)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("group", [None, 64, 128])
def test_integer_sums_are_exact(isa: str, kind: str, bits: int, group: int | None) -> None:
    """With all scales 1 the result is the int64 product, bit for bit."""
    for width, out, rows in [(4096, 8, 5), (64, 33, 7), (256, 130, 1), (1000, 64, 17)]:
        same_integers(integers(kind, width, out, bits, group), rows, isa)


@pytest.mark.parametrize("threads", [1, 2])
def test_integer_sums_are_exact_for_any_shape(isa: str, threads: int) -> None:
    """Heights around every tile, widths around every vector, one group, K = 64, two threads."""
    generator = torch.Generator().manual_seed(threads)
    draw = lambda low, high: int(torch.randint(low, high, (1,), generator=generator))  # noqa: E731
    torch.set_num_threads(threads)
    try:
        for trial in range(60):
            rows, out = draw(1, 28), draw(1, 150)
            width = (64, 128, draw(1, 400), 16 * draw(1, 30))[trial % 4]
            kind = KINDS[draw(0, len(KINDS))]
            group = (None, 16, 48, 64, 128)[draw(0, 5)]
            act_group = (16, 32, 64, 128)[draw(0, 4)]
            layer = integers(kind, width, out, (4, 8)[draw(0, 2)], group, act_group)
            same_integers(layer, rows, isa)
        same_integers(integers("per_token_group", 1024, 512), 130, isa)  # worth two threads
    finally:
        torch.set_num_threads(1)


@pytest.mark.parametrize("rotation", ROTATIONS, ids=lambda r: f"{r.kind}{int(r.randomized)}")
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("width", [96, 112, 160])
@pytest.mark.parametrize("extras", [False, True])
def test_equals_the_oracle(
    isa: str, rotation: Rotation, kind: str, width: int, extras: bool
) -> None:
    """Bit for bit, and the emulated backend too."""
    scheme = Scheme(
        rotation=rotation,
        weight=WeightScheme(group=48 if width == 160 else None, rank=2 if extras else 0),
        activation=ActivationScheme(kind, bits=8 if width == 96 else 4, group=32, clip=0.9),  # type: ignore[arg-type]
        smoothing=Smoothing() if extras else None,
        permutation=extras,
        output_rotation=extras,
    )
    layer = make(scheme, width, 3)
    x = tokens(12, width, 3, seed=5)[1].view(2, 6, width)
    expected = reference.linear(x, layer, Step(1, 3))
    got = NativeLayer(layer, isa)(x, Step(1, 3))
    assert got.dtype == expected.dtype and torch.equal(got, expected)
    assert torch.equal(EmulatedBackend().prepare(layer, CPU)(x, Step(1, 3)), expected)


@pytest.mark.parametrize("threads", [1, 2])
def test_same_bits_for_any_scheme_and_shape(isa: str, threads: int) -> None:
    """Drawn at random: oracle, emulated and native agree in every bit."""
    generator = torch.Generator().manual_seed(40 + threads)
    draw = lambda *of: of[int(torch.randint(len(of), (1,), generator=generator))]  # noqa: E731
    torch.set_num_threads(threads)
    try:
        for trial in range(40):
            width, out = draw(64, 96, 112, 160, 192, 320, 640), draw(24, 33, 72, 130)
            scheme = Scheme(
                rotation=dataclasses.replace(draw(*ROTATIONS), block=draw(16, 32, 64)),
                weight=WeightScheme(group=draw(None, 48, 64, 128), rank=draw(0, 1, 4, 7)),
                activation=ActivationScheme(
                    kind := draw(*KINDS),
                    bits=draw(4, 8),
                    group=draw(32, 64, 128),
                    clip=draw(0.9, 1.0),
                    signed=kind in DYNAMIC and draw(False, True),
                ),
                smoothing=draw(None, Smoothing()),
                permutation=draw(False, True),
            )
            layer = make(scheme, width, 3, out)
            x = tokens(draw(1, 2, 9, 50), width, 3, seed=trial)[1]
            expected = reference.linear(x, layer, Step(1, 3))
            for got in (NativeLayer(layer, isa), EmulatedBackend().prepare(layer, CPU)):
                assert torch.equal(got(x, Step(1, 3)), expected), (scheme, width, out, len(x))
    finally:
        torch.set_num_threads(1)


def test_same_bits_when_worth_two_threads(isa: str) -> None:
    """Large enough to be dealt out, and a row alone is the row among others."""
    scheme = Scheme(
        rotation=Rotation("hadamard"),
        weight=WeightScheme(rank=4),
        activation=ActivationScheme("per_token_group", clip=0.95),
        smoothing=Smoothing(),
    )
    layer = make(scheme, 576, None, 520)
    x, native = tokens(67, 576)[0], NativeLayer(layer, isa)
    expected = reference.linear(x, layer)
    torch.set_num_threads(2)
    try:
        assert torch.equal(native(x, None), expected)
        assert torch.equal(native(x[3:4], None), expected[3:4])
    finally:
        torch.set_num_threads(1)


@pytest.mark.parametrize("kind", DYNAMIC)
def test_large_products_have_the_bits_of_plain_loops(isa: str, kind: str) -> None:
    """More rows than a block holds, more inputs than are unpacked at a time, and what `auto` takes
    for a product that is worth a matrix unit."""
    scheme = Scheme(
        rotation=Rotation("hadamard"), weight=WeightScheme(), activation=ActivationScheme(kind)
    )
    layer = make(scheme, 1088, None, 200)
    x = tokens(1000, 1088)[0]
    expected = NativeLayer(layer, "portable")(x, None)
    torch.set_num_threads(2)
    try:
        assert torch.equal(NativeLayer(layer, isa)(x, None), expected)
        assert torch.equal(NativeLayer(layer)(x, None), expected)
        assert torch.equal(NativeLayer(layer)(x[:5], None), expected[:5])
    finally:
        torch.set_num_threads(1)


@pytest.mark.parametrize(
    ("rows", "width", "out", "group"),
    [(260, 2112, 4200, 64), (40, 4160, 96, 128), (130, 1152, 300, 192), (33, 5056, 70, None)],
)
def test_parts_of_the_inputs_have_the_bits_of_the_whole(
    isa: str, rows: int, width: int, out: int, group: int | None
) -> None:
    """More inputs than meet a strip at a time, more strips than sums are kept of, groups that are
    no power of two: against the path that takes all inputs at once."""
    kind = "per_token" if group is None else "per_token_group"
    scheme = Scheme(
        rotation=Rotation("hadamard"),
        weight=WeightScheme(),
        activation=ActivationScheme(kind, group=group or 64, signed=True),  # type: ignore[arg-type]
    )
    layer = make(scheme, width, None, out)
    x = tokens(rows, width)[0]
    expected = NativeLayer(layer, ISAS[-2] if len(ISAS) > 1 else ISAS[-1])(x, None)
    torch.set_num_threads(2)
    try:
        assert torch.equal(NativeLayer(layer, isa)(x, None), expected)
    finally:
        torch.set_num_threads(1)


def test_every_pair_of_codes_is_exact(isa: str) -> None:
    """Products by pairs add codes of weights to codes of activations: all four of a pair, at the
    ends of their ranges and in between, in every piece of a line."""
    codes = torch.tensor([-8, -1, 0, 1, 7])
    pairs = torch.cartesian_prod(codes, codes)  # [25, 2]
    halves = torch.tensor([0, 1]).repeat_interleave(4).repeat(8)  # [64]: which of a pair
    weight = pairs[:, halves].to(torch.int8)
    layer = dataclasses.replace(
        integers("per_step_group", 64, 25, act_group=64), qweight=pack_int4(weight), bias=None
    )
    x = pairs[:, halves].repeat(2, 1)
    expected = (x @ weight.long().T).float()
    for rows in (*range(1, 12), 21, 50):
        assert torch.equal(NativeLayer(layer, isa)(x[:rows].float(), None), expected[:rows])


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("kind", ["per_step_tensor", "per_step_group"])
def test_the_largest_sums_do_not_wrap(isa: str, kind: str, bits: int) -> None:
    """All weights and all activations at the same end of their ranges, over as many inputs as 16
    bits can sum and more; few rows and many."""
    low, high = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
    for width in (64, 512, 544, 576, 2112):
        layer = integers(kind, width, 20, bits, act_group=64)
        q = torch.full((20, width), 7, dtype=torch.int8)
        q[10:] = -8
        layer = dataclasses.replace(layer, qweight=pack_int4(q))
        for rows in (1, 6, 13):
            x = torch.full((rows, width), low)
            x[rows // 2] = high
            expected = (x @ q.long().T).float()
            assert torch.equal(NativeLayer(layer, isa)(x.float(), None), expected)


def test_what_a_path_leaves_to_another() -> None:
    """Pairs need room in a byte and whole lines; the same name for any number of rows."""
    if "avx512-pairs" not in ISAS:
        pytest.skip("no such path on this CPU")
    taken = lambda *of: NativeLayer(integers(*of), "avx512-pairs")._linear.isa  # noqa: E731
    assert taken("per_token_group", 256, 8, 4, None, 64) == "avx512-pairs"
    assert taken("per_token", 100, 8) == "avx512-pairs"
    assert taken("per_token_group", 256, 8, 8, None, 64) == "avx512-vnni"
    assert taken("per_token_group", 256, 8, 4, None, 32) == "avx512-vnni"
    assert taken("per_token_group", 256, 8, 4, 48, 64) == "avx512-vnni"


def test_joined_layers_have_the_bits_of_the_separate_ones(isa: str) -> None:
    """Rows side by side, ranks of their own: what shares an input can be one product."""
    scheme = Scheme(
        rotation=Rotation("hadamard"),
        weight=WeightScheme(rank=3),
        activation=ActivationScheme("per_token_group"),
    )
    parts = [make(scheme, 128, None, out) for out in (96, 40, 64)]
    a = torch.block_diag(*(part.lowrank_a.float() for part in parts)).half()  # type: ignore[union-attr]
    joined = dataclasses.replace(
        parts[0],
        out_features=200,
        scheme=dataclasses.replace(scheme, weight=WeightScheme(rank=9)),
        qweight=torch.cat([part.qweight for part in parts]),
        weight_scale=torch.cat([part.weight_scale for part in parts]),
        bias=torch.cat([part.bias for part in parts if part.bias is not None]),
        lowrank_a=a,
        lowrank_b=torch.cat([part.lowrank_b for part in parts], 1),  # type: ignore[misc]
    )
    for rows in (1, 11):
        x = tokens(rows, 128)[0]
        expected = torch.cat([reference.linear(x, part) for part in parts], 1)
        assert torch.equal(NativeLayer(joined, isa)(x, None), expected)


def test_the_control_counts_products(isa: str) -> None:
    """A few billion a second at least, and no more than eight 64-byte products a nanosecond."""
    module = compiled()
    assert module is not None
    assert 1.0 < module.peak_rate(isa) < 8192.0


@pytest.mark.parametrize("width", [64, 192, 576, 1024, 1280])
@pytest.mark.parametrize("rotation", ROTATIONS, ids=lambda r: f"{r.kind}{int(r.randomized)}")
def test_prologue_rounds_as_the_oracle(isa: str, rotation: Rotation, width: int) -> None:
    """The same integers and the same scales."""
    scheme = Scheme(
        rotation=dataclasses.replace(rotation, block=64),
        activation=ActivationScheme("per_token_group", bits=8),
        smoothing=Smoothing(),
    )
    try:
        layer = make(scheme, width, None, out=4)
    except Exception as error:  # no such transform of this width
        pytest.skip(str(error))
    x = tokens(9, width, seed=3)[0]
    q, scale = reference.quantize_input(reference.rotate_input(x, layer), layer, None)
    got, got_scale = NativeLayer(layer, isa).quantize(x)
    assert torch.equal(got.float(), q) and torch.equal(got_scale, scale)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("group", [None, 64])
def test_product_is_within_rounding_of_the_oracle(isa: str, kind: str, group: int | None) -> None:
    """Given the same integers: 1e-5 of the sum of the magnitudes of all terms."""
    width, out = 640, 72
    generator = torch.Generator().manual_seed(1)
    layer = integers(kind, width, out, group=group)
    scale = torch.rand(layer.weight_scale.shape, generator=generator) * 0.1 + 0.01
    layer = dataclasses.replace(layer, weight_scale=scale.half(), bias=random(out))
    if layer.act_scale is not None:
        layer = dataclasses.replace(layer, act_scale=torch.rand(layer.act_scale.shape) + 0.5)
    x = tokens(11, width, seed=2)[0]
    native = NativeLayer(layer, isa)
    q, scale = native.quantize(x)
    columns = scale.double().repeat_interleave(64 if scale.shape[1] > 1 else width, 1)[:, :width]
    expected = (q.double() * columns) @ _dequantized(layer).T
    assert layer.bias is not None
    terms = (q.double().abs() * columns) @ _dequantized(layer).abs().T + layer.bias.abs()
    error = (native(x, None).double() - expected - layer.bias).abs()
    assert float((error / terms).max()) < 1e-5


def _dequantized(layer: QuantizedLayer) -> torch.Tensor:
    group = layer.scheme.weight.group or layer.in_features
    scale = layer.weight_scale.double().repeat_interleave(group, 1)[:, : layer.in_features]
    return layer.integers().double() * scale
