"""The recorded GR00T cases through files: written in two layouts, loaded, and compared.

The recordings are of the backbone and of the action head, each alone and of sizes that do not
fit each other. So each is put into a whole policy whose other half is made up.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tokenizers import AddedToken, Tokenizer
from tokenizers.models import WordLevel
from torch import nn

from omega_qvla.policies.groot_n15.config import (
    ActionHeadConfig,
    BackboneConfig,
    EagleConfig,
    GrootConfig,
)
from omega_qvla.policies.groot_n15.init import init_weights
from omega_qvla.policies.groot_n15.model import GrootModel
from omega_qvla.policies.groot_n15.policy import GrootPolicy
from omega_qvla.policies.groot_n15.processor import GrootProcessor
from omega_qvla.policies.registry import load_policy
from omega_qvla.policies.statistics import compute_statistics
from omega_qvla.policies.tokenizer import GROOT_IMAGE, GROOT_SPECIALS, UNKNOWN
from policies.layouts import write_isaac, write_lerobot_groot
from policies.tiny import CAMERAS, tiny_groot

from .conftest import Case, assert_close

UNUSED = "eagle_model.vision_model.vision_model.head."
TOO_LARGE = 100_000_000

WRITERS: Mapping[str, Callable[[GrootPolicy, Path], Path]] = {
    "isaac": lambda policy, path: write_isaac(policy, path / "c"),
    "lerobot": lambda policy, path: write_lerobot_groot(policy, path / "c", path / "base"),
}
layouts = pytest.mark.parametrize("layout", list(WRITERS))


def made_up_config() -> GrootConfig:
    return tiny_groot().model.config


def head_for(width: int) -> ActionHeadConfig:
    """A small head that reads features of this width."""
    data = made_up_config().action_head.to_dict()
    data["backbone_embedding_dim"] = width
    data["diffusion_model_cfg"]["cross_attention_dim"] = width
    data["vl_self_attention_cfg"] |= {"num_attention_heads": width // 64}
    return ActionHeadConfig.from_dict(data)


def policy_with(config: GrootConfig, part: str, case: Case) -> GrootPolicy:
    """Initial weights, but the case's in the submodule `part`; statistics and words made up."""
    model = GrootModel(config)
    init_weights(model, seed=0)
    weights = {n: w for n, w in case.weights().items() if not n.startswith(UNUSED)}
    module: nn.Module = getattr(model, part)
    module.load_state_dict(weights, strict=True)
    ids = {token: i for i, token in enumerate(GROOT_SPECIALS)}
    ids[GROOT_IMAGE] = config.eagle.image_token_index
    words = Tokenizer(WordLevel(ids, unk_token=UNKNOWN))
    words.add_special_tokens([AddedToken(token, special=True) for token in ids])
    values = np.random.default_rng(0).normal(size=(64, 4))
    stats = compute_statistics(values)
    processor = GrootProcessor.create(config, words, stats, stats, CAMERAS, embodiment_id=1)
    return GrootPolicy(model.eval().requires_grad_(False), processor)


def through_files(policy: GrootPolicy, layout: str, folder: Path) -> Any:
    settings = {"embodiment_id": 1} if layout == "isaac" else None
    return load_policy(WRITERS[layout](policy, folder), settings=settings).module


@layouts
@pytest.mark.cases("groot_head")
def test_a_loaded_action_head_reproduces_the_recording(
    case: Case, layout: str, tmp_path: Path
) -> None:
    if case.meta["num_params"] > TOO_LARGE:
        pytest.skip("gigabytes; the small case goes through the same loader")
    head = ActionHeadConfig.from_dict(case.meta["config"])
    base, width = made_up_config(), head.backbone_embedding_dim
    text = replace(base.eagle.text, hidden_size=width)
    config = replace(base, eagle=replace(base.eagle, text=text), action_head=head)
    loaded = through_files(policy_with(config, "action_head", case), layout, tmp_path)
    t = case.tensors
    prefix = loaded.encode_features(t["in.backbone_features"], t["in.state"], t["in.embodiment_id"])
    recorded = [name for name in t if name.endswith(".actions")]
    assert recorded
    for name in recorded:
        steps = int(name.split(".")[1].removeprefix("n"))
        actions = loaded.sample_actions(prefix, t["in.noise"], steps)
        assert_close(actions, t[name], f"{name} of {layout}")


@layouts
@pytest.mark.cases("eagle")
def test_a_loaded_backbone_reproduces_the_recording(
    case: Case, layout: str, tmp_path: Path
) -> None:
    keys = ("select_layer", "project_to_dim")
    backbone = BackboneConfig.from_dict({key: case.meta[key] for key in keys})
    eagle = EagleConfig.from_dict(case.meta["config"])
    width = backbone.project_to_dim or eagle.text.hidden_size
    config = replace(made_up_config(), eagle=eagle, backbone=backbone, action_head=head_for(width))
    loaded = through_files(policy_with(config, "backbone", case), layout, tmp_path)
    t = case.tensors
    mask = t["in.attention_mask"]
    features = loaded.backbone(t["in.pixel_values"], t["in.input_ids"], mask)
    valid = mask.bool()
    assert_close(features[valid], t["out.backbone_features"][valid], f"features of {layout}")
