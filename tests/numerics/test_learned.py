"""OmniQuant's learning: the loss falls, never ends above its start, and is what gets stored."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from omega_qvla.config.presets import preset
from omega_qvla.config.recipe import ActivationScheme, Learning, Scheme, WeightScheme
from omega_qvla.errors import NumericsError
from omega_qvla.kernels.reference import linear
from omega_qvla.numerics.learned import learn
from omega_qvla.numerics.quantize_layer import quantize_layer, smoothing_for

from .problems import layer_weight, stats_of, tokens


def omniquant(steps: int = 60) -> Scheme:
    side = preset("omniquant-w4a4").backbone
    assert side is not None
    return dataclasses.replace(side.scheme, learning=Learning(steps=steps))


def error(scheme: Scheme) -> float:
    samples, weight = tokens(300, 96), layer_weight(64, 96)
    layer = quantize_layer("l", "backbone", weight, None, scheme, stats_of(samples), None)
    y, expected = linear(samples[0], layer), samples[0] @ weight.T
    return float((y - expected).square().sum() / expected.square().sum())


def test_the_loss_falls() -> None:
    samples, weight, scheme = tokens(300, 96), layer_weight(64, 96), omniquant()
    start = smoothing_for(weight, scheme, stats_of(samples))
    learned = learn(weight, samples, start, scheme)
    assert min(learned.losses) < 0.94 * learned.losses[0]  # .92 measured
    assert learned.divisor.dtype == torch.float16 and learned.divisor.shape == (96,)
    assert torch.equal(learned.scale.half().float(), learned.scale)
    again = learn(weight, samples, start, scheme)
    assert torch.equal(again.divisor, learned.divisor) and again.losses == learned.losses


def test_both_parts_are_learned() -> None:
    samples, weight = tokens(300, 96), layer_weight(64, 96)
    start = smoothing_for(weight, omniquant(), stats_of(samples))
    cases = (
        (Learning(40, smooth_rate=0.0, clip_rate=0.1), "scale"),
        (Learning(40, clip_rate=0.0), "divisor"),
    )
    for rates, moved in cases:
        scheme = dataclasses.replace(omniquant(), learning=rates)
        learned = learn(weight, samples, start, scheme)
        assert torch.equal(learned.divisor, start.half()) is (moved == "scale")
        assert min(learned.losses) < 0.99 * learned.losses[0]


def test_learning_beats_what_it_starts_from() -> None:
    plain = dataclasses.replace(omniquant(), learning=None)  # SmoothQuant
    assert error(omniquant(120)) < 0.92 * error(plain)


def test_a_rate_that_breaks_everything_falls_back_to_the_start() -> None:
    samples, weight = tokens(100, 32), layer_weight(16, 32)
    wild = dataclasses.replace(omniquant(), learning=Learning(20, smooth_rate=50.0))
    start = smoothing_for(weight, wild, stats_of(samples))
    learned = learn(weight, samples, start, wild)
    assert min(learned.losses) == learned.losses[0]
    assert torch.equal(learned.divisor, start.half())


def test_what_cannot_be_learned_is_refused() -> None:
    samples, weight = tokens(20, 32), layer_weight(16, 32)
    for change, message in (
        ({"activation": ActivationScheme("per_token_group")}, "per_token inputs or none"),
        ({"weight": WeightScheme(group=16)}, "one scale per row"),
    ):
        scheme = dataclasses.replace(omniquant(), **change)
        with pytest.raises(NumericsError, match=f"layer l: .*{message}"):
            quantize_layer("l", "backbone", weight, None, scheme, stats_of(samples), None)
