"""Layers of one input run as one product, and nobody can tell by the result."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import Tensor, nn

from numerics.problems import random, stats_of, tokens
from omega_qvla.config.recipe import ActivationScheme, Rotation, Scheme, Smoothing, WeightScheme
from omega_qvla.kernels.cpu import isa_names
from omega_qvla.modules.linear import QuantLinear, replace_linears
from omega_qvla.modules.shared import joined, project
from omega_qvla.modules.step_context import denoising_step
from omega_qvla.numerics.layer import QuantizedLayer
from omega_qvla.numerics.quantize_layer import quantize_layer

NAMES = ("q", "k", "v", "o")
native = pytest.mark.skipif(not isa_names(), reason="the native kernels are not built here")


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.q, self.k = nn.Linear(64, 48), nn.Linear(64, 17, bias=False)
        self.v, self.o = nn.Linear(64, 16), nn.Linear(64, 16)

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat(project(x, self.q, self.k, self.v), dim=-1)


def layers(kind: str = "per_token_group", rank: int = 2) -> dict[str, QuantizedLayer]:
    """q, k and v with the same smoothing; that of o is another."""
    static = kind.startswith("per_step")
    scheme = Scheme(
        Rotation("hadamard"), WeightScheme(rank=rank), ActivationScheme(kind), Smoothing()
    )  # type: ignore[arg-type]
    found = {}
    for name in NAMES:
        linear = getattr(Attention(), name)
        made = quantize_layer(
            name, "action_head", linear.weight, linear.bias, scheme,
            stats_of(tokens(50, 64, 2 if static else 1)), 2 if static else None,
        )  # fmt: skip
        smooth = torch.linspace(0.5, 3 if name == "o" else 2, 64).half()
        table = None
        if made.act_scale is not None:
            table = torch.linspace(0.05, 0.2, made.act_scale.numel()).view_as(made.act_scale)
        found[name] = dataclasses.replace(made, smooth=smooth, act_scale=table)
    return found


def test_plain_layers_come_as_they_are() -> None:
    module, x = Attention(), random(3, 64)
    assert torch.equal(module(x), torch.cat([module.q(x), module.k(x), module.v(x)], dim=-1))
    assert not joined(module.q, module.k)


@native
@pytest.mark.parametrize("kind", ["per_token_group", "per_token", "per_step_tensor"])
def test_joined_layers_have_the_bits_of_the_separate_ones(kind: str) -> None:
    one, apart = Attention(), Attention()
    replace_linears(one, layers(kind), "native", together=[NAMES])
    replace_linears(apart, layers(kind), "native")
    assert joined(one.q, one.k, one.v) and not joined(one.q, one.o) and not joined(one.o)
    assert not joined(apart.q, apart.k)
    for rows in (1, 7, 50):
        x = random(2, rows, 64)
        with denoising_step(1, 2), torch.inference_mode():
            assert torch.equal(one(x), apart(x))
            for name in NAMES:  # and each alone
                assert torch.equal(getattr(one, name)(x), getattr(apart, name)(x))


@native
def test_one_product_for_three_layers(monkeypatch: pytest.MonkeyPatch) -> None:
    module = Attention()
    replace_linears(module, layers(), "native", together=[NAMES])
    calls = []
    kernel = module.q.shared.kernel  # type: ignore[union-attr]
    monkeypatch.setattr(
        module.q.shared, "kernel", lambda x, step: calls.append(1) or kernel(x, step)
    )
    with torch.inference_mode():
        module(random(2, 64))
    assert len(calls) == 1


def test_only_what_the_pack_holds_is_joined_and_only_natively() -> None:
    some = layers()
    del some["q"]
    module = Attention()
    if isa_names():
        replace_linears(module, some, "native", together=[NAMES])
        assert joined(module.k, module.v) and not joined(module.q, module.k)
        with torch.inference_mode():
            assert module(random(2, 64)).shape == (2, 81)
    emulated = Attention()
    replace_linears(emulated, layers(), "emulated", together=[NAMES])
    assert isinstance(emulated.q, QuantLinear) and not joined(emulated.q, emulated.k)


@native
def test_a_watched_layer_runs_by_itself() -> None:
    module, apart, x = Attention(), Attention(), random(2, 64)
    replace_linears(module, layers(), "native", together=[NAMES])
    replace_linears(apart, layers(), "native")
    seen: list[Tensor] = []
    handle = module.k.register_forward_hook(lambda m, args, out: seen.append(out))
    with torch.inference_mode():
        assert torch.equal(module(x), apart(x))
        assert len(seen) == 1 and torch.equal(seen[0], apart.k(x))
        assert not joined(module.q, module.k)
        handle.remove()
        module(x)
    assert len(seen) == 1 and joined(module.q, module.k)
