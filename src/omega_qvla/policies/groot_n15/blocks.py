"""Attention and feed-forward, named as in diffusers, shared by the DiT and `vl_self_attention`."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn.functional import gelu

from omega_qvla.kernels import rows
from omega_qvla.modules.linear import quantized
from omega_qvla.modules.shared import joined, project
from omega_qvla.policies.attention import attend_heads

KeyValue = tuple[Tensor, Tensor]
"""Keys and values, each [B, heads, L, head_dim]."""


class Attention(nn.Module):
    """Multi-head attention whose keys and values can be computed ahead of the queries."""

    fast = False

    def __init__(self, width: int, context_width: int, heads: int, head_dim: int) -> None:
        super().__init__()
        inner = heads * head_dim
        self.heads, self.head_dim = heads, head_dim
        self.to_q = nn.Linear(width, inner)
        self.to_k = nn.Linear(context_width, inner)
        self.to_v = nn.Linear(context_width, inner)
        self.to_out = nn.ModuleList([nn.Linear(inner, width)])

    def key_value(self, context: Tensor) -> KeyValue:
        """Keys and values of context [B, L, context_width]."""
        keys, values = project(context, self.to_k, self.to_v)
        return self.split(keys), self.split(values)

    def split(self, x: Tensor) -> Tensor:
        """[B, L, heads * head_dim] to [B, heads, L, head_dim]."""
        return x.view(*x.shape[:-1], self.heads, -1).transpose(1, 2)

    def forward(self, x: Tensor, key_value: KeyValue, mask: Tensor | None = None) -> Tensor:
        """Queries from x attend to the given keys.

        Args:
            x: [B * R, T, width]; R consecutive entries share the keys of one context. They
                are folded into the query axis, so the keys are neither copied nor recomputed.
            key_value: of a context batch B.
            mask: bool [B, 1, 1, L], True where a key is attended; None: all are.
        """
        return self.attend(self.to_q(x), key_value, mask)

    def attend_self(self, x: Tensor, keep: int | None = None, mask: Tensor | None = None) -> Tensor:
        """Self-attention among x [B, T, width]; outputs of the last `keep` tokens only."""
        if keep is None or joined(self.to_q, self.to_k, self.to_v):
            queries, keys, values = project(x, self.to_q, self.to_k, self.to_v)
            queries = queries if keep is None else queries[:, -keep:]
        else:
            queries = self.to_q(x[:, -keep:])
            keys, values = project(x, self.to_k, self.to_v)
        return self.attend(queries, (self.split(keys), self.split(values)), mask)

    def attend(self, queries: Tensor, key_value: KeyValue, mask: Tensor | None = None) -> Tensor:
        """`forward` for queries [B * R, T, heads * head_dim]."""
        keys, values = key_value
        folded = queries.reshape(keys.shape[0], -1, queries.shape[-1])
        attended = attend_heads(
            self.split(folded), keys, values, mask, fast=self.fast, exact=not quantized(self.to_q)
        )
        out: Tensor = self.to_out[0](attended.reshape(queries.shape))
        return out


class GeluProjection(nn.Module):
    """Linear, then the tanh approximation of GELU."""

    fast = False

    def __init__(self, width: int, inner: int) -> None:
        super().__init__()
        self.proj = nn.Linear(width, inner)

    def forward(self, x: Tensor) -> Tensor:
        inner = self.proj(x)
        active = rows.gated("gelu", inner) if self.fast else None
        return gelu(inner, approximate="tanh") if active is None else active


class FeedForward(nn.Module):
    """Four times wider, back again. `net.1` is the reference's dropout, off here."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.net = nn.Sequential(
            GeluProjection(width, 4 * width), nn.Identity(), nn.Linear(4 * width, width)
        )

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.net(x)
        return out


def layer_groups(
    attention: Attention, forward: FeedForward, cross: bool = False
) -> tuple[tuple[nn.Module, ...], ...]:
    """A block's linear layers by what they read (`modules.block.WholeBlock`); cross: without
    keys and values."""
    inner, outer = forward.net[0], forward.net[2]
    assert isinstance(inner, GeluProjection)
    readers = (attention.to_q, attention.to_k, attention.to_v)
    return readers[:1] if cross else readers, (attention.to_out[0],), (inner.proj,), (outer,)
