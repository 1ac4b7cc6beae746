"""The native backend equals the oracle, on every instruction set that runs here."""

from __future__ import annotations

import dataclasses
import gc
import os
import signal
import threading
import weakref
from types import SimpleNamespace

import pytest
import torch

from numerics.problems import random, tokens
from omega_qvla.config.recipe import ActivationScheme, Rotation, Scheme, Smoothing, WeightScheme
from omega_qvla.errors import BackendError, StepError
from omega_qvla.kernels import cpu, reference
from omega_qvla.kernels.cpu import NativeBackend, NativeLayer, isa_names
from omega_qvla.kernels.emulated import EmulatedBackend
from omega_qvla.kernels.registry import get_backend, resolve_backend
from omega_qvla.kernels.rows import compiled
from omega_qvla.modules.step_context import Step
from omega_qvla.numerics.layer import QuantizedLayer
from omega_qvla.numerics.packing import pack_int4

from .test_emulated import ROTATIONS, make

CPU = torch.device("cpu")
DYNAMIC = ("per_token", "per_token_group")
KINDS = (*DYNAMIC, "per_step_tensor", "per_step_group")
ISAS = isa_names()

pytestmark = pytest.mark.skipif(not ISAS, reason="the native kernels are not built here")


@pytest.fixture(params=ISAS or ["none"])
def isa(request: pytest.FixtureRequest) -> str:
    """Each instruction set in turn."""
    return str(request.param)


