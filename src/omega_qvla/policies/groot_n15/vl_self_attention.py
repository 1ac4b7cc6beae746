"""Self-attention over the backbone's features, run once per observation."""

from __future__ import annotations

from torch import Tensor, nn

from omega_qvla.kernels.block import BlockShape
from omega_qvla.modules.block import WholeBlock, norm_rows
from omega_qvla.policies.groot_n15.blocks import Attention, FeedForward, layer_groups
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
        self.whole: WholeBlock | None = None

    def fuse(self) -> None:
        """Run as one call from now on, where the layers that it has now allow it."""
        heads, dim = self.attn1.heads, self.attn1.head_dim
        shape = BlockShape(heads, heads, dim, self.norm1.eps, "layer", "gelu", plain=True)
        self.whole = WholeBlock.of(layer_groups(self.attn1, self.ff), shape)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        if self.whole is not None and mask is None:
            done = self.whole(x, norm_rows(self.norm1), norm_rows(self.norm3))
            if done is not None:
                return done
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
