"""True-size bundles, by the arithmetic that `test_bundle` checks against the writer."""

from __future__ import annotations

import dataclasses
from typing import Any, cast

import pytest
import torch

from omega_qvla.bundle import BundleOptions, predict_sizes
from omega_qvla.config import preset
from omega_qvla.policies.groot_n15.config import GrootConfig
from omega_qvla.policies.groot_n15.model import GrootModel
from omega_qvla.policies.groot_n15.policy import GrootPolicy
from omega_qvla.policies.pi05.config import Pi05Config
from omega_qvla.policies.pi05.model import Pi05Model
from omega_qvla.policies.pi05.policy import Pi05Policy

NO_PROCESSOR = cast(Any, None)  # sizes ask nothing of it
SMALL = BundleOptions(embed="int8", vision="int8", connector="int8")


def true_size(family: str) -> Pi05Policy | GrootPolicy:
    """A published network without weights, with room for one embodiment."""
    with torch.device("meta"):
        if family == "pi05":
            sizes = {"paligemma_variant": "gemma_2b", "action_expert_variant": "gemma_300m"}
            config = Pi05Config.from_dict({"action_dim": 32, "action_horizon": 50, **sizes})
            return Pi05Policy(Pi05Model(config), NO_PROCESSOR)
        groot = GrootConfig()
        head = dataclasses.replace(groot.action_head, max_num_embodiments=1)
        return GrootPolicy(GrootModel(dataclasses.replace(groot, action_head=head)), NO_PROCESSOR)


@pytest.mark.parametrize(
    ("family", "steps", "quantized", "total"),
    [("pi05", 10, 1.15 * 2**30, 2.3e9), ("groot_n15", 4, 545 * 2**20, 1.6e9)],
)
def test_the_bars(family: str, steps: int, quantized: float, total: float) -> None:
    options = dataclasses.replace(SMALL, bake_steps=steps)
    parts = predict_sizes(true_size(family), preset("omega"), options)
    assert parts["quantized layers"] <= quantized
    # Tokenizer (17 MB of PaliGemma, 11 MB of Qwen) and headers come on top.
    assert sum(parts.values()) + 50e6 <= total


def test_what_baking_saves() -> None:
    """pi0.5: 116.5 M parameters of adaRMS and the time MLP become 37 x 3 x 10 x 1024 floats."""
    plain = predict_sizes(true_size("pi05"), preset("omega"), SMALL)
    baked = predict_sizes(
        true_size("pi05"), preset("omega"), dataclasses.replace(SMALL, bake_steps=10)
    )
    assert baked["baked time layers"] == 4 * (37 * 3 * 10 * 1024 + 10)
    time_mlp = 2 * (1024 * 1024 + 1024)
    gone = 116_505_600 + time_mlp
    assert plain["everything else"] - baked["everything else"] == 2 * gone
