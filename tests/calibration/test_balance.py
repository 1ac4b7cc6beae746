"""Attention temperature matching and output balancing: what was off by a factor is put right."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch
from torch import Tensor

from calibration.helpers import tiny_samples
from omega_qvla.calibration.balance import NEUTRAL, _measure, balanced, bounded_gain
from omega_qvla.config import Scheme, WeightScheme, preset
from omega_qvla.errors import CalibrationError, RecipeError
from omega_qvla.kernels.reference import linear
from omega_qvla.numerics.layer import QuantizedLayer
from omega_qvla.numerics.quantize_layer import quantize_layer
from omega_qvla.pack import read_pack
from omega_qvla.policies.base import Policy
from omega_qvla.policies.groot_n15 import blocks
from omega_qvla.quantize import quantize_policy
from policies.tiny import TINY

QUERIES = {
    "pi05": "paligemma_with_expert.gemma_expert.model.layers.1.self_attn.q_proj",
    "groot_n15": "action_head.model.transformer_blocks.1.attn1.to_q",
}
OUTPUT = {"pi05": "o_proj", "groot_n15": "to_out.0"}


def layer_of(
    policy: Policy, name: str, balance: str, factor: Tensor | float = 1.0
) -> QuantizedLayer:
    """The layer `name`, kept in 16 bits, its rows off by `factor`."""
    source = policy.module.get_submodule(name)
    bias = None if source.bias is None else source.bias * factor
    scheme = Scheme(weight=WeightScheme(bits=16), balance=balance)  # type: ignore[arg-type]
    rows = factor[:, None] if isinstance(factor, Tensor) else factor
    weight = source.weight * rows
    return quantize_layer(name, "action_head", weight, bias, scheme, None, policy.num_steps)


def test_gains_are_bounded_and_leave_small_differences_alone() -> None:
    exact = torch.tensor([1.0, 1.04, 1.1, 9.0, 0.1])
    gains = bounded_gain(exact, torch.ones(5))
    torch.testing.assert_close(gains, torch.tensor([1.0, 1.0, 1.1, 1.25, 0.8]))
    assert NEUTRAL == 0.05


@pytest.mark.parametrize("family", TINY)
def test_a_wrong_temperature_is_matched_head_by_head(family: str) -> None:
    policy, name = TINY[family](), QUERIES[family]
    head_dim = 64
    factor = torch.tensor([0.85, 1.15]).repeat_interleave(head_dim)  # of two heads
    layer = layer_of(policy, name, "temperature", factor)
    result = balanced(policy, tiny_samples(), {name: layer}, seed=0)[name]
    gains = result.weight_scale[:, 0].float()
    torch.testing.assert_close(gains, 1 / factor, rtol=2e-3, atol=0)
    x = torch.randn(3, layer.in_features)
    torch.testing.assert_close(
        linear(x, result), policy.module.get_submodule(name)(x), rtol=2e-2, atol=2e-3
    )


@pytest.mark.parametrize("family", TINY)
def test_a_wrong_output_energy_is_balanced(family: str) -> None:
    policy = TINY[family]()
    name = QUERIES[family].rsplit(".", 1)[0] + "." + OUTPUT[family]
    layer = layer_of(policy, name, "output", 0.88)
    result = balanced(policy, tiny_samples(), {name: layer}, seed=0)[name]
    torch.testing.assert_close(
        result.weight_scale[:, 0].float(),
        torch.full((layer.out_features,), 1 / 0.88),
        rtol=3e-3,
        atol=0,
    )
    again = balanced(policy, tiny_samples(), {name: layer_of(policy, name, "output")}, seed=0)
    assert bool((again[name].weight_scale == 1).all())


def test_logits_are_those_of_the_attention(monkeypatch: pytest.MonkeyPatch) -> None:
    """Against what GR00T's own attention multiplies, head by head and call by call."""
    policy, name = TINY["groot_n15"](), QUERIES["groot_n15"]
    attention = policy.module.get_submodule(name.rpartition(".")[0])
    seen: list[Tensor] = []
    running: list[bool] = []
    original = blocks.attend_heads

    def attend(q: Tensor, k: Tensor, v: Tensor, *rest: Tensor | None, **how: bool) -> Tensor:
        if running:
            running.clear()
            seen.append((q @ k.mT * q.shape[-1] ** -0.5).flatten(2).std(2, correction=0)[0])
        return original(q, k, v, *rest, **how)

    monkeypatch.setattr(blocks, "attend_heads", attend)
    attention.to_q.register_forward_hook(lambda *_: running.append(True))
    measured = _measure(policy, tiny_samples(2), {name: layer_of(policy, name, "temperature")}, 0)
    assert len(seen) == 2 * policy.num_steps
    torch.testing.assert_close(
        measured[name], torch.stack(seen).double().mean(0), rtol=1e-4, atol=0
    )


@pytest.mark.parametrize("family", TINY)
def test_the_preset_keeps_the_heads_attention_and_leaves_the_policy_alone(
    family: str, tmp_path: Path
) -> None:
    policy = TINY[family]()
    before = dict(policy.module.named_modules())
    pack = read_pack(
        quantize_policy(policy, preset("quantvla-w4a4"), tiny_samples(), out=tmp_path / "p")
    )
    assert dict(policy.module.named_modules()) == before
    kept = {name: layer for name, layer in pack.layers.items() if layer.scheme.weight.bits == 16}
    assert QUERIES[family] in kept and len(kept) % 4 == 0
    assert all(layer.side == "action_head" for layer in kept.values())
    for name, layer in kept.items():
        source = policy.module.get_submodule(name).weight
        assert torch.equal(layer.integers(), source.half())
        gains = layer.weight_scale.float()
        assert bool(((gains >= 0.8) & (gains <= 1.25)).all())
    rest = [layer for layer in pack.layers.values() if layer.scheme.weight.bits == 4]
    assert rest and all(layer.scheme.activation.static for layer in rest)


def test_what_is_missing_is_named() -> None:
    policy, name = TINY["pi05"](), QUERIES["pi05"]
    layer = layer_of(policy, name, "temperature")
    with pytest.raises(CalibrationError, match="give samples"):
        balanced(policy, None, {name: layer}, 0)
    values = name.replace("q_proj", "v_proj")
    with pytest.raises(CalibrationError, match=r"v_proj has no temperature: it is none of q_proj"):
        balanced(policy, tiny_samples(), {values: layer_of(policy, values, "temperature")}, 0)
    assert balanced(policy, None, {}, 0) == {}
    with pytest.raises(RecipeError, match=r"balance takes a layer with weight\.bits 16"):
        Scheme(balance="output")
    with pytest.raises(RecipeError, match="takes nothing else but balance"):
        dataclasses.replace(layer.scheme, permutation=True)
