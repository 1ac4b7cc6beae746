"""The weight rule itself: what the recorded cases rest on."""

from __future__ import annotations

import pytest
import torch

from .conftest import Case
from .weights import make_weight, make_weights


@pytest.mark.cases("pi05")
def test_rebuilt_weights_pass_the_recorded_checks(case: Case) -> None:
    weights = case.weights()
    assert set(weights) == set(case.meta["weights"]) >= set(case.meta["weight_checks"])


def test_a_wrong_salt_is_noticed() -> None:
    name, shape = "layer.weight", [4, 8]
    right = make_weight(name, shape, "weight", salt="")
    check = {
        "first4": right.flatten()[:4].tolist(),
        "sum": right.sum().item(),
        "sumsq": right.square().sum().item(),
    }
    spec = {"weights": {name: {"shape": shape, "kind": "weight"}}, "weight_checks": {name: check}}
    assert torch.equal(make_weights({"salt": "", **spec})[name], right)
    with pytest.raises(ValueError, match="first values differ"):
        make_weights({"salt": "x", **spec})


def test_unknown_kind_is_refused() -> None:
    with pytest.raises(ValueError, match="unknown weight kind"):
        make_weight("a", [2], "norm7", "")
