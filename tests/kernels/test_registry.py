"""Which backend a pack gets: the fastest native one that covers it, and never in silence."""

from __future__ import annotations

import pytest
import torch

from numerics.problems import layer_weight, stats_of, tokens
from omega_qvla.config.recipe import ActivationScheme, Scheme, WeightScheme
from omega_qvla.errors import BackendError
from omega_qvla.kernels import registry
from omega_qvla.kernels.emulated import EmulatedBackend
from omega_qvla.kernels.registry import Capabilities, backend_names, get_backend, resolve_backend
from omega_qvla.numerics.layer import QuantizedLayer
from omega_qvla.numerics.quantize_layer import quantize_layer


class FakeNative(EmulatedBackend):
    """Says that it multiplies integers, of per-token schemes on the CPU."""

    name = "fake"

    def capabilities(self) -> Capabilities:
        kinds = frozenset({"per_token"})
        return Capabilities("fake", True, kinds, frozenset({4}), frozenset({"cpu"}), ("avx2",))


class FakeBroken(FakeNative):
    name = "broken"

    def available(self) -> tuple[bool, str]:
        return False, "needs a compiler; install g++"


@pytest.fixture
def with_fakes(monkeypatch: pytest.MonkeyPatch) -> None:
    fakes = {"broken": (__name__, "FakeBroken"), "fake": (__name__, "FakeNative")}
    others = {name: made for name, made in registry._BACKENDS.items() if name != "native"}
    monkeypatch.setattr(registry, "_BACKENDS", {**fakes, **others})


def layer(kind: str, bits: int = 4, name: str = "a.b") -> QuantizedLayer:
    scheme = Scheme(activation=ActivationScheme(kind, bits=bits))  # type: ignore[arg-type]
    stats = stats_of(tokens(4, 8))
    return quantize_layer(name, "backbone", layer_weight(3, 8), None, scheme, stats, None)


def test_known_names() -> None:
    assert set(backend_names()) >= {"emulated", "reference"}
    for name in backend_names():
        backend = get_backend(name)
        assert backend.name == name and backend.capabilities().name == name
    with pytest.raises(BackendError, match="unknown backend 'cuda9'; one of auto, native, em"):
        get_backend("cuda9")
    with pytest.raises(BackendError, match="unknown backend"):
        resolve_backend("nope")


@pytest.mark.usefixtures("with_fakes")
def test_auto_takes_the_first_native_that_covers_every_layer() -> None:
    assert resolve_backend("auto", [layer("per_token")]).name == "fake"
    assert resolve_backend("auto", [layer("per_token"), layer("none")]).name == "emulated"
    assert resolve_backend("auto", [layer("per_token", bits=8)]).name == "emulated"


@pytest.mark.usefixtures("with_fakes")
def test_a_backend_asked_for_runs_everything_or_is_refused() -> None:
    assert resolve_backend("fake", [layer("per_token")]).name == "fake"
    cases = [
        ("fake", layer("per_step_channel"), "a.b: .*per_step_channel does not run on integers"),
        ("fake", layer("per_token_group"), "a.b: .*per_token_group is not supported"),
        ("fake", layer("per_token", bits=8), "a.b: 8-bit activations are not supported"),
        ("broken", layer("per_token"), "needs a compiler"),
    ]
    for name, bad, message in cases:
        with pytest.raises(BackendError, match=message):
            resolve_backend(name, [layer("per_token", name="ok"), bad])
    with pytest.raises(BackendError, match="does not run on meta"):
        resolve_backend("fake", [layer("per_token")], torch.device("meta"))
    with pytest.raises(BackendError, match="no backend can run"):
        resolve_backend("auto", [layer("per_token")], "meta")


def test_the_group_that_does_not_fit_is_the_one_named() -> None:
    capabilities = Capabilities(
        "x", True, frozenset({"per_token_group"}), frozenset({4}), frozenset({"cpu"}),
        group_multiple=16,
    )  # fmt: skip
    scheme = Scheme(
        weight=WeightScheme(group=24), activation=ActivationScheme("per_token_group", group=16)
    )
    assert capabilities.obstacle(scheme) == "groups of 24 inputs are no multiples of 16"
