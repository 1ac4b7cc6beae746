"""The change of basis of an input, prepared once so that a call is a handful of torch ops.

The same bits as `reference.rotate_input`, for any number of rows. Butterflies run on the
transposed input, where one op per distance takes all of them: a product with the whole Hadamard
matrix would be two to five times faster, but adds in an order that nobody knows.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from omega_qvla.kernels import arithmetic
from omega_qvla.numerics.duquant import apply_shared
from omega_qvla.numerics.hadamard import base_matrix, block_sizes, split_width
from omega_qvla.numerics.layer import QuantizedLayer
from omega_qvla.numerics.rotation import apply_blocks

Prologue = Callable[[Tensor], Tensor]
# Elements that are transformed at a time: they stay in the second-level cache.
_CHUNK = 1 << 16


def build_prologue(layer: QuantizedLayer, device: torch.device) -> Prologue:
    """A function x [n, in] float32 -> u [n, in] float32 for tensors on `device`.

    Times `arithmetic.rotation_norm` u is the layer's rotated input x'; where the scheme does not
    run on integers it is x' itself.
    """
    rotate = _rotation(layer, device)
    permutation = None
    if layer.permutation is not None:
        permutation = layer.permutation.to(device=device, dtype=torch.int64)
    factor = arithmetic.multiplier(layer)
    if factor is not None:
        factor = factor.to(device)
    first = None if layer.first_rotation is None else layer.first_rotation.to(device)
    norm = 1.0 if layer.scheme.native else arithmetic.rotation_norm(layer)

    def prologue(x: Tensor) -> Tensor:
        if factor is not None:
            x = x * factor
        if first is not None:
            x = apply_shared(x.double(), first).float()
        if permutation is not None:
            x = x.index_select(1, permutation)
        x = x if rotate is None else rotate(x)
        return x if norm == 1.0 else x * norm

    return prologue


def _rotation(layer: QuantizedLayer, device: torch.device) -> Prologue | None:
    kind, block, width = layer.scheme.rotation.kind, layer.scheme.rotation.block, layer.in_features
    if kind == "none":
        return None
    if kind == "full_hadamard":
        return _full(width, device)
    if kind == "hadamard":
        return _hadamard_blocks(width, block, device)
    assert layer.rotation is not None
    if kind == "duquant":
        shared = layer.rotation.to(device)
        return lambda x: apply_shared(x.double(), shared).float()
    if layer.scheme.native:
        return _exact_blocks(layer.rotation.to(device=device, dtype=torch.float64))
    return dense_blocks(layer.rotation.to(device=device, dtype=torch.float32), width)


def dense_blocks(blocks: Tensor, width: int) -> Prologue:
    """x [n, width] times `blocks` [n_blocks, B, B], each block of columns by its own."""
    if width % blocks.shape[-1] == 0:
        return block_product(blocks)
    return lambda x: apply_blocks(x, blocks)


def block_product(blocks: Tensor) -> Prologue:
    """x [n, n_blocks * B] times blocks [n_blocks, B, B], each block of columns by its own."""
    n_blocks, block, _ = blocks.shape

    def rotate(x: Tensor) -> Tensor:
        parts = x.reshape(-1, n_blocks, block).transpose(0, 1)
        return torch.bmm(parts, blocks).transpose(0, 1).reshape(x.shape)

    return rotate


def _exact_blocks(blocks: Tensor) -> Prologue:
    """Sums in float64, so that their order does not show."""
    return lambda x: apply_blocks(x.double(), blocks).float()


def _butterflies(device: torch.device) -> Prologue:
    """x [n, 2^k] -> its unnormalized Walsh-Hadamard transform, at distances 1, 2, 4, ..."""
    signs = torch.tensor([1.0, -1.0], device=device).view(2, 1, 1)

    def some(x: Tensor) -> Tensor:
        rows, order = x.shape
        x = x.T.contiguous()
        for _ in range(order.bit_length() - 1):
            # Pairs of neighbours; the sums go to the front half, the differences to the back:
            # after k rounds every element is in its place. +-b is exact, so a +- b rounds once.
            a, b = x.view(order // 2, 2, rows).unbind(1)
            x = torch.addcmul(a, signs, b).view(order, rows)
        return x.T

    def transform(x: Tensor) -> Tensor:
        rows = max(1, _CHUNK // x.shape[1])
        if len(x) <= rows:
            return some(x)
        return torch.cat([some(part) for part in torch.split(x, rows)])

    return transform


def _hadamard_blocks(width: int, block: int, device: torch.device) -> Prologue:
    butterflies = _butterflies(device)
    if width % block == 0:
        return lambda x: butterflies(x.reshape(-1, block)).reshape(x.shape)
    sizes = list(block_sizes(width, block))

    def rotate(x: Tensor) -> Tensor:
        parts = []
        for part in torch.split(x, sizes, dim=1):
            size = part.shape[1]
            part = butterflies(part)
            if size != block:
                part = part * arithmetic.tail_factor(block, size)
            parts.append(part)
        return torch.cat(parts, dim=1)

    return rotate


def _full(width: int, device: torch.device) -> Prologue:
    """Butterflies inside runs of 2^k, then the runs are added with the base matrix's signs."""
    factors = split_width(width)
    assert factors is not None  # the layer was built with this width
    base, power = factors
    butterflies = _butterflies(device)
    signs = base_matrix(base).to(device=device, dtype=torch.float32).unsqueeze(-1)

    def rotate(x: Tensor) -> Tensor:
        runs = butterflies(x.reshape(-1, power)).reshape(-1, base, power)
        if base == 1:
            return runs.reshape(x.shape).contiguous()
        total = runs[:, :1] * signs[0]
        for i in range(1, base):
            total = torch.addcmul(total, runs[:, i : i + 1], signs[i])
        return total.reshape(x.shape).contiguous()

    return rotate
