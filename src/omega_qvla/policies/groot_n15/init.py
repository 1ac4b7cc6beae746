"""Initial weights for training from scratch."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from omega_qvla.policies.groot_n15.dit import AdaLayerNorm
from omega_qvla.policies.groot_n15.embodiment import CategoryLinear
from omega_qvla.policies.groot_n15.model import GrootModel

_RESIDUAL_OUTPUTS = ("out_proj", "fc2", "o_proj", "down_proj", "to_out.0", "ff.net.2")
"""Layers that add to a residual stream."""


def _normal(weight: Tensor, std: float, generator: torch.Generator) -> None:
    values = torch.randn(weight.shape, generator=generator)
    with torch.no_grad():
        weight.copy_(values * std)


def _zero_bias(module: nn.Module) -> None:
    bias = getattr(module, "bias", None)
    if isinstance(bias, Tensor):
        nn.init.zeros_(bias)


def _stack_depth(model: GrootModel, name: str) -> int:
    """How many layers the residual stream around the layer `name` has."""
    parts = name.split(".")
    for i, part in enumerate(parts):
        if part.isdigit() and parts[i - 1] in ("layers", "transformer_blocks"):
            return len(list(model.get_submodule(".".join(parts[:i])).children()))
    return 1


def init_weights(model: GrootModel, seed: int) -> None:
    """Fill `model` with initial weights, reproducibly.

    Normal with variance 1/fan-in; residual outputs divided by sqrt(2 x depth), so that the
    stream keeps its size; modulations near zero, so that blocks start as plain pre-norm ones;
    a small last decoder layer, so that the first velocities are near zero.
    """
    generator = torch.Generator().manual_seed(seed)
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear | nn.Conv2d):
            std = module.weight[0].numel() ** -0.5
            if name.endswith(_RESIDUAL_OUTPUTS):
                std /= (2 * _stack_depth(model, name)) ** 0.5
            _normal(module.weight, std, generator)
            _zero_bias(module)
        elif isinstance(module, nn.Embedding):
            _normal(module.weight, 0.3, generator)
        elif isinstance(module, CategoryLinear):
            _normal(module.W, module.W.shape[1] ** -0.5, generator)
            nn.init.zeros_(module.b)
        elif isinstance(getattr(module, "weight", None), nn.Parameter):
            nn.init.ones_(module.weight)
            _zero_bias(module)
    modulations = [m.linear for m in model.modules() if isinstance(m, AdaLayerNorm)]
    near_zero = [layer.weight for layer in (*modulations, model.action_head.model.proj_out_1)]
    near_zero.append(model.action_head.action_decoder.layer2.W)
    with torch.no_grad():
        for weight in near_zero:
            weight.mul_(0.1)
