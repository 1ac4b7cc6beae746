"""Block-diagonal rotations of a linear layer's inputs and outputs.

A layer is y = x Wᵀ + b, W [out, in]. With orthogonal blocks R_b on the diagonal of R,
x' = x R and W' = W R leave x Wᵀ unchanged. Kinds: `hadamard` R_b = H, `svd` R_b = U_b,
`svd_hadamard` R_b = U_b H, where U_b holds the left singular vectors of W[:, b]ᵀ.

Storage: one tensor [n_blocks, B, B]; block i sits in the top left corner of entry i, with the
size that `block_sizes(width, B)` gives it, and zeros around it.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor

from omega_qvla.errors import NumericsError
from omega_qvla.numerics.checks import require_floating, require_matrix
from omega_qvla.numerics.hadamard import block_sizes, hadamard_matrix

__all__ = [
    "BlockKind",
    "apply_blocks",
    "apply_blocks_t",
    "apply_output_rotation",
    "block_sizes",
    "build_output_rotation",
    "build_rotation",
    "left_singular_vectors",
    "undo_output_rotation",
]

BlockKind = Literal["hadamard", "svd", "svd_hadamard"]


def left_singular_vectors(gram: Tensor) -> Tensor:
    """Eigenvectors of symmetric Gram matrices [..., B, B], largest eigenvalue first, float64.

    These are the left singular vectors of A for gram = A Aᵀ. Signs are fixed so that a build
    is reproducible: in each vector the first entry of (nearly) largest magnitude is positive.
    """
    _, vectors = torch.linalg.eigh(gram.to(torch.float64))
    vectors = vectors.flip(-1)
    size = vectors.abs()
    # "nearly": two entries equal up to rounding must not decide by their last bit.
    lead = (size >= size.amax(dim=-2, keepdim=True) * (1 - 1e-6)).to(torch.uint8)
    first = lead.argmax(dim=-2, keepdim=True)
    signs = torch.where(vectors.gather(-2, first) < 0, -1.0, 1.0)
    return torch.mul(vectors, signs)


def build_rotation(weight: Tensor, kind: BlockKind, block: int = 64) -> Tensor:
    """Rotation blocks [n_blocks, block, block] for the inputs of `weight` [out, in].

    Computed in float64, returned in float32 (float64 for a float64 weight) on the weight's
    device. Raises NumericsError for a bad weight, block or kind.
    """
    require_matrix(weight, "weight")
    if kind not in ("hadamard", "svd", "svd_hadamard"):
        raise NumericsError(f"no rotation blocks for kind {kind!r}: hadamard, svd, svd_hadamard")
    blocks = _blocks_of_columns(weight, block, svd=kind != "hadamard")
    if kind != "svd":
        blocks = _times_hadamard(blocks, block_sizes(weight.shape[1], block))
    return blocks.to(_result_dtype(weight))


def build_output_rotation(weight: Tensor, block: int = 64) -> Tensor:
    """Output blocks [n_blocks, block, block]: left singular vectors of each block of rows."""
    require_matrix(weight, "weight")
    return _blocks_of_columns(weight.T, block, svd=True).to(_result_dtype(weight))


def apply_output_rotation(weight: Tensor, blocks: Tensor) -> Tensor:
    """W' [out, in]: every block of rows becomes U · W_block (U, not Uᵀ: so published)."""
    return apply_blocks_t(weight.T, blocks).T.contiguous()


def undo_output_rotation(y: Tensor, blocks: Tensor) -> Tensor:
    """y [..., out] of a layer with W' back to that of W: y ← y · U. Add the bias afterwards."""
    return apply_blocks(y, blocks)


def apply_blocks(x: Tensor, blocks: Tensor) -> Tensor:
    """x' = x R over the last dimension; x [..., in], blocks [n_blocks, B, B], dtype of x."""
    return _apply(x, blocks, transpose=False)


def apply_blocks_t(x: Tensor, blocks: Tensor) -> Tensor:
    """x = x' Rᵀ, the inverse of `apply_blocks`."""
    return _apply(x, blocks, transpose=True)


def _apply(x: Tensor, blocks: Tensor, transpose: bool) -> Tensor:
    require_floating(x, "input of a block rotation")
    sizes = _check_blocks(x.shape[-1], blocks)
    block = blocks.shape[-1]
    blocks = blocks.to(x.dtype)
    if transpose:
        blocks = blocks.transpose(1, 2)
    full = x.shape[-1] // block
    parts, start = [], full * block
    if full:
        head = x[..., :start].reshape(math.prod(x.shape[:-1]), full, block).transpose(0, 1)
        rotated = torch.bmm(head, blocks[:full]).transpose(0, 1)
        parts.append(rotated.reshape(*x.shape[:-1], start))
    for i in range(full, len(sizes)):
        size = sizes[i]
        parts.append(x[..., start : start + size] @ blocks[i, :size, :size])
        start += size
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=-1)


def _check_blocks(width: int, blocks: Tensor) -> tuple[int, ...]:
    if blocks.ndim != 3 or blocks.shape[1] != blocks.shape[2]:
        raise NumericsError(f"rotation must be [n_blocks, B, B], got {tuple(blocks.shape)}")
    sizes = block_sizes(width, blocks.shape[2])
    if len(sizes) != blocks.shape[0]:
        raise NumericsError(
            f"rotation holds {blocks.shape[0]} blocks of {blocks.shape[2]}, width {width} needs "
            f"{len(sizes)}; it was built for another layer"
        )
    return sizes


def _blocks_of_columns(weight: Tensor, block: int, svd: bool) -> Tensor:
    """float64 [n_blocks, block, block]: U_b of W[:, b]ᵀ (or the identity), zero-padded."""
    width = weight.shape[1]
    sizes = block_sizes(width, block)
    out = torch.zeros(len(sizes), block, block, dtype=torch.float64, device=weight.device)
    start = 0
    for i, size in enumerate(sizes):
        if svd:
            part = weight[:, start : start + size].to(torch.float64)
            out[i, :size, :size] = left_singular_vectors(part.T @ part)
        else:
            out[i, :size, :size] = torch.eye(size, dtype=torch.float64, device=weight.device)
        start += size
    return out


def _times_hadamard(blocks: Tensor, sizes: tuple[int, ...]) -> Tensor:
    out = blocks.clone()
    for i, size in enumerate(sizes):
        h = hadamard_matrix(size, torch.float64, blocks.device)
        out[i, :size, :size] = blocks[i, :size, :size] @ h
    return out


def _result_dtype(weight: Tensor) -> torch.dtype:
    return torch.float64 if weight.dtype == torch.float64 else torch.float32
