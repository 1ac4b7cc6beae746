"""A transformer block of a denoising loop whose four products are native: one call.

At ten rows, a dozen calls from Python cost more than the block's arithmetic. The block runs the
very kernels that the separate calls run (`kernels.cpu`, `kernels.rows`), to the same bits.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from omega_qvla.kernels.cpu import NativeLayer
from omega_qvla.kernels.registry import StepLike
from omega_qvla.kernels.rows import KINDS, compiled, fits

# (gain, shift, gate), each [T, 1, width] or [T, width], or None; norms multiply by 1 + gain.
Modulations = tuple[Tensor | None, Tensor | None, Tensor | None]


@dataclass(frozen=True)
class BlockShape:
    """What a block is, besides its layers.

    cross: it attends to the cache alone, so `in` gives queries only.
    norm: `rms`, or `layer` without weights of its own.
    gated: `up` gives gate and up, which are multiplied.
    """

    heads: int
    kv_heads: int
    head_dim: int
    eps: float
    norm: Literal["rms", "layer"]
    activation: Literal["gelu", "silu"]
    gated: bool
    cross: bool = False


class NativeBlock:
    """x + attention(norm(x)), then x + mlp(norm(x)), both residuals gated where a gate is given."""

    def __init__(
        self,
        layers: tuple[NativeLayer, NativeLayer, NativeLayer, NativeLayer],
        shape: BlockShape,
    ) -> None:
        """layers: to queries (keys, values), from attention, to the inner width, from it."""
        module = compiled()
        assert module is not None  # a NativeLayer exists
        self._layers, self._width = layers, layers[0].in_features
        self._block = module.Block(
            *(layer.linear for layer in layers), shape.heads, shape.kv_heads, shape.head_dim,
            shape.cross, shape.norm == "layer", shape.gated, KINDS[shape.activation], shape.eps,
            shape.head_dim**-0.5,
        )  # fmt: skip

    def __call__(
        self,
        x: Tensor,
        before: Modulations,
        after: Modulations,
        cache: tuple[Tensor, Tensor] | None,
        rope: tuple[Tensor, Tensor] | None,
        step: StepLike | None,
    ) -> Tensor | None:
        """x [N, T, width] -> the same; None where it does not take such tensors.

        Args:
            before, after: of the norm before attention and before the inner layers.
            cache: keys and values [B, kv_heads, L, head_dim], N a multiple of B; its own follow.
            rope: cos and sin, a row of head_dim / 2 for each of the N * T tokens, or of T.
            step: the running step, for layers with static scales.

        Raises:
            StepError: outside the steps of a static table.
        """
        modulations = (*before, *after)
        if not fits(x, *modulations, *(cache or ()), *(rope or ())) or not x.is_contiguous():
            return None
        batch, rows, width = x.shape
        count = _rows_of(modulations)
        if width != self._width or count is None or batch % count:
            return None
        keys = _keys(cache, batch)
        if cache is not None and keys is None:
            return None
        cos, sin, table = _table(rope)
        if table not in (0, rows, batch * rows):
            return None
        row = max(layer.row(step) for layer in self._layers)
        y = torch.empty(x.shape)
        addresses = [0 if t is None else t.data_ptr() for t in modulations]
        self._block.run(
            x.data_ptr(), y.data_ptr(), batch, rows, tuple(addresses[:3]), tuple(addresses[3:]),
            count, cos, sin, table, keys, row, torch.get_num_threads(),
        )  # fmt: skip
        return y


def _rows_of(modulations: Sequence[Tensor | None]) -> int | None:
    """How many rows they all have; None where they differ or are no plain rows."""
    count = 0
    for t in modulations:
        if t is None:
            continue
        if not t.is_contiguous() or count not in (0, t.shape[0]) or t.numel() % t.shape[0]:
            return None
        count = t.shape[0]
    return count or 1


def _keys(cache: tuple[Tensor, Tensor] | None, batch: int) -> tuple[int, ...] | None:
    if cache is None:
        return None
    k, v = cache
    if k.shape != v.shape or batch % k.shape[0] or k.shape[2] == 0:
        return None
    strides = (k.data_ptr(), *k.stride()[:3], v.data_ptr(), *v.stride()[:3])
    return (*strides, k.shape[2], batch // k.shape[0])


def _table(rope: tuple[Tensor, Tensor] | None) -> tuple[int, int, int]:
    """Addresses of cos and sin, and rows; -1 rows where they do not lie row by row."""
    if rope is None:
        return 0, 0, 0
    cos, sin = rope
    if not (cos.is_contiguous() and sin.is_contiguous()):
        return 0, 0, -1
    return cos.data_ptr(), sin.data_ptr(), cos.numel() // cos.shape[-1]
