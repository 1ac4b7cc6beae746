"""Self-attention over the backbone's features, run once per observation."""

from __future__ import annotations

from torch import Tensor, nn

from omega_qvla.policies.groot_n15.blocks import Attention, FeedForward
from omega_qvla.policies.groot_n15.config import TransformerConfig


class SelfAttentionBlock(nn.Module):
    """Pre-norm attention and feed-forward (the norms are called norm1 and norm3)."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        width = config.inner_dim
        self.norm1 = nn.LayerNorm(width, eps=1e-5)
        self.attn1 = Attention(width, width, config.num_attention_heads, config.attention_head_dim)
        self.norm3 = nn.LayerNorm(width, eps=1e-5)
        self.ff = FeedForward(width)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        x = x + self.attn1.attend_self(self.norm1(x), mask=mask)
        out: Tensor = x + self.ff(self.norm3(x))
        return out


class VLSelfAttention(nn.Module):
    """A stack of blocks without positions; unmasked unless a mask is given."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.transformer_blocks = nn.ModuleList(
            SelfAttentionBlock(config) for _ in range(config.num_layers)
        )

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """x [B, L, D]; mask bool [B, 1, 1, L], True where a token may be attended."""
        for block in self.transformer_blocks:
            x = block(x, mask)
        return x
