"""OmniQuant's learning: the loss falls, never ends above its start, and is what gets stored."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from omega_qvla.config.presets import preset
from omega_qvla.config.recipe import Learning, Scheme
from omega_qvla.errors import NumericsError
from omega_qvla.kernels.reference import linear
from omega_qvla.numerics.learned import learn
from omega_qvla.numerics.quantize_layer import quantize_layer, smoothing_for
from omega_qvla.numerics.smoothing import DIVISOR_LIMIT

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


@pytest.mark.parametrize(
    ("factor", "message"), [(1e6, "overflows torch.float16"), (1e-9, "are lost in torch.float16")]
)
def test_scales_that_16_bits_cannot_hold_are_refused(factor: float, message: str) -> None:
    samples, weight = tokens(40, 32), layer_weight(16, 32) * factor
    with pytest.raises(NumericsError, match=f"layer l: .*{message}"):
        quantize_layer("l", "backbone", weight, None, omniquant(2), stats_of(samples), None)


def test_a_divisor_beyond_its_limit_is_brought_back_and_the_layer_still_fits() -> None:
    """Smoothing is undone in the weights whatever the divisor is: clipping one breaks nothing."""
    samples, weight = tokens(300, 32), layer_weight(16, 32)
    samples[0][:, 3] *= 1e-9  # its size against the others' is beyond what the limit allows
    scheme = omniquant(2)
    layer = quantize_layer("l", "backbone", weight, None, scheme, stats_of(samples), None)
    assert layer.smooth is not None and float(layer.smooth.min()) == 1 / DIVISOR_LIMIT
    y, expected = linear(samples[0], layer), samples[0] @ weight.T
    assert float((y - expected).norm() / expected.norm()) < 0.2
