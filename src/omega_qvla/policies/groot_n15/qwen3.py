"""The Qwen3 language model, truncated after its first layers, as GR00T N1.5 uses it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import silu

from omega_qvla.kernels import rows
from omega_qvla.kernels.block import BlockShape
from omega_qvla.modules.block import WholeBlock, norm_rows
from omega_qvla.modules.linear import quantized
from omega_qvla.modules.shared import project
from omega_qvla.policies.attention import attend_heads
from omega_qvla.policies.groot_n15.config import Qwen3Config


class RMSNorm(nn.Module):
    """x / rms(x) * weight over the last dimension, computed in float32."""

    fast = False

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        fast = rows.rms_norm(x, self.eps, self.weight) if self.fast else None
        if fast is not None:
            return fast
        wide = x.float()
        normed = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.eps)
        out: Tensor = self.weight * normed.to(x.dtype)
        return out


def rotary_table(length: int, head_dim: int, theta: float, device: torch.device) -> Tensor:
    """cos and sin of the rotary angles, float32 [2, length, head_dim] (half-split layout)."""
    pairs = torch.arange(0, head_dim, 2, dtype=torch.float32, device=device)
    frequencies = 1.0 / theta ** (pairs / head_dim)
    angles = torch.arange(length, dtype=torch.float32, device=device)[:, None] * frequencies
    angles = torch.cat([angles, angles], dim=-1)
    return torch.stack([angles.cos(), angles.sin()])


class Rotary(NamedTuple):
    """The rotary angles of one length.

    full: `rotary_table`; cos, sin: its halves, contiguous [length, head_dim / 2], as the compiled
    kernels take them.
    """

    full: Tensor
    cos: Tensor
    sin: Tensor

    @classmethod
    def of(cls, length: int, head_dim: int, theta: float, device: torch.device) -> Rotary:
        full = rotary_table(length, head_dim, theta, device)
        return cls(full, *full[:, :, : head_dim // 2].contiguous())


def rotate(x: Tensor, table: Rotary, fast: bool = False) -> Tensor:
    """Apply the rotary `table` of L positions to x [B, L, heads, head_dim]."""
    if fast:
        turned = rows.rotate(x, table.cos, table.sin)
        if turned is not None:
            return turned
    cos, sin = table.full.to(x.dtype)[:, :, None]
    first, second = x.chunk(2, dim=-1)
    out: Tensor = x * cos + torch.cat([-second, first], dim=-1) * sin
    return out


class Qwen3Attention(nn.Module):
    """Grouped-query attention with RMSNorm on each head's q and k before the rotation."""

    fast = False

    def __init__(self, config: Qwen3Config) -> None:
        super().__init__()
        width, dim, bias = config.hidden_size, config.head_dim, config.attention_bias
        self.head_dim = dim
        self.q_proj = nn.Linear(width, config.num_attention_heads * dim, bias=bias)
        self.k_proj = nn.Linear(width, config.num_key_value_heads * dim, bias=bias)
        self.v_proj = nn.Linear(width, config.num_key_value_heads * dim, bias=bias)
        self.o_proj = nn.Linear(config.num_attention_heads * dim, width, bias=bias)
        self.q_norm = RMSNorm(dim, config.rms_norm_eps)
        self.k_norm = RMSNorm(dim, config.rms_norm_eps)

    def keys_values(self, x: Tensor, table: Rotary) -> tuple[Tensor, Tensor]:
        """Keys and values of x [B, L, D], each [B, kv_heads, L, head_dim]."""
        heads = (*x.shape[:-1], -1, self.head_dim)
        k, v = project(x, self.k_proj, self.v_proj)
        k = rotate(self.k_norm(k.view(heads)), table, self.fast)
        return k.transpose(1, 2), v.view(heads).transpose(1, 2)

    def forward(self, x: Tensor, table: Rotary, mask: Tensor | None) -> Tensor:
        """x [B, L, D]; mask bool [B, 1, L, L] (True: attend) or None for plain causal."""
        heads = (*x.shape[:-1], -1, self.head_dim)
        q, k, v = project(x, self.q_proj, self.k_proj, self.v_proj)
        q = rotate(self.q_norm(q.view(heads)), table, self.fast).transpose(1, 2)
        k = rotate(self.k_norm(k.view(heads)), table, self.fast).transpose(1, 2)
        v = v.view(heads).transpose(1, 2)
        exact = not quantized(self.q_proj)
        attended = attend_heads(q, k, v, mask, causal=mask is None, fast=self.fast, exact=exact)
        out: Tensor = self.o_proj(attended)
        return out


