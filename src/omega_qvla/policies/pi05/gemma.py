"""The two Gemma stacks of pi0.5: the language model (prefix) and the action expert (suffix).

In both, which keys a query may see depends on the key alone: the prefix is one bidirectional
block, and every suffix token sees the valid prefix and the whole suffix. So the query heads
that share a key/value head are folded into the query axis, and keys are never repeated.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import gelu

from omega_qvla.modules.int8 import Int8Embedding
from omega_qvla.policies.attention import attend
from omega_qvla.policies.pi05.config import GemmaConfig

RMS_EPS = 1e-6
ROPE_THETA = 10000.0
MASKED = -2.3819763e38  # openpi's additive mask: large, yet finite in float32 and bfloat16


class Rope(NamedTuple):
    """Rotary tables for given positions: cos, sin [B, S, 1, head_dim / 2]."""

    cos: Tensor
    sin: Tensor

    @classmethod
    def at(cls, positions: Tensor, head_dim: int, dtype: torch.dtype) -> Rope:
        """Angles are taken in float32 for integer `positions` [B, S], then cast to `dtype`."""
        exponent = torch.arange(0, head_dim, 2, device=positions.device).float() / head_dim
        angle = positions[..., None, None].float() * ROPE_THETA**-exponent
        return cls(angle.cos().to(dtype), angle.sin().to(dtype))

    def rotate(self, x: Tensor) -> Tensor:
        """Rotate x [B, S, heads, head_dim], halves paired (not interleaved)."""
        a, b = x.chunk(2, dim=-1)
        return torch.cat((a * self.cos - b * self.sin, b * self.cos + a * self.sin), dim=-1)


class Modulation(NamedTuple):
    """What adaRMS does to one normalization: scale, shift, gate, [T, 1, width] each."""

    scale: Tensor
    shift: Tensor
    gate: Tensor


def rms_normalize(x: Tensor) -> Tensor:
    """x / rms(x) over the last axis, in float32."""
    wide = x.float()
    return wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + RMS_EPS)


class RMSNorm(nn.Module):
    """Gemma's RMSNorm: the weight is stored as its distance from one."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(width))

    def forward(self, x: Tensor) -> Tensor:
        return (rms_normalize(x) * (1.0 + self.weight.float())).to(x.dtype)


