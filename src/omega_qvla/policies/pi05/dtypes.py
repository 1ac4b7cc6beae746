"""Which parts of pi0.5 stay in float32 when the rest runs in 16 bits."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import nn

# Inside the two transformers, these stay float32 (openpi's gemma_pytorch.py,
# to_bfloat16_for_selected_params); so do the action and time projections outside of them.
_TRANSFORMERS = "paligemma_with_expert."
_KEPT = (
    "patch_embedding",
    "position_embedding",
    "input_layernorm",
    "post_attention_layernorm",
    "model.norm",
)


def runs_in_float32(name: str) -> bool:
    """Whether the parameter `name` of a `Pi05Model` stays float32 in 16-bit inference."""
    return not name.startswith(_TRANSFORMERS) or any(part in name for part in _KEPT)


def cast_for_inference(model: nn.Module, dtype: torch.dtype) -> None:
    """Cast the parameters of a `Pi05Model` in place as openpi does before inference.

    Norms, adaRMS, patches, positions, action and time projections become float32 whatever
    they were stored in; everything else becomes `dtype`.
    """
    for name, parameter in model.named_parameters():
        parameter.data = parameter.data.to(torch.float32 if runs_in_float32(name) else dtype)


def full_precision(device: torch.device) -> AbstractContextManager[object]:
    """Switch autocast off: flow time and the velocity need more digits than bfloat16 has."""
    if torch.amp.is_autocast_available(device.type) and torch.is_autocast_enabled(device.type):
        return torch.autocast(device.type, enabled=False)
    return nullcontext()
