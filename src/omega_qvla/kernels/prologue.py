"""The change of basis of an input, prepared once so that a call is a handful of torch ops.

Same result as `InputTransform.activations` up to rounding: smoothing and signs are one
division, a block Hadamard one product of [.., 64] with [64, 64], a full-width Hadamard two.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from omega_qvla.numerics.hadamard import fwht, hadamard_matrix, split_width
from omega_qvla.numerics.layer import QuantizedLayer
from omega_qvla.numerics.rotation import apply_blocks

Prologue = Callable[[Tensor], Tensor]
# Up to this width one dense product beats several small ops.
_DENSE_WIDTH = 128


def build_prologue(layer: QuantizedLayer, device: torch.device) -> Prologue:
    """A function x [n, in] float32 -> x' [n, in] float32 for tensors on `device`."""
    rotate = _rotation(layer, device)
    permutation = None
    if layer.permutation is not None:
        permutation = layer.permutation.to(device=device, dtype=torch.int64)
    divisor = _divisor(layer, device)

    def prologue(x: Tensor) -> Tensor:
        if divisor is not None:
            x = x / divisor
        if permutation is not None:
            x = x.index_select(1, permutation)
        return x if rotate is None else rotate(x)

    return prologue


def _divisor(layer: QuantizedLayer, device: torch.device) -> Tensor | None:
    """smooth and signs in one: dividing by +-d is exactly dividing by d and flipping."""
    divisor = None if layer.smooth is None else layer.smooth.float()
    if layer.signs is not None:
        signs = layer.signs.float()
        if layer.permutation is not None:
            # Signs come after the permutation; seen from before it they are permuted back.
            order = layer.permutation.long()
            signs = torch.empty_like(signs).index_copy_(0, order, signs)
        divisor = signs if divisor is None else divisor * signs
    return None if divisor is None else divisor.to(device)


def _rotation(layer: QuantizedLayer, device: torch.device) -> Prologue | None:
    kind, block, width = layer.scheme.rotation.kind, layer.scheme.rotation.block, layer.in_features
    if kind == "none":
        return None
    if kind == "full_hadamard":
        return _full(width, device)
    if width % block:
        return _general(layer, device)
    if kind == "hadamard":
        return _one_product(hadamard_matrix(block, torch.float32, device))
    assert layer.rotation is not None
    return block_product(layer.rotation.to(device=device, dtype=torch.float32))


def _one_product(matrix: Tensor) -> Prologue:
    """x viewed as rows of the matrix's width, times the matrix."""
    block = matrix.shape[0]
    return lambda x: torch.mm(x.reshape(-1, block), matrix).view(x.shape)


def block_product(blocks: Tensor) -> Prologue:
    """x [n, n_blocks * B] times blocks [n_blocks, B, B], each block of columns by its own."""
    n_blocks, block, _ = blocks.shape

    def rotate(x: Tensor) -> Tensor:
        parts = x.reshape(-1, n_blocks, block).transpose(0, 1)
        return torch.bmm(parts, blocks).transpose(0, 1).reshape(x.shape)

    return rotate


def _full(width: int, device: torch.device) -> Prologue:
    """H = H_a (x) H_b on the row seen as a matrix [a, b]: one product from each side."""
    factors = split_width(width)
    assert factors is not None  # the layer was built with this width
    base, power = factors
    b = 1
    while b * b < width and b < power:
        b *= 2
    if width <= _DENSE_WIDTH:
        return _one_product(hadamard_matrix(width, torch.float32, device))
    a = base * (power // b)
    right = hadamard_matrix(b, torch.float32, device)
    left = hadamard_matrix(a, torch.float32, device)

    def rotate(x: Tensor) -> Tensor:
        inner = torch.mm(x.reshape(-1, b), right).view(-1, a, b).transpose(1, 2)
        return torch.matmul(inner, left).transpose(1, 2).reshape(x.shape)

    return rotate


def _general(layer: QuantizedLayer, device: torch.device) -> Prologue:
    """Any width: smoothing, permutation and signs are already done, so only the rotation."""
    kind, block = layer.scheme.rotation.kind, layer.scheme.rotation.block
    if kind == "hadamard":
        return lambda x: fwht(x, block)
    assert layer.rotation is not None
    blocks = layer.rotation.to(device=device, dtype=torch.float32)
    return lambda x: apply_blocks(x, blocks)
