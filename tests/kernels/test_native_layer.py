"""A native layer as its callers meet it: inputs, steps, threads, graphs, and what is refused."""

from __future__ import annotations

import gc
import os
import signal
import threading
import weakref

import pytest
import torch

from numerics.problems import random, tokens
from omega_qvla.config.recipe import ActivationScheme, Rotation, Scheme
from omega_qvla.errors import BackendError, StepError
from omega_qvla.kernels import cpu, reference
from omega_qvla.kernels.cpu import NativeBackend, NativeLayer
from omega_qvla.kernels.registry import get_backend, resolve_backend
from omega_qvla.modules.step_context import Step

from .natives import CPU, DYNAMIC, KINDS, integers, needs_native, whole_numbers
from .test_emulated import make

pytestmark = needs_native


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
