"""Attention, fused or spelled out, whichever is faster where it runs."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from omega_qvla.kernels import rows


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None = None,
    causal: bool = False,
    scale: float | None = None,
) -> Tensor:
    """softmax(q k^T / sqrt(head_dim)) v, with the softmax in float32.

    On CPUs in 16 bit the plain products are twice as fast as torch's fused kernel forward and
    ten times as fast backward (torch 2.13); everywhere else the fused kernel is used.

    Args:
        q: [B, heads, Q, head_dim].
        k, v: [B, kv_heads, L, head_dim]; each serves heads / kv_heads consecutive heads of q.
        mask: broadcastable to [B, heads, Q, L]; bool (True where a key is attended) or
            floating (added to the scores).
        causal: query i attends keys 0..i; not together with a mask.
        scale: of the scores; head_dim ** -0.5 by default.
    """
    group = q.shape[1] // k.shape[1]
    if v.device.type != "cpu" or v.dtype == torch.float32:
        return scaled_dot_product_attention(
            q, k, v, attn_mask=mask, is_causal=causal, scale=scale, enable_gqa=group > 1
        )
    if group > 1:
        k, v = k.repeat_interleave(group, dim=1), v.repeat_interleave(group, dim=1)
    if causal:
        mask = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool, device=q.device).tril()
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    scores = ((q * scale) @ k.mT).float()
    if mask is not None and mask.dtype == torch.bool:
        scores = scores.masked_fill(~mask, -torch.inf)
    elif mask is not None:
        scores = scores + mask
    attended: Tensor = scores.softmax(-1).to(v.dtype) @ v
    return attended


def attend_heads(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None = None,
    causal: bool = False,
    scale: float | None = None,
    *,
    fast: bool = False,
    exact: bool = True,
) -> Tensor:
    """`attend` with the heads side by side, as the next layer reads them: [B, Q, heads * dim].

    fast: with the compiled kernel, where it takes such tensors and no mask is given.
    exact: see `kernels.rows.attend`.
    """
    if fast and mask is None:
        factor = q.shape[-1] ** -0.5 if scale is None else scale
        out = rows.attend(q, (k, v), scale=factor, causal=causal, exact=exact)
        if out is not None:
            return out
    return attend(q, k, v, mask, causal, scale).transpose(1, 2).flatten(2)
