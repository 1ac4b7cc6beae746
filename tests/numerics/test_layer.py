"""A quantized layer holds exactly the tensors that its scheme calls for, or is refused."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from omega_qvla.config.recipe import ActivationScheme, Rotation, Scheme, Smoothing, WeightScheme
from omega_qvla.errors import NumericsError
from omega_qvla.numerics.layer import TENSOR_FIELDS, QuantizedLayer
from omega_qvla.numerics.quantize_layer import quantize_layer

from .problems import layer_weight, random, stats_of, tokens

EVERYTHING = Scheme(
    rotation=Rotation("svd_hadamard", block=16),
    weight=WeightScheme(group=8, rank=2),
    activation=ActivationScheme("per_step_group", group=8),
    smoothing=Smoothing(),
    permutation=True,
    output_rotation=True,
)


def make(scheme: Scheme = EVERYTHING, width: int = 40, steps: int | None = 3) -> QuantizedLayer:
    samples = tokens(30, width, steps or 1)
    weight, bias = layer_weight(20, width), random(20)
    return quantize_layer("x.y", "action_head", weight, bias, scheme, stats_of(samples), steps)


def test_shapes_dtypes_and_bytes() -> None:
    layer = make()
    shapes = {name: (tuple(t.shape), t.dtype) for name, t in layer.tensors().items()}
    half = torch.float16
    assert shapes == {
        "qweight": ((20, 20), torch.uint8),
        "weight_scale": ((20, 5), half),
        "bias": ((20,), torch.float32),
        "smooth": ((40,), half),
        "permutation": ((40,), torch.int32),
        "rotation": ((3, 16, 16), half),  # 16 + 16 + 8
        "output_rotation": ((2, 16, 16), half),  # 16 + 4
        "act_scale": ((3, 5), torch.float32),
        "lowrank_a": ((20, 2), half),
        "lowrank_b": ((40, 2), half),
    }
    assert set(shapes) == set(TENSOR_FIELDS) - {"signs", "first_rotation"}
    assert layer.nbytes == 400 + 200 + 80 + 80 + 160 + 1536 + 1024 + 60 + 80 + 160
    assert layer.integers().shape == (20, 40)
    assert layer.to("cpu").tensors().keys() == layer.tensors().keys()


def test_plain_layers_hold_little() -> None:
    scheme = Scheme(rotation=Rotation("hadamard"), activation=ActivationScheme("per_token"))
    layer = make(scheme, steps=None)
    assert set(layer.tensors()) == {"qweight", "weight_scale", "bias"}
    randomized = dataclasses.replace(scheme, rotation=Rotation("hadamard", randomized=True))
    assert set(make(randomized).tensors()) == {"qweight", "weight_scale", "bias", "signs"}


@pytest.mark.parametrize(
    "change, message",
    [
        ({"smooth": None}, "x.y: smooth must be .* found nothing"),
        ({"act_scale": torch.ones(2, 5)}, r"act_scale must be torch.float32 \(3, 5\)"),
        ({"num_steps": 4}, "act_scale must be"),
        ({"weight_scale": torch.ones(20, 5)}, "weight_scale must be torch.float16"),
        ({"weight_scale": torch.zeros(20, 5).half()}, "weight_scale is not finite and positive"),
        ({"smooth": torch.full((40,), float("inf")).half()}, "smooth is not finite"),
        ({"weight_scale": -torch.ones(20, 5).half()}, "weight_scale is not finite and positive"),
        ({"act_scale": -torch.ones(3, 5)}, "act_scale is not finite and positive"),
        ({"signs": torch.ones(40, dtype=torch.int8)}, "has no use for signs"),
        ({"qweight": torch.zeros(20, 19, dtype=torch.uint8)}, "qweight must be"),
        ({"in_features": 41}, "qweight must be"),
    ],
)
def test_what_does_not_fit_is_refused(change: dict[str, object], message: str) -> None:
    layer = make()
    with pytest.raises(NumericsError, match=message):
        dataclasses.replace(layer, **change)  # type: ignore[arg-type]


def test_signed_weights_may_have_negative_scales_but_no_zeros() -> None:
    layer = make(Scheme(weight=WeightScheme(group=8, signed=True)), steps=None)
    assert bool((layer.weight_scale < 0).any()) and bool((layer.weight_scale > 0).any())
    for impossible in (0.0, float("inf"), float("nan")):
        broken = layer.weight_scale.clone()
        broken[3, 1] = impossible
        with pytest.raises(NumericsError, match="weight_scale is zero or not finite"):
            dataclasses.replace(layer, weight_scale=broken)