class Qwen3MLP(nn.Module):
    """down(silu(gate(x)) * up(x))."""

    fast = False

    def __init__(self, config: Qwen3Config) -> None:
        super().__init__()
        width, inner = config.hidden_size, config.intermediate_size
        self.gate_proj = nn.Linear(width, inner, bias=False)
        self.up_proj = nn.Linear(width, inner, bias=False)
        self.down_proj = nn.Linear(inner, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        gate, up = project(x, self.gate_proj, self.up_proj)
        active = rows.gated("silu", gate, up) if self.fast else None
        out: Tensor = self.down_proj(silu(gate) * up if active is None else active)
        return out


class Qwen3Layer(nn.Module):
    """One pre-norm decoder layer."""

    def __init__(self, config: Qwen3Config) -> None:
        super().__init__()
        self.self_attn = Qwen3Attention(config)
        self.mlp = Qwen3MLP(config)
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.whole: WholeBlock | None = None

    def fuse(self) -> None:
        """Run as one call from now on, where the layers that it has now allow it."""
        attention, mlp = self.self_attn, self.mlp
        groups = (
            (attention.q_proj, attention.k_proj, attention.v_proj),
            (attention.o_proj,),
            (mlp.gate_proj, mlp.up_proj),
            (mlp.down_proj,),
        )
        dim, eps = attention.head_dim, self.input_layernorm.eps
        heads, kv_heads = (p.out_features // dim for p in (attention.q_proj, attention.k_proj))
        shape = BlockShape(
            heads, kv_heads, dim, eps, "rms", "silu", gated=True, causal=True, plain=True
        )
        gains = (attention.q_norm.weight, attention.k_norm.weight)
        self.whole = WholeBlock.of(groups, shape, gains)

    def forward(self, x: Tensor, table: Rotary, mask: Tensor | None) -> Tensor:
        done = self.run_whole(x, (table.cos, table.sin)) if mask is None else None
        if done is not None:
            return done
        x = x + self.self_attn(self.input_layernorm(x), table, mask)
        out: Tensor = x + self.mlp(self.post_attention_layernorm(x))
        return out

    def run_whole(
        self,
        x: Tensor,
        rope: tuple[Tensor, Tensor],
        before: tuple[Tensor, Tensor] | None = None,
    ) -> Tensor | None:
        """The layer in one call; None where it cannot be.

        before: keys and values of the tokens before x."""
        if self.whole is None:
            return None
        norms = norm_rows(self.input_layernorm), norm_rows(self.post_attention_layernorm)
        return self.whole(x, *norms, before, rope)


@dataclass(frozen=True)
class Lead:
    """What the first n tokens of a sequence leave for those after them, whatever they are.

    features: [1, n, D]; cache: of each layer, keys and values [1, kv_heads, n, head_dim].
    """

    features: Tensor
    cache: tuple[tuple[Tensor, Tensor], ...]


def causal_mask(valid: Tensor) -> Tensor:
    """Who sees whom: bool [B, 1, L, L] from valid tokens [B, L] (nonzero: valid).

    Causal and key-valid. Every token also sees itself, or the rows of left padding would
    have nothing to attend to and turn into NaN.
    """
    length = valid.shape[-1]
    causal = torch.ones(length, length, dtype=torch.bool, device=valid.device).tril()
    itself = torch.eye(length, dtype=torch.bool, device=valid.device)
    return ((causal & valid.bool()[:, None, :]) | itself)[:, None]


class Qwen3Model(nn.Module):
    """Token embedding, the first `num_layers` layers and the final norm (no lm_head)."""

    fast = False

    def __init__(self, config: Qwen3Config, num_layers: int) -> None:
        super().__init__()
        self.config = config
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Qwen3Layer(config) for _ in range(num_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self._last: Rotary | None = None

    def forward(self, embeddings: Tensor, valid: Tensor | None = None) -> Tensor:
        """Features after the final norm.

        Positions count 0..L-1 whether or not a token is padding, as in the reference.

        Args:
            embeddings: [B, L, D].
            valid: [B, L], nonzero where a token is real; None: all are, which is faster.
        """
        table = self._rotary(embeddings.shape[1], embeddings.device)
        mask = None if valid is None else causal_mask(valid)
        hidden = embeddings
        for layer in self.layers:
            hidden = layer(hidden, table, mask)
        out: Tensor = self.norm(hidden)
        return out

    def lead(self, embeddings: Tensor) -> Lead:
        """Run the first tokens of a sequence, embeddings [1, n, D]."""
        table = self._rotary(embeddings.shape[1], embeddings.device)
        hidden, cache = embeddings, []
        for layer in self.layers:
            assert isinstance(layer, Qwen3Layer)
            normed = layer.input_layernorm(hidden)
            cache.append(layer.self_attn.keys_values(normed, table))
            hidden = layer(hidden, table, None)
        return Lead(self.norm(hidden), tuple(cache))

    def follow(self, lead: Lead, embeddings: Tensor) -> Tensor | None:
        """Features of a whole sequence, as `forward` gives them, from those of its first tokens
        and embeddings [1, L, D] of the others; None where the layers are no single calls."""
        known, length = lead.features.shape[1], embeddings.shape[1]
        table = self._rotary(known + length, embeddings.device)
        rope, hidden = (table.cos[known:], table.sin[known:]), embeddings
        for layer, before in zip(self.layers, lead.cache, strict=True):
            assert isinstance(layer, Qwen3Layer)
            done = layer.run_whole(hidden, rope, before)
            if done is None:
                return None
            hidden = done
        return rows.concatenated(lead.features, self.norm(hidden))

    def _rotary(self, length: int, device: torch.device) -> Rotary:
        """The angles of this length; in a fast model those of the last call are kept."""
        kept = self._last
        if kept is not None and kept.full.shape[1] == length and kept.full.device == device:
            return kept
        config = self.config
        with torch.inference_mode(False):  # what is kept may meet a gradient later
            made = Rotary.of(length, config.head_dim, config.rope_theta, device)
        if self.fast:
            self._last = made
        return made
