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

from omega_qvla.kernels import rows
from omega_qvla.kernels.block import BlockShape
from omega_qvla.modules.block import WholeBlock
from omega_qvla.modules.int8 import Int8Embedding
from omega_qvla.modules.linear import quantized
from omega_qvla.modules.shared import project
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

    def rows(self, positions: Tensor) -> Rope:
        """The tables of `positions` [B, S], where these are of one sequence 0, 1, 2, ... Those
        before the first (masked tokens) have the first one's."""
        at = positions.clamp_min(0)
        return Rope(self.cos[0][at], self.sin[0][at])

    def rotate(self, x: Tensor, fast: bool = False) -> Tensor:
        """Rotate x [B, S, heads, head_dim], halves paired (not interleaved)."""
        turned = rows.rotate(x, self.cos, self.sin) if fast else None
        if turned is not None:
            return turned
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

    fast = False

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(width))

    def forward(self, x: Tensor) -> Tensor:
        fast = rows.rms_norm(x, RMS_EPS, self.weight, plus=1.0) if self.fast else None
        if fast is not None:
            return fast
        return (rms_normalize(x) * (1.0 + self.weight.float())).to(x.dtype)


class AdaRMSNorm(nn.Module):
    """RMSNorm whose scale, shift and gate come from the flow time; `dense` is its only weight."""

    fast = False

    def __init__(self, width: int) -> None:
        super().__init__()
        self.dense = nn.Linear(width, 3 * width)

    def modulation(self, cond: Tensor) -> Modulation:
        """cond [T, width] -> scale, shift, gate, each [T, 1, width]."""
        return Modulation(*self.dense(cond.to(self.dense.weight.dtype))[:, None].chunk(3, -1))

    def forward(self, x: Tensor, modulation: Modulation) -> Tensor:
        scale, shift = modulation.scale.float(), modulation.shift.float()
        fast = rows.rms_norm(x, RMS_EPS, scale, shift, plus=1.0) if self.fast else None
        if fast is not None:
            return fast
        return (rms_normalize(x) * (1.0 + scale) + shift).to(x.dtype)


