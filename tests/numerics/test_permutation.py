"""The zig-zag order against a slow loop, and inverses."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from omega_qvla.errors import NumericsError
from omega_qvla.numerics.permutation import inverse_permutation, zigzag_permutation


def slow_zigzag(energies: list[float]) -> list[int]:
    order = sorted(range(len(energies)), key=lambda i: -energies[i])
    result = []
    while order:
        result.append(order.pop(0))
        if order:
            result.append(order.pop())
    return result


def test_largest_smallest_second_largest_second_smallest() -> None:
    weight = torch.tensor([[1.0, -4.0, 2.0, 3.0, 0.0], [1.0, 4.0, 2.0, -3.0, 0.0]])
    assert zigzag_permutation(weight).tolist() == [1, 4, 3, 0, 2]


@settings(max_examples=80, deadline=None)
@given(st.integers(1, 6), st.integers(1, 150), st.integers(0, 999), st.integers(0, 3))
def test_matches_the_slow_loop_and_inverts(out: int, width: int, seed: int, ties: int) -> None:
    weight = torch.randn(out, width, generator=torch.Generator().manual_seed(seed)).double()
    weight[:, :ties] = 0.0  # equal energies keep their order
    permutation = zigzag_permutation(weight)
    assert permutation.tolist() == slow_zigzag(weight.square().mean(dim=0).tolist())
    inverse = inverse_permutation(permutation)
    assert torch.equal(weight[:, permutation][:, inverse], weight)
    x = torch.randn(3, width, generator=torch.Generator().manual_seed(seed + 1)).double()
    torch.testing.assert_close(x[:, permutation] @ weight[:, permutation].T, x @ weight.T)


def test_inverse_takes_the_stored_dtypes() -> None:
    permutation = torch.tensor([2, 0, 1], dtype=torch.int32)
    assert inverse_permutation(permutation).tolist() == [1, 2, 0]


@pytest.mark.parametrize("bad", [[0, 0, 1], [1, 2, 3], [-1, 0, 1], [[0, 1], [1, 0]]])
def test_what_is_no_permutation_is_refused(bad: list[int]) -> None:
    with pytest.raises(NumericsError, match="not a permutation"):
        inverse_permutation(torch.tensor(bad))


def test_bad_weights_are_refused_by_name() -> None:
    with pytest.raises(NumericsError, match="non-empty matrix"):
        zigzag_permutation(torch.zeros(3))
    with pytest.raises(NumericsError, match="NaN"):
        zigzag_permutation(torch.tensor([[float("inf"), 1.0]]))
    with pytest.raises(NumericsError, match="smooth"):
        zigzag_permutation(torch.ones(2, 2), smooth=1.5)
