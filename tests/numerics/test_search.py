"""What is searched is found: no other candidate has a lower output error."""

from __future__ import annotations

import pytest
import torch

from omega_qvla.config.presets import preset
from omega_qvla.config.recipe import ActivationScheme, Scheme, Smoothing, WeightScheme
from omega_qvla.errors import NumericsError
from omega_qvla.numerics.gptq import row_objective
from omega_qvla.numerics.qparams import weight_scales
from omega_qvla.numerics.quantize_layer import quantize_layer
from omega_qvla.numerics.rtn import dequantize, round_weight
from omega_qvla.numerics.search import (
    ALPHAS,
    divisor_for,
    output_error,
    output_scales,
    rounded_inputs,
    rounded_moments,
    sample_tokens,
    search_divisor,
)
from omega_qvla.numerics.smoothing import token_profile, weight_profile

from .problems import layer_weight, random, stats_of, tokens


def scheme_of(name: str) -> Scheme:
    side = preset(name).backbone
    assert side is not None
    return side.scheme


@pytest.mark.parametrize("name", ["awq-w4a16", "svdquant-w4a4"])
def test_the_chosen_power_has_the_least_output_error(name: str) -> None:
    scheme, samples, weight = scheme_of(name), tokens(200, 128, 2), layer_weight(64, 128)
    assert scheme.smoothing is not None
    x = token_profile(samples, scheme.smoothing.profile)
    w = weight_profile([weight], scheme.smoothing.profile)
    pooled = sample_tokens(samples, 512)
    chosen = search_divisor(weight, samples, x, w, scheme)
    candidates = [divisor_for(scheme.smoothing, x, w, alpha).half().float() for alpha in ALPHAS]
    errors = [output_error(weight, pooled, d, scheme) for d in candidates]
    best = errors.index(min(errors))
    assert torch.equal(chosen, candidates[best])
    assert best > 0  # smoothing helps on these channels
    assert errors[best] < 0.8 * errors[0]  # .45 and .73 measured


def test_the_layer_keeps_the_divisor_that_was_found() -> None:
    scheme, samples, weight = scheme_of("awq-w4a16"), tokens(100, 128), layer_weight(32, 128)
    layer = quantize_layer("l", "backbone", weight, None, scheme, stats_of(samples), None)
    x = token_profile(samples, "mean")
    assert layer.smooth is not None
    expected = search_divisor(weight, samples, x, torch.ones_like(x), scheme)
    assert torch.equal(layer.smooth, expected.half())


def test_awq_divisors_by_hand() -> None:
    awq = Smoothing(profile="mean")
    x = torch.tensor([1.0, 4.0, 16.0, 0.0])
    d = divisor_for(awq, x, torch.ones(4), 0.5)
    torch.testing.assert_close(d, torch.tensor([0.5, 1.0, 2.0, 1.0]))  # sqrt(x), max * min = 1
    assert torch.equal(divisor_for(awq, x, torch.ones(4), 0.0), torch.ones(4))
    assert torch.equal(divisor_for(awq, x * 0, torch.ones(4), 0.5), torch.ones(4))


@pytest.mark.parametrize("group", [None, 32, 24])
def test_clipping_lowers_the_output_error_of_every_group(group: int | None) -> None:
    samples, weight = tokens(300, 80), layer_weight(40, 80)
    hessian = samples[0].T @ samples[0] / 300
    part = WeightScheme(group=group, grid="output")
    scales = output_scales(weight, hessian, part, torch.float16)
    plain = weight_scales(weight, 4, group, "max", store=torch.float16)
    assert bool((scales <= plain).all()) and bool((scales >= 0.54 * plain).all())
    assert torch.equal(scales.half().float(), scales)
    size = 80 if group is None else group
    for g, start in enumerate(range(0, 80, size)):
        cut = slice(start, min(start + size, 80))
        losses = []
        for scale in (scales, plain):
            q = round_weight(weight[:, cut], scale[:, g : g + 1], 4)
            wq = dequantize(q, scale[:, g : g + 1])
            losses.append(row_objective(weight[:, cut], wq, hessian[cut, cut]))
        assert bool((losses[0] <= losses[1] * (1 + 1e-5)).all())
        assert float(losses[0].sum()) < 0.95 * float(losses[1].sum())


