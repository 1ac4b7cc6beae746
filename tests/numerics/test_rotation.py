"""Block rotations are orthogonal, leave the layer alone, and are what an SVD says."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from omega_qvla.errors import NumericsError
from omega_qvla.numerics.hadamard import fwht, hadamard_matrix
from omega_qvla.numerics.rotation import (
    apply_blocks,
    apply_blocks_t,
    apply_output_rotation,
    block_sizes,
    build_output_rotation,
    build_rotation,
    undo_output_rotation,
)

KINDS = ("hadamard", "svd", "svd_hadamard")


def random(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def relative_error(reference: torch.Tensor, got: torch.Tensor) -> float:
    return float((reference - got).abs().max() / reference.abs().max().clamp_min(1e-30))


@settings(max_examples=60, deadline=None)
@given(
    width=st.integers(1, 200),
    out=st.integers(1, 80),
    kind=st.sampled_from(KINDS),
    block=st.sampled_from([1, 8, 64]),
    seed=st.integers(0, 99),
)
def test_rotation_is_orthogonal_and_the_product_unchanged(
    width: int, out: int, kind: str, block: int, seed: int
) -> None:
    weight, x = random(out, width, seed=seed), random(4, 2, width, seed=seed + 1)
    blocks = build_rotation(weight, kind, block)  # type: ignore[arg-type]
    sizes = block_sizes(width, block)
    assert blocks.shape == (len(sizes), block, block)
    for entry, size in zip(blocks, sizes, strict=True):
        core = entry[:size, :size]
        torch.testing.assert_close(core @ core.T, torch.eye(size), rtol=0, atol=2e-6)
        padded = torch.zeros(block, block)
        padded[:size, :size] = core
        assert torch.equal(entry, padded)
    product = apply_blocks(x, blocks) @ apply_blocks(weight, blocks).T
    assert relative_error(x @ weight.T, product) < 1e-5
    assert relative_error(x, apply_blocks_t(apply_blocks(x, blocks), blocks)) < 1e-5


@settings(max_examples=40, deadline=None)
@given(
    width=st.integers(1, 90),
    out=st.integers(1, 200),
    block=st.sampled_from([1, 8, 64]),
    seed=st.integers(0, 99),
)
def test_output_rotation_is_undone_exactly(width: int, out: int, block: int, seed: int) -> None:
    weight, x = random(out, width, seed=seed), random(5, width, seed=seed + 1)
    blocks = build_output_rotation(weight, block)
    y = undo_output_rotation(x @ apply_output_rotation(weight, blocks).T, blocks)
    assert relative_error(x @ weight.T, y) < 1e-5


def test_output_rotation_is_u_times_the_block_as_published() -> None:
    weight = random(128, 96, dtype=torch.float64)
    blocks = build_output_rotation(weight)
    rotated = apply_output_rotation(weight, blocks)
    for b in range(2):
        rows = weight[64 * b : 64 * (b + 1)]
        u, sigma, _ = torch.linalg.svd(rows, full_matrices=False)
        torch.testing.assert_close(
            (u.T @ blocks[b]).abs(), torch.eye(64, dtype=torch.float64), rtol=0, atol=1e-8
        )
        assert sigma[0] > sigma[-1]
        torch.testing.assert_close(rotated[64 * b : 64 * (b + 1)], blocks[b] @ rows)


def test_svd_blocks_are_left_singular_vectors_in_falling_order() -> None:
    weight = random(300, 100, dtype=torch.float64)
    blocks = build_rotation(weight, "svd")
    start = 0
    for entry, size in zip(blocks, block_sizes(100, 64), strict=True):
        u, _, _ = torch.linalg.svd(weight[:, start : start + size].T, full_matrices=False)
        ours = entry[:size, :size]
        torch.testing.assert_close(
            (u.T @ ours).abs(), torch.eye(size, dtype=torch.float64), rtol=0, atol=1e-8
        )
        start += size
    energy = apply_blocks(weight, blocks).square().sum(dim=0)
    assert bool((energy[:64].diff() <= 1e-9).all())


def test_svd_hadamard_is_the_svd_block_times_hadamard() -> None:
    weight = random(70, 96)
    svd = build_rotation(weight.double(), "svd")
    both = build_rotation(weight.double(), "svd_hadamard")
    torch.testing.assert_close(both[0], svd[0] @ hadamard_matrix(64, torch.float64))
    torch.testing.assert_close(
        both[1, :32, :32], svd[1, :32, :32] @ hadamard_matrix(32, torch.float64)
    )


@pytest.mark.parametrize("width", [1, 63, 64, 100, 192])
def test_hadamard_blocks_equal_the_fast_transform(width: int) -> None:
    x = random(3, width)
    blocks = build_rotation(random(2, width), "hadamard")
    torch.testing.assert_close(apply_blocks(x, blocks), fwht(x, 64), rtol=0, atol=2e-6)


def test_signs_do_not_depend_on_the_sign_or_row_order_of_the_weight() -> None:
    weight = random(90, 64)
    first = build_rotation(weight, "svd")
    torch.testing.assert_close(build_rotation(-weight, "svd"), first, rtol=0, atol=0)
    torch.testing.assert_close(build_rotation(weight.flip(0), "svd"), first, rtol=0, atol=1e-5)
    size = first[0].abs()
    lead = first[0].gather(0, size.argmax(dim=0, keepdim=True))
    assert bool((lead > 0).all())


@pytest.mark.parametrize("kind", KINDS)
def test_zero_rows_channels_and_whole_blocks_stay_orthogonal(kind: str) -> None:
    weight = random(40, 192)
    weight[3] = 0
    weight[:, 5] = 0
    weight[:, 64:128] = 0
    blocks = build_rotation(weight, kind)  # type: ignore[arg-type]
    for entry in blocks:
        torch.testing.assert_close(entry @ entry.T, torch.eye(64), rtol=0, atol=2e-6)
    x = random(7, 192, seed=4)
    assert (
        relative_error(x @ weight.T, apply_blocks(x, blocks) @ apply_blocks(weight, blocks).T)
        < 1e-5
    )


def test_empty_batches_pass_through() -> None:
    blocks = build_rotation(random(8, 128), "svd")
    assert apply_blocks(torch.zeros(0, 3, 128), blocks).shape == (0, 3, 128)


def test_float64_weights_give_float64_blocks_and_16_bit_ones_float32() -> None:
    assert build_rotation(random(8, 64, dtype=torch.float64), "svd").dtype == torch.float64
    assert build_rotation(random(8, 64).to(torch.bfloat16), "svd").dtype == torch.float32


def test_bad_inputs_are_refused_by_name() -> None:
    weight = random(8, 128)
    broken = weight.clone()
    broken[0, 0] = float("nan")
    with pytest.raises(NumericsError, match="NaN"):
        build_rotation(broken, "svd")
    with pytest.raises(NumericsError, match="non-empty matrix"):
        build_output_rotation(torch.zeros(0, 4))
    with pytest.raises(NumericsError, match="full_hadamard"):
        build_rotation(weight, "full_hadamard")  # type: ignore[arg-type]
    with pytest.raises(NumericsError, match="power of two"):
        build_rotation(weight, "svd", 48)
    blocks = build_rotation(weight, "svd")
    with pytest.raises(NumericsError, match="holds 2 blocks of 64, width 64 needs 1"):
        apply_blocks(random(2, 64), blocks)
    with pytest.raises(NumericsError, match=r"\[n_blocks, B, B\]"):
        apply_blocks(random(2, 64), blocks[0])
    with pytest.raises(NumericsError, match="floating point"):
        apply_blocks(torch.zeros(2, 128, dtype=torch.int32), blocks)
