"""Cascaded builds: the action head calibrated under the quantized backbone."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import omega_qvla.quantize as build
from calibration.helpers import all_targets, tiny_samples
from omega_qvla.calibration import calibrate
from omega_qvla.calibration.collect import collect
from omega_qvla.config import preset
from omega_qvla.errors import CalibrationError, RecipeError
from omega_qvla.modules.linear import QuantLinear, quantized_linears
from omega_qvla.numerics.quantize_layer import quantize_layer
from omega_qvla.pack import read_pack
from omega_qvla.policies.targets import select_targets
from omega_qvla.quantize import Progress, quantize_policy
from policies.tiny import TINY, tiny_pi05

OMEGA = preset("omega")


@pytest.mark.parametrize("family", TINY)
def test_the_head_is_calibrated_under_the_quantized_backbone(family: str, tmp_path: Path) -> None:
    policy, samples = TINY[family](), tiny_samples()
    plain = read_pack(quantize_policy(policy, OMEGA, samples, out=tmp_path / "plain"))
    made = read_pack(quantize_policy(policy, OMEGA, samples, out=tmp_path / "made", cascade=True))
    backbone = {n: layer for n, layer in plain.layers.items() if layer.side == "backbone"}
    for name in backbone:
        assert torch.equal(made.layers[name].qweight, plain.layers[name].qweight)
    # By hand: put the backbone in place, observe the head, quantize one of its layers.
    assert OMEGA.action_head is not None
    names = select_targets(policy, OMEGA.action_head, "action_head").names
    with quantized_linears(policy.module, backbone, "emulated"):
        stats = collect(policy, samples, names)
    alone = collect(policy, samples, names)
    moved = [n for n in names if not torch.equal(stats[n].hessian, alone[n].hessian)]
    assert moved
    name = moved[-1]
    linear, layer = policy.module.get_submodule(name), made.layers[name]
    profile = build.site_profiles(policy, build.plan(policy, OMEGA, policy.num_steps))[name]
    expected = quantize_layer(
        name, "action_head", linear.weight.detach(), linear.bias, layer.scheme, stats[name],
        layer.num_steps, profile,
    )  # fmt: skip
    assert torch.equal(layer.qweight, expected.qweight)
    assert made.manifest.calibration["cascade"] is True
    assert "cascade" not in plain.manifest.calibration
    assert not any(isinstance(m, QuantLinear) for m in policy.module.modules())


def test_a_given_calibration_serves_the_backbone(tmp_path: Path) -> None:
    policy, samples = tiny_pi05(), tiny_samples()
    calibration = calibrate(policy, samples, all_targets(policy))
    one = quantize_policy(policy, OMEGA, samples, out=tmp_path / "one", cascade=True)
    two = quantize_policy(
        policy, OMEGA, samples, out=tmp_path / "two", calibration=calibration, cascade=True
    )
    assert one.read_bytes() == two.read_bytes()


def test_a_killed_cascade_resumes_to_the_same_bytes(tmp_path: Path) -> None:
    policy, samples = tiny_pi05(), tiny_samples()
    whole = quantize_policy(policy, OMEGA, samples, out=tmp_path / "whole", cascade=True)
    heads = sum(job.side == "action_head" for job in build.plan(policy, OMEGA, policy.num_steps))

    def kill(progress: Progress) -> None:
        if progress.stage == "quantizing" and progress.total - progress.done == heads - 1:
            raise KeyboardInterrupt

    out = tmp_path / "cut"
    with pytest.raises(KeyboardInterrupt):
        quantize_policy(policy, OMEGA, samples, out=out, cascade=True, progress=kill)
    assert not any(isinstance(m, QuantLinear) for m in policy.module.modules())
    quantize_policy(policy, OMEGA, samples, out=out, cascade=True)
    assert out.read_bytes() == whole.read_bytes()


def test_what_cannot_cascade_is_refused(tmp_path: Path) -> None:
    policy, samples = tiny_pi05(), tiny_samples()
    with pytest.raises(RecipeError, match="nothing to cascade"):
        quantize_policy(policy, preset("rtn"), samples, out=tmp_path / "p", cascade=True)
    with pytest.raises(RecipeError, match="nothing to cascade"):
        quantize_policy(
            policy, OMEGA, samples, out=tmp_path / "p", cascade=True, sides=["action_head"]
        )
    calibration = calibrate(policy, samples, all_targets(policy))
    with pytest.raises(CalibrationError, match="give samples"):
        quantize_policy(
            policy, OMEGA, None, out=tmp_path / "p", calibration=calibration, cascade=True
        )
