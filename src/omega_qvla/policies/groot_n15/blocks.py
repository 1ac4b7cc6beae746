"""Attention and feed-forward, named as in diffusers, shared by the DiT and `vl_self_attention`."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn.functional import gelu

from omega_qvla.policies.attention import attend

KeyValue = tuple[Tensor, Tensor]
"""Keys and values, each [B, heads, L, head_dim]."""


class Attention(nn.Module):
    """Multi-head attention whose keys and values can be computed ahead of the queries."""

    def __init__(self, width: int, context_width: int, heads: int, head_dim: int) -> None:
        super().__init__()
        inner = heads * head_dim
        self.heads = heads
        self.to_q = nn.Linear(width, inner)
        self.to_k = nn.Linear(context_width, inner)
        self.to_v = nn.Linear(context_width, inner)
        self.to_out = nn.ModuleList([nn.Linear(inner, width)])

    def key_value(self, context: Tensor) -> KeyValue:
        """Keys and values of context [B, L, context_width]."""
        return self._split(self.to_k(context)), self._split(self.to_v(context))

    def _split(self, x: Tensor) -> Tensor:
        return x.view(*x.shape[:-1], self.heads, -1).transpose(1, 2)

    def forward(self, x: Tensor, key_value: KeyValue, mask: Tensor | None = None) -> Tensor:
        """Queries from x attend to the given keys.

        Args:
            x: [B * R, T, width]; R consecutive entries share the keys of one context. They
                are folded into the query axis, so the keys are neither copied nor recomputed.
            key_value: of a context batch B.
            mask: bool [B, 1, 1, L], True where a key is attended; None: all are.
        """
        keys, values = key_value
        queries: Tensor = self.to_q(x)
        folded = queries.reshape(keys.shape[0], -1, queries.shape[-1])
        attended = attend(self._split(folded), keys, values, mask)
        out: Tensor = self.to_out[0](attended.transpose(1, 2).reshape(queries.shape))
        return out


class GeluProjection(nn.Module):
    """Linear, then the tanh approximation of GELU."""

    def __init__(self, width: int, inner: int) -> None:
        super().__init__()
        self.proj = nn.Linear(width, inner)

    def forward(self, x: Tensor) -> Tensor:
        return gelu(self.proj(x), approximate="tanh")


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
