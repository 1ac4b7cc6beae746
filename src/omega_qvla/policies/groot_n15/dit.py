"""The diffusion transformer: AdaLN blocks alternating cross- and self-attention."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn.functional import layer_norm, silu

from omega_qvla.kernels import rows
from omega_qvla.kernels.block import BlockShape
from omega_qvla.modules.block import WholeBlock
from omega_qvla.modules.shared import project
from omega_qvla.policies.groot_n15.blocks import (
    Attention,
    FeedForward,
    KeyValue,
    layer_groups,
)
from omega_qvla.policies.groot_n15.config import TransformerConfig
from omega_qvla.policies.groot_n15.embodiment import action_time_code

TIME_CHANNELS = 256


def timestep_code(buckets: Tensor) -> Tensor:
    """[cos | sin] of bucket * 10000^(-i / 127), i = 0..127, float32 [N, 256]."""
    half = TIME_CHANNELS // 2
    index = torch.arange(half, dtype=torch.float32, device=buckets.device)
    angles = buckets.float()[:, None] * torch.exp(index * (-math.log(10000.0) / (half - 1)))
    return torch.cat([angles.cos(), angles.sin()], dim=-1)


class TimestepEmbedder(nn.Module):
    """Linear, SiLU, Linear."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.linear_1 = nn.Linear(TIME_CHANNELS, width)
        self.linear_2 = nn.Linear(width, width)

    def forward(self, code: Tensor) -> Tensor:
        out: Tensor = self.linear_2(silu(self.linear_1(code)))
        return out