def integers(
    kind: str, width: int, out: int, bits: int = 4, group: int | None = None, act_group: int = 64
) -> QuantizedLayer:
    """A layer of random int4 weights whose scales are all 1."""
    generator = torch.Generator().manual_seed(width + out)
    q = torch.randint(-8, 8, (out, width), generator=generator, dtype=torch.int8)
    q[0] = -8
    activation = ActivationScheme(kind, bits=bits, group=act_group)  # type: ignore[arg-type]
    groups = -(-width // act_group) if kind == "per_step_group" else 1
    return QuantizedLayer(
        name="l",
        side="backbone",
        in_features=width,
        out_features=out,
        scheme=Scheme(weight=WeightScheme(group=group), activation=activation),
        num_steps=None,
        qweight=pack_int4(q),
        weight_scale=torch.ones(out, 1 if group is None else -(-width // group)).half(),
        act_scale=torch.ones(1, groups) if activation.static else None,
    )


def whole_numbers(rows: int, layer: QuantizedLayer) -> torch.Tensor:
    """Inputs that quantize to themselves: int64 [rows, in], the first row as large as can be."""
    activation = layer.scheme.activation
    qmax = 2 ** (activation.bits - 1) - 1
    generator = torch.Generator().manual_seed(rows)
    x = torch.randint(-qmax - 1, qmax + 1, (rows, layer.in_features), generator=generator)
    if not activation.static:
        x = x.clamp(-qmax, qmax)
        x[:, :: activation.group] = qmax  # the largest of every group
    x[0] = -qmax
    return x


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


def test_unaligned_and_strided_inputs(isa: str) -> None:
    layer = integers("per_token", 96, 40)
    native, x = NativeLayer(layer, isa), whole_numbers(6, layer).float()
    expected = native(x, None)
    for shift in (1, 2, 3, 5):
        room = torch.zeros(x.numel() + shift)
        room[shift:] = x.flatten()
        assert torch.equal(native(room[shift:].view(6, 96), None), expected)
    assert torch.equal(native(x.T.contiguous().T, None), expected)
    assert torch.equal(native(x.view(2, 3, 96), None), expected.view(2, 3, 40))
    assert native(x[:0], None).shape == (0, 40)
    assert torch.equal(native(x[0], None), expected[0])
    assert native(x.bfloat16(), None).dtype == torch.bfloat16


def test_static_tables_follow_the_step() -> None:
    layer = make(Scheme(activation=ActivationScheme("per_step_tensor")), 64, 3)
    native, x = NativeLayer(layer), tokens(5, 64)[0]
    for i in range(3):
        assert torch.equal(native(x, Step(i, 3)), reference.linear(x, layer, Step(i, 3)))
    with pytest.raises(StepError, match="inside denoising_step"):
        native(x, None)
    with pytest.raises(StepError, match="calibrated for 3 denoising steps, not 4"):
        native(x, Step(0, 4))


@pytest.mark.parametrize(
    "kind, bad",
    [*((kind, float("nan")) for kind in KINDS), *((kind, float("inf")) for kind in DYNAMIC)],
)
def test_what_is_not_finite_never_comes_out_finite(isa: str, kind: str, bad: float) -> None:
    """As in the oracle; its static schemes saturate infinities."""
    scheme = Scheme(rotation=Rotation("hadamard"), activation=ActivationScheme(kind))  # type: ignore[arg-type]
    native, x = NativeLayer(make(scheme, 128, None), isa), random(3, 128)
    expected = native(x, None)
    x[1, 7] = bad
    y = native(x, None)
    assert not bool(torch.isfinite(y[1]).any())
    assert torch.equal(y[[0, 2]], expected[[0, 2]])


def test_zeros_and_tiny_inputs(isa: str) -> None:
    native = NativeLayer(integers("per_token_group", 128, 20), isa)
    assert torch.equal(native(torch.zeros(3, 128), None), torch.zeros(3, 20))
    assert bool(torch.isfinite(native(torch.full((2, 128), 1e-44), None)).all())


@pytest.mark.parametrize("threads", [1, 2])
def test_calls_from_many_python_threads(threads: int) -> None:
    """More callers than cores, all sharing one set of helpers: each gets its own result."""
    torch.set_num_threads(threads)
    layers = [integers("per_token_group", 512, 256), integers("per_token", 320, 100)]
    natives = [NativeLayer(layer) for layer in layers]
    inputs = [[whole_numbers(rows, layer).float() for rows in (40, 3, 1)] for layer in layers]
    expected = [[native(x, None) for x in xs] for native, xs in zip(natives, inputs, strict=True)]
    wrong: list[int] = []

    def work(number: int) -> None:
        torch.set_num_threads(threads)
        for i in range(60):
            layer, rows = (number + i) % 2, i % 3
            if not torch.equal(natives[layer](inputs[layer][rows], None), expected[layer][rows]):
                wrong.append(number)

    try:
        workers = [threading.Thread(target=work, args=(n,)) for n in range(5)]
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join(timeout=60)
        assert not any(worker.is_alive() for worker in workers)
    finally:
        torch.set_num_threads(1)
    assert not wrong


def test_a_compiled_graph_stays_whole() -> None:
    native = NativeLayer(integers("per_token", 64, 24))
    x = whole_numbers(5, integers("per_token", 64, 24)).float()
    model = lambda x: native(x * 2.0, None) + 1.0  # noqa: E731
    with torch.inference_mode():
        expected = model(x)
    explained = torch.compile(model, backend="aot_eager", fullgraph=True)
    with torch.no_grad():
        assert torch.equal(explained(x), expected)


def test_operator_is_sound() -> None:
    native = NativeLayer(integers("per_token", 64, 24))
    torch.library.opcheck(
        torch.ops.omega_qvla.native_linear.default,
        (random(3, 64), native.number, 0, 24),
        test_utils=("test_schema", "test_faketensor"),
    )


def test_gradients_are_refused() -> None:
    native = NativeLayer(integers("per_token", 64, 24))
    x = random(2, 64).requires_grad_()
    with pytest.raises(BackendError, match="no gradient"):
        native(x, None)
    with torch.no_grad():
        native(x, None)


def test_wrong_inputs_are_refused() -> None:
    native = NativeLayer(integers("per_token", 64, 24))
    with pytest.raises(BackendError, match=r"takes \[\.\.\., 64\]"):
        native(random(2, 63), None)


def test_a_layer_is_freed_and_small() -> None:
    layer = integers("per_token", 1024, 1024)
    native = NativeLayer(layer)
    assert native.nbytes <= 1.2 * layer.nbytes
    alive = weakref.ref(native)
    del native
    gc.collect()
    assert alive() is None


def test_auto_prefers_it_and_forcing_fails_closed() -> None:
    covered = integers("per_token", 64, 24)
    assert resolve_backend("auto", [covered]).name == "native"
    odd = integers("per_token", 64, 24, group=8)
    with pytest.raises(BackendError, match="no multiples of 16"):
        resolve_backend("native", [odd])
    assert resolve_backend("auto", [covered, odd]).name == "emulated"
    with pytest.raises(BackendError, match="no multiples of 16"):
        NativeBackend().prepare(odd, CPU)
    with pytest.raises(BackendError, match="does not run on meta"):
        NativeBackend().prepare(covered, torch.device("meta"))


def test_an_instruction_set_can_be_forced() -> None:
    layer = integers("per_token", 64, 24)
    assert get_backend("native:portable").available()[0]
    assert resolve_backend("native:portable", [layer]).name == "native"
    with pytest.raises(BackendError, match=r"no sse9, only .*portable"):
        resolve_backend("native:sse9", [layer])
    with pytest.raises(BackendError, match="unknown backend 'emulated:avx2'"):
        get_backend("emulated:avx2")


def test_where_it_was_not_built(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu, "compiled", lambda: None)
    layer = integers("per_token", 64, 24)
    available, why = NativeBackend().available()
    assert not available and "apt-get install g++ python3-dev" in why
    assert resolve_backend("auto", [layer]).name == "emulated"
    for call in (
        lambda: resolve_backend("native", [layer]),
        lambda: NativeBackend().prepare(layer, CPU),
    ):
        with pytest.raises(BackendError, match="install a C\\+\\+ compiler"):
            call()


def test_a_forked_child_works_alone() -> None:
    """The helper threads stay behind in the parent; the child must not wait for them."""
    layer = integers("per_token_group", 1024, 512)
    native, x = NativeLayer(layer), whole_numbers(64, layer).float()
    torch.set_num_threads(2)
    try:
        expected = native(x, None)
        child = os.fork()
        if child == 0:
            signal.alarm(20)
            os._exit(0 if torch.equal(native(x, None), expected) else 1)
        _, status = os.waitpid(child, 0)
    finally:
        torch.set_num_threads(1)
    assert status == 0


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
