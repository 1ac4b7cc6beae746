"""Initial weights for training a pi0.5 model from scratch."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from omega_qvla.policies.pi05.gemma import AdaRMSNorm, RMSNorm
from omega_qvla.policies.pi05.model import Pi05Model

# Linear layers that write to a residual stream: scaled down with depth, so that the stream's
# variance does not grow with the number of blocks.
_RESIDUAL_OUTPUTS = ("o_proj", "out_proj", "down_proj", "fc2")


def init_weights(model: Pi05Model, seed: int) -> None:
    """Overwrite every parameter of `model` in place; equal seeds give equal weights.

    Linear layers are normal with variance 1 / fan_in (times 1 / (2 depth) where they write to
    a residual stream), biases zero. Token embeddings get 1 / sqrt(width), because the model
    multiplies them by sqrt(width). RMSNorm starts as the identity. adaRMS starts with scale
    and shift zero and **gates one** (the bias of the gate's third), not at zero gates: as a
    plain pre-norm network, which trains from scratch without waiting for its gates to open.
    """
    generator = torch.Generator().manual_seed(seed)

    def normal_(tensor: Tensor, std: float) -> None:
        # Drawn on the CPU, so that the weights do not depend on the device.
        tensor.copy_(torch.randn(tensor.shape, generator=generator) * std)

    vision, language, expert = model.vision, model.language_model, model.expert
    depths = {"vision": len(vision.encoder.layers), "gemma": len(language.layers)}
    with torch.no_grad():
        for name, module in model.named_modules():
            if isinstance(module, nn.Linear | nn.Conv2d):
                std = module.weight[0].numel() ** -0.5
                if name.rsplit(".", 1)[-1] in _RESIDUAL_OUTPUTS:
                    depth = depths["vision" if "vision_tower" in name else "gemma"]
                    std /= math.sqrt(2 * depth)
                normal_(module.weight, std)
                if module.bias is not None:
                    module.bias.zero_()
            elif isinstance(module, nn.LayerNorm):
                module.weight.fill_(1)
                module.bias.zero_()
            elif isinstance(module, RMSNorm):
                module.weight.zero_()
        normal_(language.embed_tokens.weight, language.embed_tokens.embedding_dim**-0.5)
        normal_(vision.embeddings.position_embedding.weight, 0.02)
        for norm in (m for m in expert.modules() if isinstance(m, AdaRMSNorm)):
            width = norm.dense.in_features
            normal_(norm.dense.weight, 0.02)
            norm.dense.bias[2 * width :].fill_(1)
        # A zero head predicts the mean velocity at first: the smallest loss of any fixed start.
        model.action_out_proj.weight.zero_()
