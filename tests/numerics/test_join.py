"""Layers of one input as one layer: only where the inputs agree, and then to the last bit."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch

from numerics.problems import random, stats_of, tokens
from omega_qvla.config.recipe import ActivationScheme, Rotation, Scheme, Smoothing, WeightScheme
from omega_qvla.errors import NumericsError
from omega_qvla.kernels import reference
from omega_qvla.numerics.join import join_layers, same_input
from omega_qvla.numerics.layer import QuantizedLayer
from omega_qvla.numerics.quantize_layer import quantize_layer

WIDTH = 64


def layer(name: str, out: int, scheme: Scheme, *, bias: bool = False) -> QuantizedLayer:
    """Random weights, statistics of the same tokens for every name."""
    made = quantize_layer(
        name, "action_head", random(out, WIDTH, seed=out), random(out) if bias else None, scheme,
        stats_of(tokens(50, WIDTH, 1)), None,
    )  # fmt: skip
    if made.smooth is None:
        return made
    return dataclasses.replace(made, smooth=torch.linspace(0.5, 2, WIDTH).half())


def scheme(**weight: Any) -> Scheme:
    return Scheme(
        Rotation("hadamard"), WeightScheme(**weight), ActivationScheme("per_token_group"),
        Smoothing(),
    )  # fmt: skip


@pytest.mark.parametrize("weight", [{}, {"rank": 2}, {"group": 64}, {"rank": 3, "group": 64}])
def test_the_join_is_the_layers_side_by_side(weight: dict[str, int]) -> None:
    parts = [
        layer("q", 48, scheme(**weight), bias=True),
        layer("k", 17, scheme(**weight)),
        layer("v", 16, scheme(**weight), bias=True),
    ]
    x = random(5, WIDTH)
    expected = torch.cat([reference.linear(x, part) for part in parts], dim=-1)
    joined = join_layers(parts)
    assert joined.name == "q + k + v" and joined.out_features == 81
    assert torch.equal(reference.linear(x, joined), expected)


def test_what_makes_inputs_differ() -> None:
    one = layer("q", 16, scheme())
    two = layer("k", 32, scheme())
    assert same_input(one, two)
    assert one.smooth is not None
    nudged = one.smooth.clone()
    nudged[3] *= 1.01
    eight = dataclasses.replace(
        one.scheme, activation=dataclasses.replace(one.scheme.activation, bits=8)
    )
    changes: list[dict[str, Any]] = [
        {"smooth": nudged},
        {"scheme": eight},
        {"side": "backbone"},
        {"num_steps": 4},
    ]
    for change in changes:
        other = dataclasses.replace(two, **change)
        assert not same_input(one, other), change
        with pytest.raises(NumericsError, match="do not share their input's integers: q, k"):
            join_layers([one, other])
    with pytest.raises(NumericsError, match="do not share"):
        join_layers([one])


def test_an_output_rotation_stays_alone() -> None:
    turned = Scheme(activation=ActivationScheme("per_token"), output_rotation=True)
    one, two = layer("a", 64, turned), layer("b", 64, turned)
    assert not same_input(one, two)
