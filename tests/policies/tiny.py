"""Policies of both families with random weights, small enough for milliseconds per inference.

from policies.tiny import tiny_groot, tiny_observation, tiny_pi05
"""

from __future__ import annotations

import numpy as np
import torch
from torch import nn

from omega_qvla.policies.groot_n15.config import GrootConfig
from omega_qvla.policies.groot_n15.init import init_weights as init_groot
from omega_qvla.policies.groot_n15.model import GrootModel
from omega_qvla.policies.groot_n15.policy import GrootPolicy
from omega_qvla.policies.groot_n15.processor import GrootProcessor
from omega_qvla.policies.observation import Observation
from omega_qvla.policies.pi05.config import Pi05Config
from omega_qvla.policies.pi05.init import init_weights as init_pi05
from omega_qvla.policies.pi05.model import Pi05Model
from omega_qvla.policies.pi05.policy import Pi05Policy
from omega_qvla.policies.pi05.processor import Pi05Processor
from omega_qvla.policies.statistics import Stats, compute_statistics
from omega_qvla.policies.tokenizer import (
    GROOT_IMAGE,
    build_groot_tokenizer,
    build_pi05_tokenizer,
)

IMAGE_SIZE = 32
STATE_DIM = 4
ACTION_DIM = 4
CAMERAS = ("base", "wrist")
PROMPTS = ("open the drawer", "press the red button from above")

_VISION = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": IMAGE_SIZE,
    "patch_size": 16,
}


def _statistics(seed: int) -> tuple[Stats, Stats]:
    rng = np.random.default_rng(seed)
    state = rng.normal(size=(256, STATE_DIM)) * [0.1, 0.2, 0.1, 0.5] + [0.0, 0.6, 0.2, 0.5]
    return compute_statistics(state), compute_statistics(rng.uniform(-1, 1, (256, ACTION_DIM)))


def _disturb(model: nn.Module, seed: int) -> None:
    """Move norms, biases and the output off their initial zeros: no term may be missed."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
            elif not parameter.any():
                values = torch.randn(parameter.shape, generator=generator)
                parameter.copy_(values * parameter.shape[-1] ** -0.5)
    model.eval().requires_grad_(False)


def tiny_pi05(seed: int = 0, num_steps: int = 10) -> Pi05Policy:
    """pi0.5 with two layers of width 128 (language) and 64 (expert), 2 query heads, 1 kv head."""
    tokenizer = build_pi05_tokenizer(PROMPTS)
    heads = {"depth": 2, "num_heads": 2, "num_kv_heads": 1, "head_dim": 64}
    config = Pi05Config.from_dict(
        {
            "action_dim": 6,
            "action_horizon": 5,
            "paligemma_variant": {"width": 128, "mlp_dim": 192, **heads},
            "action_expert_variant": {"width": 64, "mlp_dim": 128, **heads},
            "vision": _VISION,
            "vocab_size": tokenizer.get_vocab_size(),
            "max_token_len": 32,
            "num_inference_steps": num_steps,
        }
    )
    model = Pi05Model(config)
    init_pi05(model, seed)
    _disturb(model, seed + 1)
    state, actions = _statistics(seed)
    processor = Pi05Processor.create(config, tokenizer, state, actions, CAMERAS)
    return Pi05Policy(model, processor)


def tiny_groot(seed: int = 0, num_steps: int = 4) -> GrootPolicy:
    """GR00T N1.5 with two language layers of width 128 (2 / 1 heads), four DiT blocks of 128."""
    tokenizer = build_groot_tokenizer(PROMPTS)
    head = {
        "action_dim": 6,
        "action_horizon": 8,
        "backbone_embedding_dim": 128,
        "hidden_size": 64,
        "input_embedding_dim": 128,
        "max_state_dim": 8,
        "max_num_embodiments": 2,
        "max_seq_len": 16,
        "num_inference_timesteps": num_steps,
        "num_target_vision_tokens": 4,
        "diffusion_model_cfg": {
            "num_layers": 4,
            "num_attention_heads": 2,
            "attention_head_dim": 64,
            "cross_attention_dim": 128,
            "output_dim": 64,
            "interleave_self_attention": True,
        },
        "vl_self_attention_cfg": {
            "num_layers": 1,
            "num_attention_heads": 2,
            "attention_head_dim": 64,
        },
    }
    text = {
        "hidden_size": 128,
        "intermediate_size": 192,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 64,
        "vocab_size": tokenizer.get_vocab_size(),
    }
    config = GrootConfig.from_dict(
        {
            "model_type": "gr00t_n1_5",
            "action_dim": 6,
            "action_horizon": 8,
            "hidden_size": 128,
            "backbone_cfg": {"select_layer": 2, "project_to_dim": None},
            "action_head_cfg": head,
            "eagle_cfg": {
                "vision_config": _VISION,
                "text_config": text,
                "image_token_index": tokenizer.token_to_id(GROOT_IMAGE),
            },
        }
    )
    model = GrootModel(config)
    init_groot(model, seed)
    _disturb(model, seed + 1)
    state, actions = _statistics(seed)
    processor = GrootProcessor.create(config, tokenizer, state, actions, CAMERAS, embodiment_id=1)
    return GrootPolicy(model, processor)


TINY = {"pi05": tiny_pi05, "groot_n15": tiny_groot}


def tiny_observation(seed: int = 0, prompt: str = PROMPTS[0]) -> Observation:
    """A random observation that both tiny policies accept."""
    rng = np.random.default_rng(seed)
    shape = (IMAGE_SIZE, IMAGE_SIZE, 3)
    images = {name: rng.integers(0, 256, shape, dtype=np.uint8) for name in CAMERAS}
    state = rng.normal([0.0, 0.6, 0.2, 0.5], 0.1).astype(np.float32)
    return Observation(images, state, prompt)