class AdaRMSNorm(nn.Module):
    """RMSNorm whose scale, shift and gate come from the flow time; `dense` is its only weight."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.dense = nn.Linear(width, 3 * width)

    def modulation(self, cond: Tensor) -> Modulation:
        """cond [T, width] -> scale, shift, gate, each [T, 1, width]."""
        return Modulation(*self.dense(cond.to(self.dense.weight.dtype))[:, None].chunk(3, -1))

    def forward(self, x: Tensor, modulation: Modulation) -> Tensor:
        scale, shift = modulation.scale.float(), modulation.shift.float()
        return (rms_normalize(x) * (1.0 + scale) + shift).to(x.dtype)


class Attention(nn.Module):
    """Grouped-query projections and the two ways they are attended with."""

    def __init__(self, config: GemmaConfig) -> None:
        super().__init__()
        self.head_dim, self.kv_heads = config.head_dim, config.num_kv_heads
        self.scale = config.head_dim**-0.5
        wide, narrow = (n * config.head_dim for n in (config.num_heads, config.num_kv_heads))
        self.q_proj = nn.Linear(config.width, wide, bias=False)
        self.k_proj = nn.Linear(config.width, narrow, bias=False)
        self.v_proj = nn.Linear(config.width, narrow, bias=False)
        self.o_proj = nn.Linear(wide, config.width, bias=False)

    def queries(self, x: Tensor, rope: Rope) -> Tensor:
        """x [B, S, width] -> [B, kv_heads, group * S, head_dim]."""
        batch, length = x.shape[:2]
        q = rope.rotate(self.q_proj(x).view(batch, length, -1, self.head_dim))
        q = q.view(batch, length, self.kv_heads, -1, self.head_dim)
        return q.permute(0, 2, 3, 1, 4).flatten(2, 3)

    def keys_values(self, x: Tensor, rope: Rope) -> tuple[Tensor, Tensor]:
        """x [B, S, width] -> K after RoPE and V, [B, kv_heads, S, head_dim] each."""
        heads = (*x.shape[:2], self.kv_heads, self.head_dim)
        k = rope.rotate(self.k_proj(x).view(heads))
        v: Tensor = self.v_proj(x).view(heads)
        return k.transpose(1, 2), v.transpose(1, 2)

    def output(self, attended: Tensor, length: int) -> Tensor:
        """[B, kv_heads, group * length, head_dim] -> [B, length, width]."""
        heads = attended.reshape(len(attended), self.kv_heads, -1, length, self.head_dim)
        out: Tensor = self.o_proj(heads.permute(0, 3, 1, 2, 4).flatten(2))
        return out

    def attend_prefix(
        self, x: Tensor, k: Tensor, v: Tensor, rope: Rope, bias: Tensor | None
    ) -> Tensor:
        """Bidirectional self-attention of the prefix x [B, S, width] over its own k, v.

        bias: None, or additive [B, 1, 1, S] that masks padded keys.
        """
        q = self.queries(x, rope)
        if bias is not None:
            bias = bias.to(q.dtype).expand(-1, 1, q.shape[2], -1)
        attended = attend(q, k, v, bias, scale=self.scale)
        return self.output(attended, x.shape[1])

    def attend_suffix(
        self, x: Tensor, cache: tuple[Tensor, Tensor], rope: Rope, bias: Tensor | None
    ) -> Tensor:
        """Attention of the suffix x [B*R, H, width] over a cached prefix and itself.

        cache: K, V [B, kv_heads, S, head_dim] of B observations; rows b*R .. b*R+R-1 of x
        belong to observation b, and share its cache without copying it.
        bias: None, or additive [B, 1, 1, S] that masks padded prefix keys.
        """
        q = self.queries(x, rope) * self.scale
        own_k, own_v = self.keys_values(x, rope)
        cached_k, cached_v = cache
        count, rows = len(cached_k), q.shape[2]
        old = (_fold(q, count) @ cached_k.mT).float()
        if bias is not None:
            old = old + bias
        scores = torch.cat((_unfold(old, rows), (q @ own_k.mT).float()), dim=-1)
        probabilities = scores.softmax(-1).to(x.dtype)
        size = cached_k.shape[2]
        attended = _unfold(_fold(probabilities[..., :size], count) @ cached_v, rows)
        return self.output(attended + probabilities[..., size:] @ own_v, x.shape[1])


def _fold(x: Tensor, count: int) -> Tensor:
    """[count*R, kv, rows, d] -> [count, kv, R*rows, d]: the samples of one observation."""
    _, kv, rows, size = x.shape
    return x.reshape(count, -1, kv, rows, size).transpose(1, 2).reshape(count, kv, -1, size)


def _unfold(x: Tensor, rows: int) -> Tensor:
    """The inverse of `_fold`."""
    count, kv, _, size = x.shape
    return x.reshape(count, kv, -1, rows, size).transpose(1, 2).reshape(-1, kv, rows, size)


class Mlp(nn.Module):
    """down(gelu_tanh(gate(x)) * up(x))."""

    def __init__(self, config: GemmaConfig) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(config.width, config.mlp_dim, bias=False)
        self.up_proj = nn.Linear(config.width, config.mlp_dim, bias=False)
        self.down_proj = nn.Linear(config.mlp_dim, config.width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        gate: Tensor = gelu(self.gate_proj(x), approximate="tanh")
        out: Tensor = self.down_proj(gate * self.up_proj(x))
        return out


class PrefixLayer(nn.Module):
    """One block of the language model."""

    def __init__(self, config: GemmaConfig) -> None:
        super().__init__()
        self.self_attn = Attention(config)
        self.mlp = Mlp(config)
        self.input_layernorm = RMSNorm(config.width)
        self.post_attention_layernorm = RMSNorm(config.width)

    def forward(
        self, x: Tensor, rope: Rope, bias: Tensor | None, *, only_cache: bool
    ) -> tuple[Tensor, Tensor, Tensor]:
        """-> (x, K, V); with `only_cache` the block stops at K and V and x is unchanged."""
        normed = self.input_layernorm(x)
        k, v = self.self_attn.keys_values(normed, rope)
        if only_cache:
            return x, k, v
        x = x + self.self_attn.attend_prefix(normed, k, v, rope, bias)
        return x + self.mlp(self.post_attention_layernorm(x)), k, v


class LanguageModel(nn.Module):
    """PaliGemma's Gemma: embeddings in, keys and values out."""

    def __init__(self, config: GemmaConfig, vocab_size: int) -> None:
        super().__init__()
        self.embed_tokens: nn.Embedding | Int8Embedding = nn.Embedding(vocab_size, config.width)
        self.layers = nn.ModuleList(PrefixLayer(config) for _ in range(config.depth))
        self.norm = RMSNorm(config.width)

    def embed(self, tokens: Tensor) -> Tensor:
        """Token ids [B, L] -> embeddings [B, L, width], times sqrt(width)."""
        x: Tensor = self.embed_tokens(tokens) * self.embed_tokens.embedding_dim**0.5
        return x

    def forward(
        self, x: Tensor, rope: Rope, bias: Tensor | None, *, full: bool = False
    ) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...], Tensor | None]:
        """Run the prefix x [B, S, width].

        The expert reads keys and values only, so the last block stops at them unless `full`
        asks for the final hidden state too.

        Returns:
            K (after RoPE) and V of every layer, [B, kv_heads, S, head_dim] each, and the
            final hidden state [B, S, width] or None.
        """
        keys, values = [], []
        last = len(self.layers) - 1
        for i, layer in enumerate(self.layers):
            x, k, v = layer(x, rope, bias, only_cache=i == last and not full)
            keys.append(k)
            values.append(v)
        return tuple(keys), tuple(values), self.norm(x) if full else None


