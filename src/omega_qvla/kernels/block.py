"""A transformer block whose products are all native, or all small and unquantized: one call.

At ten rows, a dozen calls from Python cost more than the block's arithmetic. The block runs the
very kernels that the separate calls run (`kernels.cpu`, `kernels.rows`), to the same bits; in full
precision its products are those of `kernels.dense`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from omega_qvla.errors import NumericsError
from omega_qvla.kernels.cpu import NativeLayer
from omega_qvla.kernels.dense import PackedDense
from omega_qvla.kernels.registry import StepLike
from omega_qvla.kernels.rows import KINDS, compiled, fits, modulation_rows

# (gain, shift, gate), each [T, 1, width] or [T, width], or None.
Modulations = tuple[Tensor | None, Tensor | None, Tensor | None]
BlockLayer = NativeLayer | PackedDense


@dataclass(frozen=True)
class BlockShape:
    """What a block is, besides its layers.

    cross: it attends to the cache alone, so `into` gives queries only.
    causal: each token attends to those up to itself, and to the whole cache.
    norm: `rms` or `layer`, without weights of its own: they multiply by 1 + gain, or by the gain
    itself where it is `plain`.
    gated: `up` gives gate and up, which are multiplied.
    """

    heads: int
    kv_heads: int
    head_dim: int
    eps: float
    norm: Literal["rms", "layer"]
    activation: Literal["gelu", "silu"]
    gated: bool = False
    cross: bool = False
    causal: bool = False
    plain: bool = False


class BlockLayers(NamedTuple):
    """into: to queries, keys and values, or without queries where `query` gives them; out: from
    attention; up: to the inner width (gate, up); down: from it."""

    into: BlockLayer
    out: BlockLayer
    up: BlockLayer
    down: BlockLayer
    query: BlockLayer | None = None


class NativeBlock:
    """x + attention(norm(x)), then x + mlp(norm(x)), both residuals gated where a gate is given."""

    def __init__(
        self,
        layers: BlockLayers,
        shape: BlockShape,
        head_gains: tuple[Tensor, Tensor] | None = None,
    ) -> None:
        """head_gains: [head_dim] each, of the RMSNorms of every head of queries and keys, where
        there are any."""
        module = compiled()
        assert module is not None  # its layers exist
        self._native = [layer for layer in layers if isinstance(layer, NativeLayer)]
        self._dense = any(isinstance(layer, PackedDense) for layer in layers)
        self._heads = (shape.kv_heads, shape.head_dim)
        self._width, self._alone = layers.into.in_features, shape.cross or shape.causal
        self._normed_heads, self._own_query = head_gains is not None, layers.query is not None
        self._cross = shape.cross
        gains = [t.detach().float().contiguous() for t in head_gains or ()]
        linears = [None if layer is None else layer.linear for layer in layers]
        self._block = module.Block(
            in_=linears[0], out=linears[1], up=linears[2], down=linears[3], query=linears[4],
            heads=shape.heads, kv_heads=shape.kv_heads, dim=shape.head_dim, cross=shape.cross,
            causal=shape.causal, center=shape.norm == "layer", plus=0.0 if shape.plain else 1.0,
            gated=shape.gated, kind=KINDS[shape.activation], eps=shape.eps,
            scale=shape.head_dim**-0.5, q_gain=gains[0] if gains else None,
            k_gain=gains[1] if gains else None,
        )  # fmt: skip

    def __call__(
        self,
        x: Tensor,
        before: Modulations,
        after: Modulations,
        cache: tuple[Tensor, Tensor] | None = None,
        rope: tuple[Tensor, Tensor] | None = None,
        step: StepLike | None = None,
        keep: int | None = None,
    ) -> Tensor | None:
        """x [N, T, width] -> [N, keep or T, width]; None where it does not take such tensors.

        Args:
            before, after: of the norm before attention and before the inner layers.
            cache: keys and values [B, kv_heads, L, head_dim], N a multiple of B; its own follow.
            rope: cos and sin, a row of head_dim / 2 for each of the N * T tokens, or of T.
            step: the running step, for layers with static scales.
            keep: compute the outputs of the last tokens only.

        Raises:
            StepError: outside the steps of a static table.
            NumericsError: modulations, cache or rope of another width than the block's.
        """
        modulations = (*before, *after)
        if not fits(x, *modulations, *(cache or ()), *(rope or ())) or not x.is_contiguous():
            return None
        batch, rows, width = x.shape
        kept, count = rows if keep is None else keep, modulation_rows(self._width, *modulations)
        if width != self._width or x.numel() == 0 or count is None or batch % count:
            return None
        keys = self._keys(cache, batch)
        if (cache is not None and keys is None) or not self._runs(cache, rope, kept, rows):
            return None
        cos, sin, table = self._table(rope)
        if table not in (0, rows, batch * rows):
            return None
        row = max((layer.row(step) for layer in self._native), default=0)
        y = torch.empty(batch, kept, width)
        addresses = [0 if t is None else t.data_ptr() for t in modulations]
        self._block.run(
            x.data_ptr(), y.data_ptr(), batch, rows, kept, tuple(addresses[:3]),
            tuple(addresses[3:]), count, cos, sin, table, keys, row, torch.get_num_threads(),
        )  # fmt: skip
        return y

    def _runs(
        self,
        cache: tuple[Tensor, Tensor] | None,
        rope: tuple[Tensor, Tensor] | None,
        kept: int,
        rows: int,
    ) -> bool:
        """Whether a block of this kind takes such arguments (the kernel's own conditions)."""
        if self._dense and torch.is_grad_enabled():
            return False  # its weights may want a gradient
        if (self._normed_heads and rope is None) or (self._own_query and rope is not None):
            return False
        if kept != rows and (self._alone or not 0 < kept < rows):
            return False
        return not (self._cross and cache is None)

    def _keys(self, cache: tuple[Tensor, Tensor] | None, batch: int) -> tuple[int, ...] | None:
        """The cache by address and strides; None where there is none, or none that fits."""
        if cache is None:
            return None
        k, v = cache
        if k.dim() != 4 or (k.shape[1], k.shape[3]) != self._heads:
            kv_heads, dim = self._heads
            raise NumericsError(
                f"a cache {list(k.shape)} does not fit this block; pass [B, {kv_heads}, L, {dim}]"
            )
        if k.shape != v.shape or 0 in k.shape or batch % k.shape[0]:
            return None
        strides = (k.data_ptr(), *k.stride()[:3], v.data_ptr(), *v.stride()[:3])
        return (*strides, k.shape[2], batch // k.shape[0])

    def _table(self, rope: tuple[Tensor, Tensor] | None) -> tuple[int, int, int]:
        """Addresses of cos and sin, and rows; -1 rows where they do not lie row by row."""
        if rope is None:
            return 0, 0, 0
        cos, sin = rope
        half = self._heads[1] // 2
        if cos.shape != sin.shape or cos.numel() == 0 or cos.shape[-1] != half:
            raise NumericsError(
                f"cos and sin {list(cos.shape)} and {list(sin.shape)} do not fit heads of "
                f"{2 * half}; pass rows of {half}"
            )
        if not (cos.is_contiguous() and sin.is_contiguous()):
            return 0, 0, -1
        return cos.data_ptr(), sin.data_ptr(), cos.numel() // half
