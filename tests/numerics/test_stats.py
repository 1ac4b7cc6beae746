"""Calibration statistics that cannot be used are refused, naming layer and step."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from omega_qvla.errors import CalibrationError

from .problems import stats_of, tokens


def test_good_statistics_pass() -> None:
    stats_of(tokens(9, 6, steps=3)).check("a.b", 6, 3)
    stats_of(tokens(1, 6)).check("a.b", 6, None)


def test_bad_statistics_are_named() -> None:
    good = stats_of(tokens(9, 6, steps=3))
    hole = (good.tokens[0], torch.zeros(0, 6), good.tokens[2])
    bad = good.tokens[2].clone()
    bad[3, 3] = float("nan")
    cases = [
        ({"count": 0}, "layer a.b: calibration saw no token"),
        ({"hessian": torch.eye(5)}, "layer a.b: Hessian"),
        ({"hessian": torch.full((6, 6), float("nan"))}, "layer a.b: .* not finite"),
        ({"profile": torch.ones(5)}, "layer a.b: profile"),
        ({"tokens": good.tokens[:2]}, r"layer a.b: calibrated for 2 step\(s\), needs 3"),
        ({"tokens": hole}, "layer a.b: step 1 has no calibration tokens"),
        ({"tokens": (*good.tokens[:2], bad)}, "layer a.b: step 2 has non-finite"),
    ]
    for change, message in cases:
        with pytest.raises(CalibrationError, match=message):
            dataclasses.replace(good, **change).check("a.b", 6, 3)
    with pytest.raises(CalibrationError, match="needs 1"):
        good.check("a.b", 6, None)
