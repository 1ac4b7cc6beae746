"""Rounding to nearest is nearest, by brute force over all integers."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from omega_qvla.errors import NumericsError
from omega_qvla.numerics.qparams import expand_groups, qrange, weight_scales
from omega_qvla.numerics.rtn import dequantize, round_weight


@settings(max_examples=60, deadline=None)
@given(
    width=st.integers(1, 30),
    group=st.one_of(st.none(), st.integers(1, 40)),
    bits=st.sampled_from([2, 3, 4]),
    seed=st.integers(0, 999),
)
def test_no_other_integer_is_nearer(width: int, group: int | None, bits: int, seed: int) -> None:
    weight = torch.randn(3, width, generator=torch.Generator().manual_seed(seed))
    weight[0] = 0
    scale = weight_scales(weight, bits, group)
    q = round_weight(weight, scale, bits, group)
    assert q.dtype == torch.int8 and bool((q[0] == 0).all())
    step = expand_groups(scale, width, group)
    low, high = qrange(bits)
    every = torch.arange(low, high + 1).view(-1, 1, 1)
    nearest = (every * step - weight).abs().amin(0)
    error = (dequantize(q, scale, group) - weight).abs()
    torch.testing.assert_close(error, nearest, rtol=1e-5, atol=1e-6)


def test_groups_are_inferred_only_where_they_are_sure() -> None:
    weight = torch.randn(2, 12, generator=torch.Generator().manual_seed(0))
    scale = weight_scales(weight, group=4)
    assert torch.equal(round_weight(weight, scale), round_weight(weight, scale, group=4))
    with pytest.raises(NumericsError, match="pass group="):
        round_weight(weight, weight_scales(weight, group=5)[:, :2].repeat(1, 4)[:, :5])
    with pytest.raises(NumericsError, match="groups of 6"):
        dequantize(torch.zeros(2, 12, dtype=torch.int8), scale, group=6)


def test_one_column_groups_are_exact() -> None:
    """A column of its own has its peak on the grid: q = +-7, or -8, and no error."""
    weight = torch.randn(4, 9, generator=torch.Generator().manual_seed(3))
    scale = weight_scales(weight, group=1)
    torch.testing.assert_close(dequantize(round_weight(weight, scale), scale), weight)