class ExpertLayer(nn.Module):
    """One block of the action expert: adaRMS norms, gated residuals."""

    def __init__(self, config: GemmaConfig) -> None:
        super().__init__()
        self.self_attn = Attention(config)
        self.mlp = Mlp(config)
        self.input_layernorm = AdaRMSNorm(config.width)
        self.post_attention_layernorm = AdaRMSNorm(config.width)

    def forward(
        self,
        x: Tensor,
        cache: tuple[Tensor, Tensor],
        rope: Rope,
        bias: Tensor | None,
        modulations: tuple[Modulation, Modulation],
    ) -> Tensor:
        before, after = modulations
        attended = self.self_attn.attend_suffix(self.input_layernorm(x, before), cache, rope, bias)
        x = x + attended * before.gate.to(x.dtype)
        out: Tensor = self.mlp(self.post_attention_layernorm(x, after))
        return x + out * after.gate.to(x.dtype)


class Expert(nn.Module):
    """The action expert's stack."""

    def __init__(self, config: GemmaConfig) -> None:
        super().__init__()
        self.layers = nn.ModuleList(ExpertLayer(config) for _ in range(config.depth))
        self.norm = AdaRMSNorm(config.width)

    def modulations(self, cond: Tensor) -> tuple[Modulation, ...]:
        """cond [T, width] -> two modulations per layer, then that of the final norm."""
        norms: list[AdaRMSNorm] = []
        for layer in self.layers:
            assert isinstance(layer, ExpertLayer)
            norms += (layer.input_layernorm, layer.post_attention_layernorm)
        return tuple(norm.modulation(cond) for norm in (*norms, self.norm))

    def forward(
        self,
        x: Tensor,
        keys: tuple[Tensor, ...],
        values: tuple[Tensor, ...],
        rope: Rope,
        bias: Tensor | None,
        modulations: tuple[Modulation, ...],
    ) -> Tensor:
        """x [B*R, H, width] over the cached prefix -> normalized hidden state, same shape."""
        for i, layer in enumerate(self.layers):
            pair = (modulations[2 * i], modulations[2 * i + 1])
            x = layer(x, (keys[i], values[i]), rope, bias, pair)
        out: Tensor = self.norm(x, modulations[-1])
        return out
