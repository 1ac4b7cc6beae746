"""config.json of a pi0.5 checkpoint."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest

from omega_qvla.errors import ConfigError
from omega_qvla.policies.pi05.config import GEMMA_VARIANTS, GemmaConfig, Pi05Config, SiglipConfig

OPENPI = {
    "action_dim": 32,
    "action_horizon": 10,
    "paligemma_variant": "gemma_2b",
    "action_expert_variant": "gemma_300m",
    "precision": "bfloat16",
}
SMALL = Pi05Config(
    vision=SiglipConfig(64, 96, 2, 4, 32, 16),
    vlm=GemmaConfig(64, 2, 128, 4, 2, 16),
    expert=GemmaConfig(32, 2, 64, 4, 2, 16),
    vocab_size=50,
    action_dim=4,
    action_horizon=5,
    max_token_len=7,
    num_inference_steps=3,
    image_slots=("front", "wrist"),
)


def test_openpi_config_has_the_true_sizes_and_round_trips() -> None:
    config = Pi05Config.from_dict(OPENPI)
    assert config.vlm == GEMMA_VARIANTS["gemma_2b"] and config.expert.width == 1024
    assert (config.vision.num_tokens, config.vocab_size, config.max_token_len) == (256, 257152, 200)
    assert config.to_dict() == OPENPI


def test_small_config_round_trips_through_json() -> None:
    assert Pi05Config.from_dict(json.loads(json.dumps(SMALL.to_dict()))) == SMALL


def test_listed_extra_keys_are_tolerated_and_others_refused() -> None:
    extra = {"image_resolution": [224, 224], "pi05": True}
    assert Pi05Config.from_dict(OPENPI | extra) == Pi05Config.from_dict(OPENPI)
    with pytest.raises(ConfigError, match="depht"):
        Pi05Config.from_dict(OPENPI | {"depht": 3})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"action_dim": None}, "lacks 'action_dim'"),
        ({"paligemma_variant": "gemma_7b"}, "unknown variant 'gemma_7b'"),
        ({"paligemma_variant": {"width": 64}}, "paligemma_variant"),
        ({"paligemma_variant": 3}, "dict of sizes"),
        ({"action_expert_variant": {**SMALL.to_dict()["action_expert_variant"]}}, "depth"),
        ({"precision": "int4"}, "precision"),
        ({"action_horizon": 0}, "action_horizon"),
    ],
)
def test_impossible_configs_are_named(change: dict[str, Any], message: str) -> None:
    data = {k: v for k, v in (OPENPI | change).items() if v is not None}
    with pytest.raises(ConfigError, match=message):
        Pi05Config.from_dict(data)


def test_sizes_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ConfigError, match="not a multiple"):
        GemmaConfig(64, 2, 128, num_heads=4, num_kv_heads=3, head_dim=16)
    with pytest.raises(ConfigError, match="patch_size"):
        SiglipConfig(64, 96, 2, 4, image_size=8, patch_size=16)
    with pytest.raises(ConfigError, match="image_slots"):
        replace(SMALL, image_slots=("front", "front"))
