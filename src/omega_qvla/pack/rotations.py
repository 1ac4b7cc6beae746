"""Rotations of a published record, dense or in blocks, as a pack stores them.

Published: x' = x R with R = P diag(R_1, R_2, ...), P a permutation, and y = y' R_out. A dense
R is taken apart again: each of its rows lies in the columns of one block, and the rows of a
block, in any order, are that block's channels. The order is free: x[perm] and the block's
rows change together, and the product stays the same to the last bit of its terms.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from omega_qvla.errors import NumericsError
from omega_qvla.numerics.permutation import inverse_permutation
from omega_qvla.numerics.rotation import block_sizes

_BLOCKS = (64, 32, 16, 128, 256, 512)


def input_rotation(record: Mapping[str, Any], width: int) -> tuple[Tensor | None, Tensor | None]:
    """(permutation int32 [in] or None, blocks f16 [n, B, B] or None) of a record.

    Raises:
        NumericsError: neither block-diagonal after a permutation, or of another width.
    """
    blocks, order = record.get("duquant_rotation_blocks"), record.get("duquant_rotation_perm")
    if isinstance(blocks, Tensor) and isinstance(order, Tensor):
        _check_blocks(blocks, width, "duquant_rotation_blocks")
        if order.shape != (width,):
            raise NumericsError(f"duquant_rotation_perm has shape {tuple(order.shape)}")
        inverse_permutation(order)  # raises where it is none
        return _unless_identity(order), blocks.to(torch.float16).contiguous()
    dense = record.get("duquant_rotation")
    if dense is None:
        return None, None
    _check_dense(dense, width, "duquant_rotation")
    for block in _BLOCKS:
        order = _block_order(dense, block)
        if order is not None:
            return _unless_identity(order), _cut(dense[order], block)
    raise NumericsError("duquant_rotation is not block-diagonal after any permutation")


def output_rotation(record: Mapping[str, Any], width: int) -> Tensor | None:
    """Blocks f16 [n, B, B] that undo the rotation of a record's outputs, or None.

    Raises:
        NumericsError: not block-diagonal, or of another width.
    """
    blocks = record.get("duquant_rotation_out_blocks")
    if isinstance(blocks, Tensor):
        _check_blocks(blocks, width, "duquant_rotation_out_blocks")
        return blocks.to(torch.float16).contiguous()
    dense = record.get("duquant_rotation_out")
    if dense is None:
        return None
    _check_dense(dense, width, "duquant_rotation_out")
    for block in _BLOCKS:
        order = _block_order(dense, block)
        if order is not None and torch.equal(order, torch.arange(width)):
            return _cut(dense, block)
    raise NumericsError("duquant_rotation_out is not block-diagonal")


def _block_order(dense: Tensor, block: int) -> Tensor | None:
    """Rows of R sorted by the block of columns that holds them; None if there is no such order."""
    sizes = torch.tensor(block_sizes(dense.shape[0], block))
    owner = torch.arange(len(sizes)).repeat_interleave(sizes)
    column_owner = owner.expand_as(dense)
    used = dense != 0
    first = torch.where(used, column_owner, len(sizes)).amin(1)
    last = torch.where(used, column_owner, -1).amax(1)
    if not torch.equal(first, last):
        return None
    if not torch.equal(torch.bincount(first, minlength=len(sizes)), sizes):
        return None
    return first.argsort(stable=True)


def _cut(rotation: Tensor, block: int) -> Tensor:
    """[n_blocks, B, B] from a block-diagonal matrix."""
    sizes = block_sizes(rotation.shape[0], block)
    out = torch.zeros(len(sizes), block, block, dtype=torch.float16)
    start = 0
    for i, size in enumerate(sizes):
        part = slice(start, start + size)
        out[i, :size, :size] = rotation[part, part].to(torch.float16)
        start += size
    return out


def _unless_identity(order: Tensor) -> Tensor | None:
    if torch.equal(order.long(), torch.arange(order.numel())):
        return None
    return order.to(torch.int32)


def _check_blocks(blocks: Tensor, width: int, name: str) -> None:
    square = blocks.ndim == 3 and blocks.shape[1] == blocks.shape[2]
    power = square and blocks.shape[1] & (blocks.shape[1] - 1) == 0
    if not power or len(block_sizes(width, blocks.shape[1])) != blocks.shape[0]:
        raise NumericsError(f"{name} has shape {tuple(blocks.shape)} for {width} channels")


def _check_dense(dense: Any, width: int, name: str) -> None:
    if not isinstance(dense, Tensor) or tuple(dense.shape) != (width, width):
        found = tuple(dense.shape) if isinstance(dense, Tensor) else type(dense).__name__
        raise NumericsError(f"{name} is {found}, the layer needs {(width, width)}")
