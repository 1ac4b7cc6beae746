"""Diagnosis of layers on the toy policy, whose answers are known by construction."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from evaluation.toy import LAYERS, ToyPolicy, observations, quantized
from omega_qvla.config import ActivationScheme
from omega_qvla.evaluation.diagnostics import clip_rate
from omega_qvla.evaluation.layer_drift import layer_drift
from omega_qvla.evaluation.layer_findings import LayerFinding, find_layers
from omega_qvla.evaluation.open_loop import action_drift
from omega_qvla.evaluation.report.layer_page import LayerPage, write_layer_page
from omega_qvla.evaluation.sensitivity import (
    LeaveOut,
    Sensitivity,
    extra_bytes,
    leave_out_curve,
    partial_policy,
    sensitivity,
    suggest,
)
from omega_qvla.numerics.activation import quantize_per_token

SEEN, SEEDS = observations(12), list(range(12))


def test_one_layer_at_a_time_is_that_layer() -> None:
    policy = ToyPolicy()
    twin, layers = quantized(policy)
    whole = action_drift(policy, twin, SEEN, SEEDS).relative_error
    with partial_policy(policy, layers, SEEN, SEEDS, "emulated") as partial:
        found = sensitivity(partial)
        assert partial.drift([]).relative_error == 0
    assert found.everything == pytest.approx(whole)
    # Of two layers, all but one is the other alone.
    first, second = LAYERS
    assert found.alone[first] == found.without[second] > 0
    assert found.alone[second] == found.without[first] > 0
    assert all(isinstance(policy.module.get_submodule(n), nn.Linear) for n in LAYERS)


def test_the_policy_is_whole_again_after_an_error() -> None:
    policy = ToyPolicy()
    _, layers = quantized(policy)
    with (
        pytest.raises(RuntimeError),
        partial_policy(policy, layers, SEEN, SEEDS, "emulated") as partial,
    ):
        partial.drift(list(layers))
        raise RuntimeError
    assert all(isinstance(policy.module.get_submodule(n), nn.Linear) for n in LAYERS)


def test_a_broken_layer_is_the_one_to_leave_out() -> None:
    policy = ToyPolicy()
    _, layers = quantized(policy)
    broken = layers["backbone.fc"]
    wrong = torch.zeros_like(broken.qweight) + 0x88  # nibbles of value 0
    object.__setattr__(broken, "qweight", wrong)
    with partial_policy(policy, layers, SEEN, SEEDS, "emulated") as partial:
        found = sensitivity(partial)
        curve = leave_out_curve(partial, found)
    assert found.gain("backbone.fc") > 0.5 > found.gain("head.fc")
    assert [len(entry.layers) for entry in curve] == [0, 1, 2]
    assert curve[1].layers == ("backbone.fc",)
    assert curve[1].extra_bytes == extra_bytes(broken) == 2 * 64 * 65 - broken.nbytes
    assert curve[2].error == 0 and curve[2].cosine_min == pytest.approx(1)
    chosen = suggest(curve)
    assert "backbone.fc" in chosen.layers and chosen.error < 0.2 * curve[0].error


def test_the_suggestion_stops_where_a_step_does_not_pay() -> None:
    def entry(count: int, error: float) -> LeaveOut:
        return LeaveOut(("x",) * count, error, 1.0, 1.0, count)

    curve = [entry(0, 1.0), entry(1, 0.7), entry(2, 0.69), entry(4, 0.1)]
    assert suggest(curve) == curve[1]
    assert suggest(curve, worth=0.0) == curve[3]
    assert suggest([entry(0, 1.0), entry(1, 0.95)]).layers == ()
    assert Sensitivity(0.0, {"x": 0.0}, {"x": 0.0}).gain("x") == 0


def test_clipping_is_counted_where_rounding_cuts_off() -> None:
    policy = ToyPolicy()
    _, layers = quantized(policy, "rtn")
    layer = layers["backbone.fc"]
    x = torch.linspace(-1, 1, 64)[None].repeat(3, 1)
    assert clip_rate(x, layer) == 0  # absmax scales reach to the last value
    activation = replace(layer.scheme.activation, clip=0.5)
    clipped = replace(layer, scheme=replace(layer.scheme, activation=activation))
    scale = 0.5 / 7
    beyond = ((x > 7.5 * scale) | (x < -8.5 * scale)).double().mean()
    assert clip_rate(x, clipped) == pytest.approx(float(beyond)) and beyond > 0.3


@pytest.mark.parametrize("kind", ["per_token", "per_token_group"])
def test_clipping_is_counted_under_signed_scales_too(kind: str) -> None:
    """Against the rounding itself: cut off is what it moves by more than half a step."""
    _, layers = quantized(ToyPolicy(), "rtn")
    layer = layers["backbone.fc"]
    activation = ActivationScheme(kind, group=16, clip=0.5, signed=True)  # type: ignore[arg-type]
    signed = replace(layer, scheme=replace(layer.scheme, activation=activation))
    x = torch.randn(40, 64, generator=torch.Generator().manual_seed(0))
    blocks = x if kind == "per_token" else x.view(-1, 16)
    q, scale = quantize_per_token(blocks, 4, 0.5, signed=True)
    beyond = ((blocks / scale - q).abs() > 0.5).double().mean()
    assert clip_rate(x, signed) == pytest.approx(float(beyond)) and beyond > 0.003


def findings(policy: ToyPolicy) -> tuple[LayerFinding, ...]:
    twin, layers = quantized(policy)
    drift = layer_drift(policy, twin, SEEN, SEEDS, list(layers))
    with partial_policy(policy, layers, SEEN, SEEDS, "emulated") as partial:
        found = sensitivity(partial)
    return find_layers(policy, layers, SEEN, SEEDS, drift, found)


def test_findings_say_what_is_true_of_the_layer() -> None:
    policy = ToyPolicy()
    policy.outlier[5] = 50.0
    backbone, head = findings(policy)
    assert (backbone.name, backbone.worst_step) == ("backbone.fc", -1)
    assert backbone.ratio_before > 20
    states = np.abs(np.stack([o.state for o in SEEN]) * policy.outlier.numpy())
    assert backbone.largest == {-1: pytest.approx(states.max())}
    assert set(head.largest) == {0, 1, 2, 3} and head.largest[3] > 2 * head.largest[0]
    assert head.error <= head.worst_error
    plain = backbone.to_dict()
    assert plain["largest"] == {"-1": backbone.largest[-1]}


def test_the_page_names_every_layer(tmp_path: Path) -> None:
    found = findings(ToyPolicy())
    curve = (LeaveOut((), 0.2, 0.9, 0.8, 0), LeaveOut(("head.fc",), 0.1, 0.95, 0.9, 100))
    table = (("layer", "error"), [[f.name, "0.1 < 1"] for f in found])
    page = LayerPage("Layers of <x>", found, curve, curve[1], ["a note"], table)
    text = write_layer_page(page, tmp_path / "layers.html").read_text()
    assert text.count("<svg") == 5 and "Layers of &lt;x&gt;" in text
    assert "head.fc" in text and "0.1 &lt; 1" in text
    assert "http" not in text.replace("http://www.w3.org", "")
    alone = LayerPage("x", found, (), None, [], table)
    assert "Sensitivity" not in write_layer_page(alone, tmp_path / "few.html").read_text()