@pytest.mark.parametrize(
    ("factor", "message"), [(1e6, "overflows torch.float16"), (1e-9, "are lost in torch.float16")]
)
def test_clipping_refuses_scales_that_16_bits_cannot_hold(factor: float, message: str) -> None:
    samples, weight = tokens(40, 32), layer_weight(16, 32) * factor
    scheme = Scheme(weight=WeightScheme(grid="output"))
    with pytest.raises(NumericsError, match=f"layer l: .*{message}"):
        quantize_layer("l", "backbone", weight, None, scheme, stats_of(samples), None)


def test_queries_and_keys_are_not_clipped() -> None:
    side = preset("awq-w4a16").action_head
    assert side is not None
    for name in ("layers.0.self_attn.q_proj", "blocks.1.attn1.to_k"):
        assert side.scheme_for(name).weight.grid == "max"
    for name in ("layers.0.self_attn.v_proj", "blocks.1.ff.net.2"):
        assert side.scheme_for(name).weight.grid == "output"


def test_channel_sizes() -> None:
    samples = (torch.tensor([[1.0, -5.0]]), torch.tensor([[-3.0, 1.0]]))
    assert token_profile(samples, "max").tolist() == [3.0, 5.0]
    assert token_profile(samples, "mean").tolist() == [2.0, 3.0]
    weights = (torch.tensor([[1.0, -2.0]]), torch.tensor([[-3.0, 1.0], [0.0, 0.5]]))
    assert weight_profile(weights, "max").tolist() == [3.0, 2.0]


def test_samples_are_evenly_spaced_over_all_steps() -> None:
    steps = (torch.arange(6.0)[:, None], torch.arange(6.0, 10.0)[:, None])
    assert sample_tokens(steps, 4)[:, 0].tolist() == [0, 3, 6, 9]
    assert len(sample_tokens(steps, 100)) == 10


def test_inputs_are_rounded_as_the_kernels_do() -> None:
    x = random(5, 48)
    assert rounded_inputs(x, ActivationScheme()) is x
    per_token = rounded_inputs(x, ActivationScheme("per_token"))
    assert float((per_token - x).abs().max()) <= float(x.abs().max()) / 14 + 1e-6
    grouped = rounded_inputs(x, ActivationScheme("per_token_group", group=16))
    assert float((grouped - x).square().mean()) < float((per_token - x).square().mean())
    with pytest.raises(NumericsError, match="per_step_tensor inputs: only dynamic"):
        rounded_inputs(x, ActivationScheme("per_step_tensor"))


def test_rounded_moments_are_those_of_the_rounded_tokens() -> None:
    x = random(4000, 64) @ (torch.eye(64) + 0.1 * random(64, 64, seed=1))
    activation = ActivationScheme("per_token_group", group=32, clip=0.95)
    exact = x.T @ x / len(x)
    modelled = rounded_moments(exact, x, activation)
    rounded = rounded_inputs(x, activation).double()
    direct = rounded.T @ rounded / len(rounded)
    torch.testing.assert_close(modelled.diagonal(), direct.diagonal(), rtol=1e-4, atol=0)
    off = (modelled - direct).fill_diagonal_(0)
    assert float(off.norm()) < 0.03 * float((direct - direct.diagonal().diag()).norm())
    assert float(torch.linalg.eigvalsh(modelled).min()) > 0
    # A dead channel stays one, and nothing is rounded where inputs are not.
    x[:, 3] = 0
    exact = x.T @ x / len(x)
    assert float(rounded_moments(exact, x, activation)[3].abs().max()) == 0
    same = rounded_moments(exact, x, ActivationScheme())
    torch.testing.assert_close(same, exact.double(), rtol=1e-5, atol=1e-9)


def test_the_low_rank_branch_makes_the_rest_smaller() -> None:
    """SVDQuant: smoothing moves outliers into the weight, and the branch takes them out."""
    scheme, samples = scheme_of("svdquant-w4a4"), tokens(200, 128)
    weight = layer_weight(96, 128)
    layer = quantize_layer("l", "backbone", weight, None, scheme, stats_of(samples), None)
    assert layer.lowrank_a is not None and layer.lowrank_b is not None and layer.smooth is not None
    smoothed = layer.transform.weight(weight)
    rest = smoothed - layer.lowrank_a.float() @ layer.lowrank_b.float().T
    assert float(rest.square().sum()) < 0.4 * float(smoothed.square().sum())  # .28 measured
    assert float(rest.abs().max()) < 0.7 * float(smoothed.abs().max())
