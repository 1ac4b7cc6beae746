"""Making a loaded policy as fast as this machine allows, whether or not it is quantized."""

from __future__ import annotations

import torch

from omega_qvla.modules.dense import use_dense
from omega_qvla.policies.base import Policy


@torch.no_grad()
def hasten(policy: Policy) -> None:
    """Prepare `policy` for inference with the weights that it has now, in place.

    What depends on the weights and the denoising steps alone (the modulations of the norms) is
    computed once. On the CPU in float32, norms, gates, rotary embeddings and attention run in
    compiled kernels, where they are built, and the linear layers that are not quantized on the
    faster of torch's products. Results differ from before by rounding (1e-6).
    """
    policy.keep_conditioning()
    if policy.device.type != "cpu":
        return
    for module in policy.module.modules():
        if hasattr(module, "fast"):
            module.fast = True
        if hasattr(module, "fuse"):
            module.fuse()
    use_dense(policy.module)
