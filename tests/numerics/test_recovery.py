"""Integers back from stored floats, bit by bit."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from omega_qvla.errors import NumericsError
from omega_qvla.numerics.qparams import expand_groups, group_count, qrange
from omega_qvla.numerics.recovery import recover_grid


def stored(
    seed: int, bits: int = 4, shape: tuple[int, int] = (5, 300), group: int | None = 128
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(q, scale float32, their product as float16), as the published builder makes them."""
    generator = torch.Generator().manual_seed(seed)
    low, high = qrange(bits)
    q = torch.randint(low, high + 1, shape, generator=generator)
    scale = torch.rand(shape[0], group_count(shape[1], group), generator=generator) * 0.05 + 1e-3
    return q, scale, (q * expand_groups(scale, shape[1], group)).to(torch.float16)


@given(st.integers(0, 10_000), st.sampled_from([2, 3, 4]), st.sampled_from([32, 128, None]))
@settings(max_examples=30, deadline=None)
def test_integers_come_back_and_reproduce_every_bit(
    seed: int, bits: int, group: int | None
) -> None:
    q, scale, weight = stored(seed, bits, group=group)
    found, step = recover_grid(weight, bits, group)
    assert torch.equal(found.long(), q)
    assert ((step / scale - 1).abs() < 2**-10).all()
    again = (found * expand_groups(step, weight.shape[1], group)).to(torch.float16)
    assert torch.equal(again, weight)


def test_weights_saved_in_32_bits_too() -> None:
    q, scale, _ = stored(1)
    weight = q * expand_groups(scale, q.shape[1], 128)
    found, step = recover_grid(weight)
    assert torch.equal(found.long(), q)
    assert ((step / scale - 1).abs() < 2**-22).all()


def test_a_common_factor_is_taken_out() -> None:
    weight = torch.tensor([[-6.0, 0.0, 2.0, 4.0]], dtype=torch.float16)
    q, scale = recover_grid(weight)
    assert q.tolist() == [[-3, 0, 1, 2]]
    assert scale.item() == pytest.approx(2.0, rel=1e-3)


def test_zeros_have_scale_one() -> None:
    q, scale = recover_grid(torch.zeros(2, 256, dtype=torch.float16))
    assert not q.any()
    assert (scale == 1).all()


def test_plus_eight_is_no_4_bit_integer() -> None:
    weight = torch.tensor([[8.0, 7.0, 1.0]], dtype=torch.float16)
    with pytest.raises(NumericsError, match="row 0, columns 0 to 2"):
        recover_grid(weight)
    assert recover_grid(-weight)[0].tolist() == [[-8, -7, -1]]


def test_one_value_off_the_grid_is_named() -> None:
    _, _, weight = stored(3)
    weight[4, 200] = weight[4, 128:256].abs().max() * 0.55  # 3.85 or 4.4 steps
    with pytest.raises(
        NumericsError, match=r"1 of 15 groups lie on no 4-bit grid.*row 4, columns 128"
    ):
        recover_grid(weight)


def test_four_units_in_the_last_place_are_off_the_grid() -> None:
    _, _, weight = stored(4)
    column = int(weight[0, :128].abs().argmax())
    weight[0, column] = weight[0, column] * (1 + 2**-8)
    with pytest.raises(NumericsError, match="row 0"):
        recover_grid(weight)


def test_weights_never_quantized_are_refused() -> None:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(4, 256, generator=generator).to(torch.float16)
    with pytest.raises(NumericsError, match="8 of 8 groups"):
        recover_grid(weight)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_other_dtypes_are_refused(dtype: torch.dtype) -> None:
    with pytest.raises(NumericsError, match="float16 or float32"):
        recover_grid(torch.ones(1, 4, dtype=dtype))


def test_a_scale_that_is_nearly_lost_in_16_bits_still_reproduces() -> None:
    q = torch.arange(-8, 8)[None].repeat(2, 8)
    weight = (q * torch.tensor([[3e-7], [4e-8]])).to(torch.float16)
    found, step = recover_grid(weight)
    assert torch.equal((found * step).to(torch.float16), weight)


@pytest.mark.parametrize("seed", range(20))
def test_many_layers_saved_in_32_bits(seed: int) -> None:
    q, scale, _ = stored(seed, shape=(40, 256))
    weight = q * expand_groups(scale, q.shape[1], 128)
    found, step = recover_grid(weight)
    assert torch.equal(found.long(), q)
    assert torch.equal(step.float(), scale)
