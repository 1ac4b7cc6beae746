"""Packing is exact for every width, and its layout is the documented one."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from omega_qvla.errors import NumericsError
from omega_qvla.numerics.packing import pack_int4, unpack_int4


@settings(max_examples=100, deadline=None)
@given(out=st.integers(1, 9), width=st.integers(1, 131), seed=st.integers(0, 999))
def test_round_trip(out: int, width: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    q = torch.randint(-8, 8, (out, width), generator=generator, dtype=torch.int8)
    packed = pack_int4(q)
    assert packed.shape == (out, (width + 1) // 2) and packed.dtype == torch.uint8
    assert torch.equal(unpack_int4(packed, width), q)


def test_every_byte_round_trips() -> None:
    packed = torch.arange(256, dtype=torch.uint8).view(16, 16)
    assert torch.equal(pack_int4(unpack_int4(packed, 32)), packed)


def test_layout() -> None:
    """Low nibble = even column, value + 8; an odd width ends in nibble 8."""
    packed = pack_int4(torch.tensor([[-8, 7, 0]], dtype=torch.int8))
    assert packed.tolist() == [[0 | 15 << 4, 8 | 8 << 4]]


def test_what_does_not_fit_is_refused() -> None:
    with pytest.raises(NumericsError, match="do not fit 4 bits"):
        pack_int4(torch.tensor([[8]], dtype=torch.int8))
    with pytest.raises(NumericsError, match="int8 matrix"):
        pack_int4(torch.zeros(2, 2))
    with pytest.raises(NumericsError, match="do not hold 7"):
        unpack_int4(torch.zeros(2, 3, dtype=torch.uint8), 7)
    with pytest.raises(NumericsError, match="uint8"):
        unpack_int4(torch.zeros(2, 3, dtype=torch.int8), 6)
