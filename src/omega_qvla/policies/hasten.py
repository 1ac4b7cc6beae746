"""Making a loaded policy as fast as this machine allows, whether or not it is quantized."""

from __future__ import annotations

import torch
from torch import nn

from omega_qvla.modules.dense import use_dense
from omega_qvla.modules.norm import use_compiled_norms
from omega_qvla.policies.base import Policy


@torch.no_grad()
def hasten(policy: Policy) -> None:
    """Prepare `policy` for inference with the weights that it has now, in place.

    What depends on the weights and the denoising steps alone (the modulations of the norms) is
    computed once; the rest is `hasten_module`. Results differ from before by rounding (1e-6).
    """
    policy.keep_conditioning()
    if policy.device.type == "cpu":
        hasten_module(policy.module)


def hasten_module(module: nn.Module) -> None:
    """Make a network on the CPU fast in float32, in place.

    Norms, gates, rotary embeddings and attention run in compiled kernels, where they are built;
    blocks of quantized layers, or of small unquantized ones, as one call; other linear layers
    that are not quantized on the faster of torch's products.
    """
    use_dense(module)
    use_compiled_norms(module)
    for part in module.modules():
        if hasattr(part, "fast"):
            setattr(part, "fast", True)  # noqa: B010 (a plain attribute, not a submodule)
        fuse = getattr(part, "fuse", None)
        if fuse is not None:
            fuse()
