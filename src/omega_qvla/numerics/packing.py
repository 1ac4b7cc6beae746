"""Integers as the pack stores them: two of up to 4 bits in a byte, 8 bits as they are.

Byte j of a row holds column 2j in its low nibble and column 2j + 1 in its high nibble, each
as value + 8. An odd width ends in a zero (nibble 8).
"""

from __future__ import annotations

import torch
from torch import Tensor

from omega_qvla.errors import NumericsError


def pack_integers(q: Tensor, bits: int) -> Tensor:
    """q [out, in] as stored: `pack_int4`, or q itself from 8 bits on."""
    return q if bits >= 8 else pack_int4(q)


def pack_int4(q: Tensor) -> Tensor:
    """int8 q [out, in] in [-8, 7] -> uint8 [out, ceil(in / 2)].

    Raises:
        NumericsError: not an int8 matrix, or a value outside [-8, 7].
    """
    if q.dtype != torch.int8 or q.ndim != 2:
        raise NumericsError(f"packing takes an int8 matrix, not {q.dtype} {tuple(q.shape)}")
    if q.numel() and (int(q.min()) < -8 or int(q.max()) > 7):
        raise NumericsError(f"values {int(q.min())}..{int(q.max())} do not fit 4 bits")
    nibbles = (q + 8).to(torch.uint8)
    if q.shape[1] % 2:
        nibbles = torch.nn.functional.pad(nibbles, (0, 1), value=8)
    return nibbles[:, 0::2] | (nibbles[:, 1::2] << 4)


def unpack_int4(packed: Tensor, in_features: int) -> Tensor:
    """uint8 [out, ceil(in / 2)] -> int8 [out, in_features]; inverse of `pack_int4`.

    Raises:
        NumericsError: `packed` is not that wide, or not uint8.
    """
    if packed.dtype != torch.uint8 or packed.ndim != 2:
        raise NumericsError(f"unpacking takes a uint8 matrix, not {packed.dtype}")
    if packed.shape[1] != -(-in_features // 2):
        raise NumericsError(f"{packed.shape[1]} bytes a row do not hold {in_features} nibbles")
    nibbles = torch.stack((packed & 15, packed >> 4), dim=-1)
    values = nibbles.reshape(packed.shape[0], -1)[:, :in_features]
    return values.to(torch.int8) - 8
