"""Activation bits at run time, and packs that lack layers."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch

from omega_qvla.config import ActivationScheme, Recipe, SideRecipe, preset
from omega_qvla.errors import PackError, RecipeError
from omega_qvla.numerics.quantize_layer import quantize_layer
from omega_qvla.pack.activation_bits import with_activation_bits
from omega_qvla.pack.apply import apply_pack
from omega_qvla.policies.registry import save_policy
from omega_qvla.quantize import quantize_policy
from omega_qvla.runtime.engine import Engine
from pack.layers import SCHEMES, STEPS, make_layer, random_stats, random_weight
from policies.tiny import tiny_observation, tiny_pi05


@pytest.mark.parametrize("kind", ["plain", "everything"])
def test_the_layer_is_the_one_built_with_those_bits(kind: str) -> None:
    layer = make_layer("x", kind, seed=3, side="action_head")
    weight, bias = random_weight(3)
    scheme = SCHEMES[kind]
    wide = dataclasses.replace(scheme, activation=dataclasses.replace(scheme.activation, bits=8))
    stats = random_stats(weight.shape[1], STEPS, 3)
    built = quantize_layer("x", "action_head", weight, bias, wide, stats, STEPS)
    changed = with_activation_bits({"x": layer}, 8)["x"]
    assert changed.scheme == built.scheme
    for name, tensor in built.tensors().items():
        torch.testing.assert_close(getattr(changed, name), tensor, rtol=1e-6, atol=0)


def test_scales_searched_for_other_bits_are_refused() -> None:
    with pytest.raises(PackError, match=r"layer x: its per_step_group scales.*--act-bits 8"):
        with_activation_bits({"x": make_layer("x", "randomized")}, 8)
    layer = make_layer("x", "randomized")
    assert with_activation_bits({"x": layer}, 4)["x"] is layer


def test_impossible_bits_are_refused() -> None:
    layer = make_layer("x", "plain")
    with pytest.raises(RecipeError, match=r"activation\.bits"):
        with_activation_bits({"x": layer}, 5)
    scheme = dataclasses.replace(layer.scheme, activation=ActivationScheme())
    with pytest.raises(PackError, match="does not round its inputs"):
        with_activation_bits({"x": dataclasses.replace(layer, scheme=scheme)}, 8)


def test_eight_bits_come_closer_at_run_time(tmp_path: Path) -> None:
    policy = tiny_pi05(num_steps=2)
    save_policy(policy, tmp_path / "checkpoint", dtype=torch.float32)
    rtn = preset("rtn")
    quantize_policy(policy, rtn, None, out=tmp_path / "p")
    weights = dataclasses.replace(SCHEMES["plain"], weight=rtn.backbone.scheme.weight)  # type: ignore[union-attr]
    side = SideRecipe(dataclasses.replace(weights, activation=ActivationScheme()))
    quantize_policy(policy, Recipe("w", side, side), None, out=tmp_path / "w")

    def act(pack: str, bits: int | None) -> torch.Tensor:
        engine = Engine.load(tmp_path / "checkpoint", tmp_path / pack, act_bits=bits)
        return torch.from_numpy(engine.infer(tiny_observation(), seed=1))

    unrounded = act("w", None)
    four, eight = ((act("p", bits) - unrounded).norm() for bits in (None, 8))
    assert eight < four / 4


def test_missing_layers_are_an_error_only_where_asked(tmp_path: Path) -> None:
    policy = tiny_pi05(num_steps=2)
    quantize_policy(policy, preset("rtn"), None, out=tmp_path / "p", sides=("action_head",))
    with pytest.raises(PackError, match=r"lacks 9 layer.s., first .*language_model"):
        apply_pack(policy, tmp_path / "p", missing="error")
    assert apply_pack(policy, tmp_path / "p").layers == 14
    whole = tiny_pi05(num_steps=2)
    quantize_policy(whole, preset("rtn"), None, out=tmp_path / "q")
    assert apply_pack(whole, tmp_path / "q", missing="error").layers == 23