class Attention(nn.Module):
    """Grouped-query projections and the two ways they are attended with."""

    fast = False

    def __init__(self, config: GemmaConfig) -> None:
        super().__init__()
        self.head_dim, self.kv_heads = config.head_dim, config.num_kv_heads
        self.scale = config.head_dim**-0.5
        wide, narrow = (n * config.head_dim for n in (config.num_heads, config.num_kv_heads))
        self.q_proj = nn.Linear(config.width, wide, bias=False)
        self.k_proj = nn.Linear(config.width, narrow, bias=False)
        self.v_proj = nn.Linear(config.width, narrow, bias=False)
        self.o_proj = nn.Linear(wide, config.width, bias=False)

    def queries_keys_values(self, x: Tensor, rope: Rope) -> tuple[Tensor, Tensor, Tensor]:
        """x [B, S, width] -> Q and K after RoPE, and V: [B, S, heads, head_dim] each."""
        q, k, v = project(x, self.q_proj, self.k_proj, self.v_proj)
        return self._rotated(q, rope), self._rotated(k, rope), self._heads(v)

    def keys_values(self, x: Tensor, rope: Rope) -> tuple[Tensor, Tensor]:
        """x [B, S, width] -> K after RoPE and V, [B, S, kv_heads, head_dim] each."""
        k, v = project(x, self.k_proj, self.v_proj)
        return self._rotated(k, rope), self._heads(v)

    def _heads(self, x: Tensor) -> Tensor:
        return x.view(*x.shape[:2], -1, self.head_dim)

    def _rotated(self, x: Tensor, rope: Rope) -> Tensor:
        return rope.rotate(self._heads(x), self.fast)

    def _fold_heads(self, q: Tensor) -> Tensor:
        """Q [B, S, heads, head_dim] -> [B, kv_heads, group * S, head_dim]."""
        q = q.view(*q.shape[:2], self.kv_heads, -1, self.head_dim)
        return q.permute(0, 2, 3, 1, 4).flatten(2, 3)

    def _unfold_heads(self, attended: Tensor, length: int) -> Tensor:
        """[B, kv_heads, group * length, head_dim] -> [B, length, heads * head_dim]."""
        heads = attended.reshape(len(attended), self.kv_heads, -1, length, self.head_dim)
        return heads.permute(0, 3, 1, 2, 4).flatten(2)

    def attend_prefix(self, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None) -> Tensor:
        """Bidirectional self-attention of the prefix: q, k, v as `queries_keys_values` has them.

        bias: None, or additive [B, 1, 1, S] that masks padded keys. -> [B, S, width].
        """
        keys = (k.transpose(1, 2), v.transpose(1, 2))
        attended = None
        if self.fast and bias is None:
            attended = rows.attend(
                q.transpose(1, 2), keys, scale=self.scale, exact=not quantized(self.q_proj)
            )
        if attended is None:
            folded = self._fold_heads(q)
            if bias is not None:
                bias = bias.to(q.dtype).expand(-1, 1, folded.shape[2], -1)
            out = attend(folded, *keys, bias, scale=self.scale)
            attended = self._unfold_heads(out, q.shape[1])
        projected: Tensor = self.o_proj(attended)
        return projected

    def attend_suffix(
        self, x: Tensor, cache: tuple[Tensor, Tensor], rope: Rope, bias: Tensor | None
    ) -> Tensor:
        """Attention of the suffix x [B*R, H, width] over a cached prefix and itself.

        cache: K, V [B, kv_heads, S, head_dim] of B observations; rows b*R .. b*R+R-1 of x
        belong to observation b, and share its cache without copying it.
        bias: None, or additive [B, 1, 1, S] that masks padded prefix keys.
        """
        q, k, v = self.queries_keys_values(x, rope)
        own = (k.transpose(1, 2), v.transpose(1, 2))
        attended = None
        if self.fast and bias is None:
            attended = rows.attend(
                q.transpose(1, 2), cache, own, scale=self.scale, exact=not quantized(self.q_proj)
            )
        if attended is None:
            out = self._attend_both(self._fold_heads(q) * self.scale, cache, own, bias)
            attended = self._unfold_heads(out.to(x.dtype), x.shape[1])
        projected: Tensor = self.o_proj(attended)
        return projected

    @staticmethod
    def _attend_both(
        q: Tensor,
        cache: tuple[Tensor, Tensor],
        own: tuple[Tensor, Tensor],
        bias: Tensor | None,
    ) -> Tensor:
        """Scaled q [B*R, kv_heads, rows, head_dim] over both sets of keys, same shape."""
        (cached_k, cached_v), (own_k, own_v) = cache, own
        count, rows_ = len(cached_k), q.shape[2]
        old = (_fold(q, count) @ cached_k.mT).float()
        if bias is not None:
            old = old + bias
        scores = torch.cat((_unfold(old, rows_), (q @ own_k.mT).float()), dim=-1)
        probabilities = scores.softmax(-1).to(q.dtype)
        size = cached_k.shape[2]
        attended = _unfold(_fold(probabilities[..., :size], count) @ cached_v, rows_)
        return attended + probabilities[..., size:] @ own_v


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

    fast = False

    def __init__(self, config: GemmaConfig) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(config.width, config.mlp_dim, bias=False)
        self.up_proj = nn.Linear(config.width, config.mlp_dim, bias=False)
        self.down_proj = nn.Linear(config.mlp_dim, config.width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        gate, up = project(x, self.gate_proj, self.up_proj)
        active = rows.gated("gelu", gate, up) if self.fast else None
        out: Tensor = self.down_proj(
            gelu(gate, approximate="tanh") * up if active is None else active
        )
        return out


class PrefixLayer(nn.Module):
    """One block of the language model."""

    fast = False

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
        if only_cache:
            k, v = self.self_attn.keys_values(normed, rope)
            return x, *_cached(k, v)
        q, k, v = self.self_attn.queries_keys_values(normed, rope)
        x = self._add(x, self.self_attn.attend_prefix(q, k, v, bias))
        return self._add(x, self.mlp(self.post_attention_layernorm(x))), *_cached(k, v)

    def _add(self, x: Tensor, branch: Tensor) -> Tensor:
        done = rows.residual(x, branch) if self.fast else None
        return x + branch if done is None else done


def _cached(k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """[B, S, kv_heads, head_dim] as the cache holds them. V may be a part of a joint product's
    result: a copy lets go of the rest."""
    own = rows.joined(v.flatten(2))
    v = v.contiguous() if own is None else own.view(v.shape)
    return k.transpose(1, 2), v.transpose(1, 2)


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

    fast = False

    def __init__(self, config: GemmaConfig) -> None:
        super().__init__()
        self.self_attn = Attention(config)
        self.mlp = Mlp(config)
        self.input_layernorm = AdaRMSNorm(config.width)
        self.post_attention_layernorm = AdaRMSNorm(config.width)
        self.whole: WholeBlock | None = None

    def fuse(self) -> None:
        """Run as one native call from now on, where the layers that it has now allow it."""
        attention, mlp = self.self_attn, self.mlp
        groups = (
            (attention.q_proj, attention.k_proj, attention.v_proj),
            (attention.o_proj,),
            (mlp.gate_proj, mlp.up_proj),
            (mlp.down_proj,),
        )
        dim, kv_heads = attention.head_dim, attention.kv_heads
        heads = attention.o_proj.in_features // dim
        shape = BlockShape(heads, kv_heads, dim, RMS_EPS, "rms", "gelu", gated=True)
        self.whole = WholeBlock.of(groups, shape)

    def forward(
        self,
        x: Tensor,
        cache: tuple[Tensor, Tensor],
        rope: Rope,
        bias: Tensor | None,
        modulations: tuple[Modulation, Modulation],
    ) -> Tensor:
        before, after = modulations
        if self.whole is not None and bias is None:
            done = self.whole(x, before, after, cache, rope)
            if done is not None:
                return done
        attended = self.self_attn.attend_suffix(self.input_layernorm(x, before), cache, rope, bias)
        x = self._add(x, attended, before.gate)
        out: Tensor = self.mlp(self.post_attention_layernorm(x, after))
        return self._add(x, out, after.gate)

    def _add(self, x: Tensor, branch: Tensor, gate: Tensor) -> Tensor:
        done = rows.residual(x, branch, gate) if self.fast else None
        return x + branch * gate.to(x.dtype) if done is None else done


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