class TimestepEncoder(nn.Module):
    """Time buckets [N] to embeddings [N, width]."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.timestep_embedder = TimestepEmbedder(width)

    def forward(self, buckets: Tensor, dtype: torch.dtype) -> Tensor:
        out: Tensor = self.timestep_embedder(timestep_code(buckets).to(dtype))
        return out


def modulated_norm(x: Tensor, scale: Tensor, shift: Tensor, eps: float) -> Tensor:
    """LayerNorm(x) * (1 + scale) + shift.

    Args:
        x: [N, T, D].
        scale, shift: [N, D], or [1, D] for all (then one fused call).
    """
    gain, shift = (1 + scale).to(x.dtype), shift.to(x.dtype)
    width = (x.shape[-1],)
    if gain.shape[0] == 1:
        return layer_norm(x, width, gain[0], shift[0], eps)
    normed = layer_norm(x, width, eps=eps)
    return torch.addcmul(shift[:, None], normed, gain[:, None])


class AdaLayerNorm(nn.Module):
    """LayerNorm (no weights, eps 1e-5) whose scale and shift come from the time embedding."""

    fast = False

    def __init__(self, width: int) -> None:
        super().__init__()
        self.linear = nn.Linear(width, 2 * width)

    def modulation(self, activated: Tensor) -> tuple[Tensor, Tensor]:
        """(scale, shift), in this order, each [N, width], from SiLU(temb) [N, width]."""
        scale, shift = self.linear(activated).chunk(2, dim=-1)
        return scale, shift

    def forward(self, x: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
        fast = rows.layer_norm(x, 1e-5, scale, shift) if self.fast else None
        return modulated_norm(x, scale, shift, 1e-5) if fast is None else fast


@dataclass(frozen=True)
class StepConditioning:
    """All that depends on the denoising time alone, for N times at once.

    Attributes:
        buckets: int64 [N].
        tau: [N, width], the action encoder's time code.
        scales, shifts: [blocks, N, width], of each block's norm1.
        out_shift, out_scale: [N, width], of proj_out_1.
        time: [embodiments, 1, width], the action encoder's share of tau (N = 1), or None: it is
            computed as it is needed.
    """

    buckets: Tensor
    tau: Tensor
    scales: Tensor
    shifts: Tensor
    out_shift: Tensor
    out_scale: Tensor
    time: Tensor | None = None

    def at(self, step: int) -> StepConditioning:
        """The conditioning of one step (N = 1), which applies to the whole batch."""
        one = slice(step, step + 1)
        return StepConditioning(
            self.buckets[one],
            self.tau[one],
            self.scales[:, one],
            self.shifts[:, one],
            self.out_shift[one],
            self.out_scale[one],
        )


class DiTBlock(nn.Module):
    """Attention to the VL features (`cross`) or among the tokens, then feed-forward."""

    def __init__(self, config: TransformerConfig, cross: bool) -> None:
        super().__init__()
        width = config.inner_dim
        context = (config.cross_attention_dim or width) if cross else width
        self.cross = cross
        self.norm1 = AdaLayerNorm(width)
        self.attn1 = Attention(
            width, context, config.num_attention_heads, config.attention_head_dim
        )
        self.ff = FeedForward(width)
        self.whole: WholeBlock | None = None

    def fuse(self) -> None:
        """Run as one native call from now on, where the layers that it has now allow it."""
        heads, dim = self.attn1.heads, self.attn1.head_dim
        shape = BlockShape(heads, heads, dim, 1e-5, "layer", "gelu", cross=self.cross)
        self.whole = WholeBlock.of(layer_groups(self.attn1, self.ff, self.cross), shape)

    def forward(
        self,
        x: Tensor,
        scale: Tensor,
        shift: Tensor,
        key_value: KeyValue | None,
        mask: Tensor | None = None,
        keep: int | None = None,
    ) -> Tensor:
        """x [N, T, D] to [N, T, D].

        Args:
            key_value: keys and values of the VL features (cross blocks only).
            mask: bool [B, 1, 1, L] over the VL features (cross blocks only).
            keep: compute only the last `keep` tokens' outputs: [N, keep, D].
        """
        if keep is not None and self.cross:
            x, keep = x[:, -keep:].contiguous(), None
        if self.whole is not None and mask is None:
            modulation = (scale, shift, None)
            done = self.whole(x, modulation, (None, None, None), key_value, keep=keep)
            if done is not None:
                return done
        normed = self.norm1(x, scale, shift)
        if key_value is None:
            attended = self.attn1.attend_self(normed, keep)
        else:
            attended = self.attn1(normed, key_value, mask)
        x = (x if keep is None else x[:, -keep:]) + attended
        normed = rows.layer_norm(x, 1e-5) if self.norm1.fast else None
        if normed is None:
            normed = layer_norm(x, (x.shape[-1],), eps=1e-5)
        out: Tensor = x + self.ff(normed)
        return out


class DiT(nn.Module):
    """The whole transformer; even blocks cross-attend, odd ones self-attend."""

    fast = False

    def __init__(self, config: TransformerConfig, output_dim: int) -> None:
        super().__init__()
        width = config.inner_dim
        self.width = width
        self.timestep_encoder = TimestepEncoder(width)
        self.transformer_blocks = nn.ModuleList(
            DiTBlock(config, cross=not (config.interleave_self_attention and i % 2 == 1))
            for i in range(config.num_layers)
        )
        self.proj_out_1 = nn.Linear(width, 2 * width)
        self.proj_out_2 = nn.Linear(width, output_dim)

    @property
    def blocks(self) -> tuple[DiTBlock, ...]:
        return tuple(cast(Iterable[DiTBlock], self.transformer_blocks))

    def conditioning(self, buckets: Tensor, dtype: torch.dtype) -> StepConditioning:
        """Time conditioning of buckets [N], for a trajectory's steps or a training batch."""
        activated = silu(self.timestep_encoder(buckets, dtype))
        pairs = [block.norm1.modulation(activated) for block in self.blocks]
        out_shift, out_scale = self.proj_out_1(activated).chunk(2, dim=-1)
        return StepConditioning(
            buckets=buckets,
            tau=action_time_code(buckets, self.width).to(dtype),
            scales=torch.stack([scale for scale, _ in pairs]),
            shifts=torch.stack([shift for _, shift in pairs]),
            out_shift=out_shift,
            out_scale=out_scale,
        )

    def cross_key_values(self, features: Tensor) -> tuple[KeyValue | None, ...]:
        """Per block, keys and values of the VL features [B, L, D]; None for self-attention.

        All cross blocks read the same features.
        """
        crossing = [block.attn1 for block in self.blocks if block.cross]
        readers = [layer for attention in crossing for layer in (attention.to_k, attention.to_v)]
        projected = iter(project(features, *readers))
        return tuple(
            self._key_value(block.attn1, next(projected), next(projected)) if block.cross else None
            for block in self.blocks
        )

    @staticmethod
    def _key_value(attention: Attention, keys: Tensor, values: Tensor) -> KeyValue:
        # Contiguous, or every step would step over the other blocks' keys.
        k, v = rows.joined(keys), rows.joined(values)
        k = keys.contiguous() if k is None else k
        return attention.split(k), attention.split(values.contiguous() if v is None else v)

    def forward(
        self,
        tokens: Tensor,
        key_values: tuple[KeyValue | None, ...],
        conditioning: StepConditioning,
        mask: Tensor | None = None,
        keep: int | None = None,
    ) -> Tensor:
        """tokens [N, T, width] to [N, T or keep, output_dim].

        Args:
            key_values: from `cross_key_values`; N must be a multiple of their batch.
            conditioning: of one time for all, or of N times.
            mask: bool [B, 1, 1, L], True where a VL feature may be attended.
            keep: how many of the last tokens the caller needs; the last block computes no more.
        """
        last = len(self.blocks) - 1
        x = tokens
        for i, block in enumerate(self.blocks):
            scale, shift = conditioning.scales[i], conditioning.shifts[i]
            kept = keep if i == last else None
            x = block(x, scale, shift, key_values[i], mask, kept)
        scale, shift = conditioning.out_scale, conditioning.out_shift
        normed = rows.layer_norm(x, 1e-6, scale, shift) if self.fast else None
        x = modulated_norm(x, scale, shift, 1e-6) if normed is None else normed
        out: Tensor = self.proj_out_2(x)
        return out
