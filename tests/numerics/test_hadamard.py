"""Hadamard matrices are genuine, and the fast transforms equal the dense products."""

from __future__ import annotations

import hashlib
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from omega_qvla.errors import NumericsError
from omega_qvla.numerics.hadamard import (
    BASE_ORDERS,
    base_matrix,
    block_sizes,
    full_hadamard,
    full_hadamard_t,
    fwht,
    fwht_t,
    hadamard_matrix,
    is_hadamard_width,
    random_signs,
)

WIDTHS = [1, 2, 4, 8, 64, 128, 2048, 12, 20, 28, 36, 24, 40, 56, 72, 576, 768, 1152, 1536, 3584]


@pytest.mark.parametrize("order", BASE_ORDERS)
def test_base_matrices_are_hadamard_in_exact_integers(order: int) -> None:
    h = base_matrix(order)
    assert set(h.flatten().tolist()) <= {1, -1}
    assert torch.equal(h @ h.T, order * torch.eye(order, dtype=torch.int64))
    assert torch.equal(h.T @ h, order * torch.eye(order, dtype=torch.int64))


@pytest.mark.parametrize(
    ("n", "digest"),
    [
        (12, "6e3ec5c5530c2de6"),
        (20, "9a66aa52b8d9c8ff"),
        (28, "e9a79502895728a8"),
        (36, "41a3f7927fa274b5"),
        (24, "68c20c75591d7021"),
    ],
)
def test_the_matrices_never_change(n: int, digest: str) -> None:
    # Packs store the signs only: another (equally valid) matrix would break every pack written.
    positive = bytes((hadamard_matrix(n) > 0).flatten().tolist())
    assert hashlib.sha256(positive).hexdigest()[:16] == digest


def test_sylvester_entries_are_the_parity_of_common_bits() -> None:
    h = hadamard_matrix(16, torch.float64) * 4
    for i in range(16):
        for j in range(16):
            assert h[i, j] == (-1) ** bin(i & j).count("1")


@pytest.mark.parametrize("n", WIDTHS)
def test_full_transform_equals_the_dense_product(n: int) -> None:
    generator = torch.Generator().manual_seed(n)
    x = torch.randn(2, 3, n, dtype=torch.float64, generator=generator)
    signs = random_signs(n, seed=5)
    h = hadamard_matrix(n, torch.float64)
    torch.testing.assert_close(full_hadamard(x), x @ h, rtol=0, atol=1e-11)
    torch.testing.assert_close(full_hadamard(x, signs), (x * signs) @ h, rtol=0, atol=1e-11)
    torch.testing.assert_close(full_hadamard_t(x, signs), (x @ h.T) * signs, rtol=0, atol=1e-11)


@pytest.mark.parametrize("n", [12, 28, 64, 576, 2048])
def test_normalized_matrices_are_orthogonal(n: int) -> None:
    h = hadamard_matrix(n, torch.float64)
    torch.testing.assert_close(h @ h.T, torch.eye(n, dtype=torch.float64), rtol=0, atol=1e-12)
    assert torch.allclose(h.abs(), torch.full_like(h, 1 / math.sqrt(n)))


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 300), st.sampled_from([1, 2, 16, 64, 256]), st.booleans(), st.integers(0, 9))
def test_fwht_is_the_block_diagonal_product(
    width: int, block: int, signed: bool, seed: int
) -> None:
    x = torch.randn(3, width, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    signs = random_signs(width, seed) if signed else None
    sizes = block_sizes(width, block)
    dense = torch.block_diag(*[hadamard_matrix(size, torch.float64) for size in sizes])
    expected = (x if signs is None else x * signs) @ dense
    got = fwht(x, block, signs)
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-11)
    torch.testing.assert_close(fwht_t(got, block, signs), x, rtol=0, atol=1e-11)


@settings(max_examples=100, deadline=None)
@given(st.integers(1, 5000), st.sampled_from([1, 2, 8, 64, 128]))
def test_block_sizes_cover_the_width_with_falling_powers_of_two(width: int, block: int) -> None:
    sizes = block_sizes(width, block)
    assert sum(sizes) == width
    assert all(size & (size - 1) == 0 and size <= block for size in sizes)
    tail = [size for size in sizes if size < block]
    assert sizes == tuple(sorted(sizes, reverse=True))
    assert len(set(tail)) == len(tail)


def test_hadamard_widths_by_brute_force() -> None:
    possible = {m << k for m in BASE_ORDERS for k in range(13)}
    assert [n for n in range(-2, 4097) if is_hadamard_width(n)] == sorted(
        n for n in possible if n <= 4096
    )


def test_a_spike_becomes_flat() -> None:
    x = torch.zeros(1, 576)
    x[0, 77] = 48.0
    torch.testing.assert_close(full_hadamard(x).abs(), torch.full((1, 576), 2.0))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_sixteen_bit_inputs_stay_accurate_and_in_range(dtype: torch.dtype) -> None:
    x = torch.full((1, 2048), 100.0, dtype=dtype)  # unnormalized sums would reach 204,800
    y = full_hadamard(x).to(torch.float64)
    assert y[0, 0].item() == pytest.approx(100.0 * math.sqrt(2048), rel=8e-3)
    assert y[0, 1:].abs().max() == 0


def test_signs_are_reproducible_and_balanced() -> None:
    signs = random_signs(4096, 1)
    assert signs.dtype == torch.int8 and set(signs.tolist()) == {1, -1}
    assert torch.equal(signs, random_signs(4096, 1))
    assert not torch.equal(signs, random_signs(4096, 2))
    assert abs(int(signs.sum())) < 5 * 64


def test_first_use_in_inference_mode_does_not_poison_autograd() -> None:
    with torch.inference_mode():
        full_hadamard(torch.ones(1, 224))
    x = torch.ones(1, 224, requires_grad=True)
    full_hadamard(x).square().sum().backward()
    assert x.grad is not None
    torch.testing.assert_close(x.grad, torch.full((1, 224), 2.0))


def test_inputs_are_left_alone_and_never_shared() -> None:
    for width in (1, 64, 100):
        x = torch.ones(2, width)
        y = fwht(x, 64)
        y.zero_()
        assert torch.equal(x, torch.ones(2, width))


@pytest.mark.parametrize("width", [0, 3, 6, 44, 60, 704])
def test_impossible_full_widths_are_refused_by_name(width: int) -> None:
    with pytest.raises(NumericsError, match=f"width {width}"):
        full_hadamard(torch.zeros(1, width))
    with pytest.raises(NumericsError, match=f"width {width}"):
        hadamard_matrix(width)


def test_other_bad_inputs_are_refused_by_name() -> None:
    with pytest.raises(NumericsError, match="power of two"):
        fwht(torch.zeros(1, 96), block=48)
    with pytest.raises(NumericsError, match="floating point"):
        fwht(torch.zeros(1, 64, dtype=torch.int8))
    with pytest.raises(NumericsError, match=r"signs must have shape \[64\]"):
        fwht(torch.zeros(1, 64), signs=random_signs(32, 0))
    with pytest.raises(NumericsError, match="signs must have shape"):
        full_hadamard(torch.zeros(1, 64), random_signs(32, 0))
    with pytest.raises(NumericsError, match="width must be at least 1"):
        fwht(torch.zeros(1, 0))
    with pytest.raises(NumericsError, match="order 16"):
        base_matrix(16)
    with pytest.raises(NumericsError, match="scalar"):
        fwht(torch.tensor(1.0))
    with pytest.raises(NumericsError, match="at least 1"):
        random_signs(0, 0)
