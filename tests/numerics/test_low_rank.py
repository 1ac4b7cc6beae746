"""The low-rank part is the best one (Eckart-Young), and nothing is lost."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from omega_qvla.errors import NumericsError
from omega_qvla.numerics.low_rank import low_rank_split


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 40), st.integers(1, 40), st.integers(0, 40), st.integers(0, 99))
def test_residual_energy_is_the_tail_of_the_spectrum(
    out: int, width: int, rank: int, seed: int
) -> None:
    rank = min(rank, out, width)
    weight = torch.randn(out, width, generator=torch.Generator().manual_seed(seed)).double()
    a, b, residual = low_rank_split(weight, rank)
    assert a.shape == (out, rank) and b.shape == (width, rank)
    torch.testing.assert_close(a @ b.T + residual, weight, rtol=0, atol=1e-12)
    tail = torch.linalg.svdvals(weight)[rank:].square().sum()
    torch.testing.assert_close(residual.square().sum(), tail, rtol=1e-9, atol=1e-9)


def test_factors_share_the_singular_value() -> None:
    weight = torch.randn(30, 20, generator=torch.Generator().manual_seed(0)).double() * 1e4
    a, b, _ = low_rank_split(weight, 4)
    sigma = torch.linalg.svdvals(weight)[:4]
    torch.testing.assert_close(torch.linalg.vector_norm(a, dim=0).square(), sigma)
    torch.testing.assert_close(torch.linalg.vector_norm(b, dim=0).square(), sigma)


def test_float32_result_keeps_the_product() -> None:
    weight = torch.randn(64, 96, generator=torch.Generator().manual_seed(1))
    x = torch.randn(9, 96, generator=torch.Generator().manual_seed(2))
    a, b, residual = low_rank_split(weight, 8)
    assert a.dtype == b.dtype == residual.dtype == torch.float32
    assert (x @ residual.T + (x @ b) @ a.T - x @ weight.T).abs().max() < 1e-4


def test_zero_and_rank_deficient_weights() -> None:
    a, b, residual = low_rank_split(torch.zeros(5, 3), 2)
    assert torch.equal(a @ b.T, torch.zeros(5, 3)) and torch.equal(residual, torch.zeros(5, 3))
    one = torch.ones(6, 4)
    a, b, residual = low_rank_split(one, 3)
    assert bool(torch.isfinite(a).all() and torch.isfinite(b).all())
    assert residual.abs().max() < 1e-6


def test_rank_zero_is_the_weight_itself() -> None:
    weight = torch.randn(3, 5, generator=torch.Generator().manual_seed(3))
    a, b, residual = low_rank_split(weight, 0)
    assert a.shape == (3, 0) and b.shape == (5, 0) and torch.equal(residual, weight)


@pytest.mark.parametrize("rank", [-1, 4])
def test_impossible_ranks_are_refused_by_name(rank: int) -> None:
    with pytest.raises(NumericsError, match=rf"rank {rank} is not within 0\.\.3"):
        low_rank_split(torch.ones(3, 5), rank)
