"""The recorded pi0.5 case through files: written in two layouts, loaded, and compared."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from omega_qvla.policies.pi05.model import Pi05Model
from omega_qvla.policies.pi05.policy import Pi05Policy
from omega_qvla.policies.pi05.processor import Pi05Processor
from omega_qvla.policies.registry import load_policy
from omega_qvla.policies.statistics import compute_statistics
from omega_qvla.policies.tokenizer import _word_level
from policies.layouts import write_lerobot_pi05, write_openpi

from .conftest import Case, assert_close
from .test_pi05 import config_of

pytestmark = pytest.mark.cases("pi05")


@pytest.mark.parametrize("layout", ["openpi", "lerobot"])
def test_loaded_checkpoints_reproduce_the_recording(
    case: Case, layout: str, tmp_path: Path
) -> None:
    t, config = case.tensors, config_of(case)
    with torch.device("meta"):
        model = Pi05Model(config)
    unused = case.meta.get("tied_or_unused", {})
    model.load_state_dict(
        {name: w for name, w in case.weights().items() if name not in unused}, assign=True
    )
    stats = compute_statistics(np.random.default_rng(0).normal(size=(64, config.action_dim)))
    words = _word_level(("<pad>", "<eos>", "<bos>", "<unk>"), (), ())
    processor = Pi05Processor.create(config, words, stats, stats, ("base",))
    processor = Pi05Processor(
        replace(processor.config, discrete_state_input=False), config, words, processor.stats
    )
    policy = Pi05Policy(model, processor)
    if layout == "openpi":
        path = write_openpi(policy, tmp_path / "c")
    else:
        path = write_lerobot_pi05(policy, tmp_path / "c", config.image_slots)
    loaded = load_policy(path).module
    images = [t[f"in.image.{slot}"] for slot in config.image_slots]
    masks = [t[f"in.image_mask.{slot}"] for slot in config.image_slots]
    prefix = loaded.encode_prefix(images, masks, t["in.lang_tokens"], t["in.lang_mask"])
    times = t["out.time"]
    actions = loaded.sample_actions(prefix, t["in.noise"], time_grid=times)
    assert_close(actions, t[f"out.actions_{len(times)}"], f"actions of {layout}")
