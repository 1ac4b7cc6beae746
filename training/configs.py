"""Sizes of the two demo policies: the originals' architectures, small.

Every width that is quantized is a multiple of 64.
"""

from __future__ import annotations

from omega_qvla.policies.groot_n15.config import GrootConfig
from omega_qvla.policies.pi05.config import Pi05Config

IMAGE_SIZE = 80
PATCH_SIZE = 16
IMAGE_TOKENS = (IMAGE_SIZE // PATCH_SIZE) ** 2


def pi05_config(vocab_size: int, max_token_len: int) -> Pi05Config:
    """pi0.5: SigLIP 192 x 4, language model 256 x 4, expert 192 x 4, 10 denoising steps."""
    heads = {"depth": 4, "num_heads": 4, "num_kv_heads": 1, "head_dim": 64}
    return Pi05Config.from_dict(
        {
            "action_dim": 8,
            "action_horizon": 10,
            "paligemma_variant": {"width": 256, "mlp_dim": 768, **heads},
            "action_expert_variant": {"width": 192, "mlp_dim": 576, **heads},
            "precision": "bfloat16",
            "vision": {
                "hidden_size": 192,
                "intermediate_size": 768,
                "num_hidden_layers": 4,
                "num_attention_heads": 4,
                "image_size": IMAGE_SIZE,
                "patch_size": PATCH_SIZE,
            },
            "vocab_size": vocab_size,
            "max_token_len": max_token_len,
        }
    )


def groot_config(vocab_size: int, image_token: int) -> GrootConfig:
    """GR00T N1.5: SigLIP 192 x 4, Qwen3 256 x 4, one VL block, DiT 192 x 4, 4 denoising steps."""
    head = {
        "action_dim": 8,
        "action_horizon": 16,
        "backbone_embedding_dim": 256,
        "hidden_size": 192,
        "input_embedding_dim": 192,
        "max_state_dim": 16,
        "max_num_embodiments": 2,
        "max_seq_len": 32,
        "num_inference_timesteps": 4,
        "num_target_vision_tokens": 8,
        "diffusion_model_cfg": {
            "num_layers": 4,
            "num_attention_heads": 4,
            "attention_head_dim": 48,
            "cross_attention_dim": 256,
            "output_dim": 192,
            "interleave_self_attention": True,
            "norm_type": "ada_norm",
            "positional_embeddings": None,
        },
        "vl_self_attention_cfg": {
            "num_layers": 1,
            "num_attention_heads": 4,
            "attention_head_dim": 64,
            "positional_embeddings": None,
        },
    }
    eagle = {
        "vision_config": {
            "hidden_size": 192,
            "intermediate_size": 768,
            "num_hidden_layers": 4,
            "num_attention_heads": 4,
            "image_size": IMAGE_SIZE,
            "patch_size": PATCH_SIZE,
        },
        "text_config": {
            "hidden_size": 256,
            "intermediate_size": 768,
            "num_hidden_layers": 4,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "head_dim": 64,
            "vocab_size": vocab_size,
        },
        "image_token_index": image_token,
    }
    return GrootConfig.from_dict(
        {
            "model_type": "gr00t_n1_5",
            "action_dim": 8,
            "action_horizon": 16,
            "hidden_size": 256,
            "torch_dtype": "bfloat16",
            "backbone_cfg": {"select_layer": 4, "project_to_dim": None},
            "action_head_cfg": head,
            "eagle_cfg": eagle,
        }
    )
