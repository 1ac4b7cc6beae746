"""Metrics against numbers worked out by hand."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from omega_qvla.errors import NumericsError
from omega_qvla.numerics.metrics import (
    channel_ratio,
    cosine,
    cosine_rows,
    max_abs,
    nmse,
    sqnr_db,
)

T = torch.tensor


def test_hand_worked_values() -> None:
    assert nmse(T([3.0, 4.0]), T([3.0, 3.0])) == pytest.approx(1 / 25)
    assert sqnr_db(T([3.0, 4.0]), T([3.0, 3.0])) == pytest.approx(10 * math.log10(25))
    assert cosine(T([1.0, 0.0]), T([1.0, 1.0])) == pytest.approx(math.sqrt(0.5))
    assert cosine(T([[1.0], [2.0]]), T([[-1.0], [-2.0]])) == pytest.approx(-1.0)
    assert max_abs(T([1.0, -5.0]), T([2.0, -2.0])) == 3.0
    rows = cosine_rows(
        T([[1.0, 0.0], [0.0, 0.0], [0.0, 0.0]]), T([[1.0, 1.0], [0.0, 0.0], [1.0, 0]])
    )
    assert rows.tolist() == pytest.approx([math.sqrt(0.5), 1.0, 0.0])


def test_zero_references() -> None:
    zero, one = torch.zeros(3), torch.ones(3)
    assert nmse(zero, zero) == 0.0 and nmse(zero, one) == math.inf
    assert sqnr_db(zero, zero) == math.inf and sqnr_db(zero, one) == -math.inf
    assert cosine(zero, zero) == 1.0 and cosine(zero, one) == 0.0


@given(st.floats(1e-3, 1e3), st.integers(0, 99))
def test_scaling_both_changes_no_relative_metric(scale: float, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    r = torch.randn(4, 7, generator=generator).double()
    e = r + 0.1 * torch.randn(4, 7, generator=generator).double()
    assert nmse(r * scale, e * scale) == pytest.approx(nmse(r, e), rel=1e-9)
    assert cosine(r * scale, e) == pytest.approx(cosine(r, e), rel=1e-9)
    assert 0.0 < nmse(r, e) < 0.2 and -1.0 <= cosine(r, e) <= 1.0


def test_cosine_of_huge_and_tiny_vectors_neither_overflows_nor_vanishes() -> None:
    x = torch.tensor([3.0, 4.0], dtype=torch.float64)
    assert cosine(x * 1e200, x * 1e-200) == pytest.approx(1.0)


def test_channel_ratio_counts_the_worst_channel_against_the_median() -> None:
    x = torch.ones(2, 5, 9)
    x[1, 2, 4] = -30.0
    assert channel_ratio(x) == 30.0
    assert channel_ratio(torch.zeros(3, 4)) == 1.0
    assert channel_ratio(T([[0.0, 0.0, 5.0]])) == math.inf


def test_bad_inputs_are_refused_by_name() -> None:
    with pytest.raises(NumericsError, match="shapes differ"):
        nmse(torch.ones(2), torch.ones(3))
    with pytest.raises(NumericsError, match="at least one element"):
        cosine(torch.ones(0), torch.ones(0))
    with pytest.raises(NumericsError, match="estimate holds NaN"):
        max_abs(torch.ones(1), T([float("nan")]))
    with pytest.raises(NumericsError, match="non-empty"):
        channel_ratio(torch.ones(0, 3))
