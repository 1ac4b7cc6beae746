"""Weight scales are the best of their grid, finite, positive, and exactly what can be stored."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from omega_qvla.errors import NumericsError
from omega_qvla.numerics.qparams import (
    GRIDS,
    expand_groups,
    group_count,
    qrange,
    rounding_error,
    split_groups,
    storable,
    weight_scales,
    widest_scale,
)

GRID_NAMES = ("paper", "fine", "max")


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def squared_error(row: torch.Tensor, scale: float, bits: int) -> float:
    low, high = qrange(bits)
    rounded = [min(max(round(w / scale), low), high) * scale for w in row.double().tolist()]
    return sum((w - r) ** 2 for w, r in zip(row.double().tolist(), rounded, strict=True))


@settings(max_examples=60, deadline=None)
@given(
    out=st.integers(1, 5),
    width=st.integers(1, 40),
    group=st.one_of(st.none(), st.integers(1, 50)),
    grid=st.sampled_from(GRID_NAMES),
    bits=st.sampled_from([2, 3, 4]),
    log_size=st.integers(-12, 12),
    seed=st.integers(0, 999),
)
def test_the_best_candidate_by_brute_force(
    out: int, width: int, group: int | None, grid: str, bits: int, log_size: int, seed: int
) -> None:
    weight = random(out, width, seed=seed) * 10.0**log_size
    scales = weight_scales(weight, bits, group, grid)  # type: ignore[arg-type]
    assert scales.shape == (out, group_count(width, group))
    assert bool((torch.isfinite(scales) & (scales > 0)).all())
    size = width if group is None else group
    for r in range(out):
        for g in range(scales.shape[1]):
            part = weight[r, g * size : (g + 1) * size]
            peak = float(part.abs().max())
            candidates = [peak / qrange(bits)[1] * f for f in (1.0, *GRIDS[grid])]  # type: ignore[index]
            best = min(squared_error(part, s, bits) for s in candidates)
            assert squared_error(part, float(scales[r, g]), bits) <= best * 1.001 + 1e-12 * peak**2


@pytest.mark.parametrize("grid", GRID_NAMES)
@pytest.mark.parametrize("store", [None, torch.float16])
def test_zero_rows_and_groups_get_one(grid: str, store: torch.dtype | None) -> None:
    weight = random(3, 10)
    weight[1] = 0
    weight[2, 4:8] = 0
    scales = weight_scales(weight, 4, 4, grid, store=store)  # type: ignore[arg-type]
    assert torch.equal(scales[1], torch.ones(3))
    assert float(scales[2, 1]) == 1.0
    assert torch.equal(weight_scales(torch.zeros(2, 5), store=store), torch.ones(2, 1))


def test_max_is_absmax_over_seven_and_no_grid_is_worse() -> None:
    weight = random(64, 96)
    scale = weight_scales(weight, grid="max")
    torch.testing.assert_close(scale[:, 0], weight.abs().amax(1) / 7)
    for grid in ("paper", "fine"):
        finer = weight_scales(weight, grid=grid)  # type: ignore[arg-type]
        for r in range(64):
            assert squared_error(weight[r], float(finer[r]), 4) <= (
                squared_error(weight[r], float(scale[r]), 4) + 1e-9
            )


@pytest.mark.parametrize("grid", GRID_NAMES)
def test_stored_scales_survive_the_round_trip(grid: str) -> None:
    weight = random(16, 64) * torch.logspace(-4, 2, 16)[:, None]
    scales = weight_scales(weight, 4, 16, grid, store=torch.float16)  # type: ignore[arg-type]
    assert torch.equal(scales, scales.half().float())


def test_a_vanishing_row_is_kept_and_a_vanishing_layer_refused() -> None:
    weight = torch.stack((random(8), random(8, seed=1) * 1e-12))
    scales = weight_scales(weight, store=torch.float16)
    assert float(scales.half().min()) > 0
    with pytest.raises(NumericsError, match="lost in"):
        weight_scales(weight[1:], store=torch.float16)
    with pytest.raises(NumericsError, match="overflows"):
        weight_scales(weight * 1e6, store=torch.float16)
    assert bool((weight_scales(weight[1:]) > 0).all())


@pytest.mark.parametrize(
    "weight, message",
    [
        (torch.tensor([[1.0, float("nan")]]), "finite"),
        (torch.tensor([[1.0, float("inf")]]), "finite"),
        (torch.ones(4), "matrix"),
        (torch.ones(0, 4), "matrix"),
        (torch.ones(2, 2, dtype=torch.int8), "floating"),
    ],
)
def test_impossible_weights_are_refused(weight: torch.Tensor, message: str) -> None:
    with pytest.raises(NumericsError, match=message):
        weight_scales(weight)


def test_groups_expand_and_split() -> None:
    scale = torch.tensor([[1.0, 2.0, 3.0]])
    assert expand_groups(scale, 5, 2).tolist() == [[1, 1, 2, 2, 3]]
    assert expand_groups(scale[:, :1], 4, None).tolist() == [[1, 1, 1, 1]]
    with pytest.raises(NumericsError, match="do not cover"):
        expand_groups(scale, 7, 2)
    with pytest.raises(NumericsError, match="at least one column"):
        weight_scales(torch.ones(1, 4), group=0)
    assert split_groups(torch.arange(5.0), 2).tolist() == [[0, 1], [2, 3], [4, 0]]


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_a_signed_scale_takes_the_largest_to_the_lowest_integer(bits: int) -> None:
    low, _ = qrange(bits)
    weight = random(50, 48, seed=bits)
    blocks = split_groups(weight, 16)
    scale = widest_scale(blocks, bits, signed=True)
    at = blocks.abs().argmax(-1, keepdim=True)
    largest = blocks.gather(-1, at).squeeze(-1)
    assert torch.equal((largest / scale).round(), torch.full_like(scale, low))
    assert torch.equal(scale > 0, largest < 0)
    assert torch.allclose(scale.abs(), largest.abs() / -low)


def test_of_two_as_large_the_negative_one_counts_and_zeros_keep_a_positive_scale() -> None:
    blocks = torch.tensor([[3.0, -3.0], [-3.0, 3.0], [0.0, 0.0], [1.0, 3.0]])
    assert widest_scale(blocks, 4, signed=True).tolist() == [0.375, 0.375, 0.0, -0.375]
    assert weight_scales(blocks, grid="max", signed=True)[2].item() == 1.0


@pytest.mark.parametrize("grid", GRID_NAMES)
@pytest.mark.parametrize("group", [None, 64])
def test_signed_scales_round_more_finely(grid: str, group: int | None) -> None:
    """Of normal weights 4 to 25% of the squared error goes; measured, the least of the grids."""
    weight = random(64, 256, seed=3)
    plain, signed = (
        weight_scales(weight, 4, group, grid, store=torch.float16, signed=sign)  # type: ignore[arg-type]
        for sign in (False, True)
    )
    blocks = split_groups(weight, group)
    before, after = (float(rounding_error(blocks, s, 4).sum()) for s in (plain, signed))
    assert after < 0.97 * before
    assert torch.equal(signed, signed.half().float())


def test_a_negative_scale_is_stored_with_its_sign() -> None:
    scale = torch.tensor([-1e-12, 1e-12, -0.1, 0.0, -1e9])
    stored = storable(scale, torch.float16)
    assert stored.sign().tolist() == [-1, 1, -1, 1, -1]
    assert bool((stored != 0).all()) and torch.equal(stored, stored.half().float())
