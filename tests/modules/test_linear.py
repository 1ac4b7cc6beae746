"""Swapping linear layers: all of them or none, and the step arrives by context."""

from __future__ import annotations

import threading

import pytest
import torch
from torch import nn

from numerics.problems import random, stats_of, tokens
from omega_qvla.config.recipe import ActivationScheme, Scheme
from omega_qvla.errors import BackendError, PackError, StepError
from omega_qvla.kernels import reference
from omega_qvla.kernels.emulated import EmulatedBackend
from omega_qvla.kernels.registry import resolve_backend
from omega_qvla.modules.linear import QuantLinear, replace_linears
from omega_qvla.modules.step_context import Step, denoising_step
from omega_qvla.numerics.layer import QuantizedLayer
from omega_qvla.numerics.quantize_layer import quantize_layer


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(16, 32)
        self.mlp = nn.ModuleList([nn.Linear(32, 32, bias=False), nn.LayerNorm(32)])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.mlp[1](self.mlp[0](torch.relu(self.up(x))))


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(Block(), nn.Linear(32, 16), Block()).eval()


def quantize(module: nn.Module, name: str, kind: str, steps: int | None) -> QuantizedLayer:
    linear = module.get_submodule(name)
    assert isinstance(linear, nn.Linear)
    scheme = Scheme(activation=ActivationScheme(kind))  # type: ignore[arg-type]
    stats = stats_of(tokens(20, linear.in_features, steps or 1))
    return quantize_layer(name, "action_head", linear.weight, linear.bias, scheme, stats, steps)


def test_named_layers_are_replaced_and_the_rest_stays() -> None:
    module = network()
    names = ("0.up", "0.mlp.0", "1")
    layers = {name: quantize(module, name, "per_token", None) for name in names}
    other = module.get_submodule("2.up")
    x = random(3, 16)
    backend = replace_linears(module, layers)
    assert backend.name == resolve_backend("auto", layers.values()).name
    assert module.get_submodule("2.up") is other
    hidden = torch.relu(reference.linear(x, layers["0.up"]))
    hidden = reference.linear(hidden, layers["0.mlp.0"])
    hidden = reference.linear(module.get_submodule("0.mlp.1")(hidden), layers["1"])
    with torch.no_grad():
        got = module(x)
    torch.testing.assert_close(got, module[2](hidden), rtol=1e-4, atol=1e-4)  # type: ignore[index]
    assert not list(module.get_submodule("0.up").parameters())
    assert f"w4a4 per_token, {backend.name}" in repr(module)


@pytest.mark.parametrize(
    "name, message",
    [
        ("0.down", "no layer 0.down"),
        ("0.mlp.1", "LayerNorm, not a plain nn.Linear"),
        ("2.up.weight", "no layer"),
        ("2.mlp.0", "32 -> 32 in the policy and 16 -> 32 in the pack"),
    ],
)
def test_nothing_is_swapped_when_one_name_is_wrong(name: str, message: str) -> None:
    module = network()
    good = quantize(module, "0.up", "per_token", None)
    with pytest.raises(PackError, match=message):
        replace_linears(module, {"0.up": good, name: good})
    assert not any(isinstance(m, QuantLinear) for m in module.modules())


def test_a_quantized_policy_is_not_quantized_again() -> None:
    module = network()
    layers = {"0.up": quantize(module, "0.up", "per_token", None)}
    replace_linears(module, layers)
    with pytest.raises(PackError, match="is a QuantLinear"):
        replace_linears(module, layers)


def test_backends_by_name() -> None:
    module = network()
    layers = {"0.up": quantize(module, "0.up", "per_token", None)}
    with pytest.raises(BackendError, match="unknown backend"):
        replace_linears(module, layers, "nope")
    assert replace_linears(module, layers, "reference").name == "reference"
    assert replace_linears(network(), layers, EmulatedBackend()).name == "emulated"
    assert replace_linears(network(), {}).name == resolve_backend().name


def test_steps_arrive_by_context() -> None:
    module = network()
    layer = quantize(module, "0.up", "per_step_tensor", 3)
    linear = QuantLinear(layer, EmulatedBackend())
    x = random(4, 16)
    for index in range(3):
        with denoising_step(index, 3):
            expected = reference.linear(x, layer, Step(index, 3))
            torch.testing.assert_close(linear(x), expected)
    with pytest.raises(StepError, match=r"layer 0.up .*inside denoising_step"):
        linear(x)
    with denoising_step(0, 8), pytest.raises(StepError, match="not 8; sample with 3 steps"):
        linear(x)


def test_threads_run_their_own_steps() -> None:
    layer = quantize(network(), "0.up", "per_step_tensor", 2)
    linear = QuantLinear(layer, EmulatedBackend())
    x = random(4, 16)
    barrier, outputs = threading.Barrier(2), {}

    def run(index: int) -> None:
        with denoising_step(index, 2):
            barrier.wait()
            outputs[index] = linear(x)
            barrier.wait()

    threads = [threading.Thread(target=run, args=(i,)) for i in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for index in range(2):
        expected = reference.linear(x, layer, Step(index, 2))
        torch.testing.assert_close(outputs[index], expected)
