"""The factor that GPTQ rounds by, in the Hessian's memory; and GPTQ where it is large."""

from __future__ import annotations

import pytest
import torch

from omega_qvla.errors import NumericsError
from omega_qvla.numerics import factor as factors
from omega_qvla.numerics import gptq as module
from omega_qvla.numerics import symmetric
from omega_qvla.numerics.gptq import gptq, objective, row_objective
from omega_qvla.numerics.qparams import expand_groups
from omega_qvla.numerics.rtn import round_weight

#: Sizes below and above the block of 512 that large matrices are worked on in.
WIDTHS = (1, 9, 512, 700, 1300)


def tokens(count: int, width: int, seed: int = 0, massive: float = 0.0) -> torch.Tensor:
    """Correlated float64 tokens; with `massive`, channel 1 is that large in every 50th."""
    generator = torch.Generator().manual_seed(seed)
    base = torch.randn(count, width, generator=generator, dtype=torch.float64)
    mix = torch.randn(width, width, generator=generator, dtype=torch.float64) * width**-0.5
    x = base @ mix + 0.1 * torch.randn(count, width, generator=generator, dtype=torch.float64)
    x[::50, 1 % width] += massive
    return x


def gram(x: torch.Tensor) -> torch.Tensor:
    h = x.T @ x / len(x)
    return (h + h.T) / 2


@pytest.mark.parametrize("width", WIDTHS)
def test_the_factor_gives_back_the_damped_hessian(width: int) -> None:
    h = gram(tokens(3 * width, width))
    m, added = factors.factor(h, 0.01)
    assert torch.equal(m, m.triu())
    assert added == pytest.approx(0.01 * float(h.diagonal().mean()))
    damped = h + added * torch.eye(width, dtype=h.dtype)
    torch.testing.assert_close(m @ m.T, damped, rtol=1e-10, atol=1e-10)


def test_it_is_the_inverse_of_the_factor_of_the_inverse() -> None:
    """U with U^T U = H^-1, upper: what GPTQ is written with."""
    h = gram(tokens(200, 40))
    m, added = factors.factor(h, 0.05)
    inverse = torch.linalg.inv(h + added * torch.eye(40, dtype=h.dtype))
    u = torch.linalg.cholesky(inverse, upper=True)
    torch.testing.assert_close(torch.linalg.inv(u), m, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("width", [9, 700])
def test_below_the_diagonal_the_hessian_stays(width: int) -> None:
    h = gram(tokens(3 * width, width))
    used = h.clone()
    assert factors.factor_(used, 0.01) is not None
    assert torch.equal(used.tril(-1), h.tril(-1))


@pytest.mark.parametrize("width", [9, 700])
def test_a_failed_try_leaves_the_hessian_whole(width: int) -> None:
    h = gram(tokens(3 * width, width))
    h[0, 0] = 1e-12  # indefinite: the first pivot, found last, is negative
    used = h.clone()
    assert factors.factor_(used, 1e-9, tries=2) is None
    assert torch.equal(used, h)


def test_damping_grows_until_it_works() -> None:
    h = torch.tensor([[1.0, 1.02], [1.02, 1.0]], dtype=torch.float64)
    _, added = factors.factor(h, 0.003)
    assert added == pytest.approx(0.03)  # the smallest eigenvalue is -0.02
    with pytest.raises(NumericsError, match="semi-definite"):
        factors.factor(torch.tensor([[1.0, 5e5], [5e5, 1.0]]), 0.01)
    with pytest.raises(NumericsError, match="not finite"):
        factors.factor(torch.full((2, 2), float("inf")), 0.01)


def test_columns_without_tokens_are_uncoupled() -> None:
    x = tokens(60, 12)
    x[:, [2, 7]] = 0
    m, added = factors.factor(gram(x), 0.01)
    live = gram(x).diagonal()
    mean = float(live[live > 0].mean())
    for dead in (2, 7):
        assert float(m[dead, dead]) == pytest.approx((mean + added) ** 0.5)
        assert float(m[dead].abs().sum() - m[dead, dead]) == 0
        assert float(m[:, dead].abs().sum() - m[dead, dead]) == 0


@pytest.mark.parametrize("width", WIDTHS)
def test_symmetric_helpers(width: int) -> None:
    x = tokens(30, width).float()
    upper = symmetric.add_gram_(torch.zeros(width, width), x)
    full = symmetric.mirror_(upper, to="lower")
    torch.testing.assert_close(full, x.T @ x, rtol=1e-5, atol=1e-4)
    assert torch.equal(full, full.T)
    lower = full.tril()
    assert torch.equal(symmetric.mirror_(lower, to="upper"), full)
    turned = symmetric.both_sides_(full.clone(), lambda rows: rows.flip(-1))
    assert torch.equal(turned, full.flip(0, 1))


@pytest.mark.parametrize("act_order", [False, True])
@pytest.mark.parametrize("massive", [0.0, 3e3])
@pytest.mark.parametrize("group", [None, 64])
def test_in_place_in_float32_rounds_as_in_float64(
    monkeypatch: pytest.MonkeyPatch, act_order: bool, massive: float, group: int | None
) -> None:
    """Integers equal but for ties (none here), also where two channels own the Hessian: its
    condition number is 10^8 without damping, 10^5 with it."""
    generator = torch.Generator().manual_seed(3)
    weight = torch.randn(48, 700, generator=generator)
    h = gram(tokens(1500, 700, massive=massive)).float()
    exact, scale = gptq(weight, h, group=group, act_order=act_order)
    monkeypatch.setattr(module, "EXACT_UP_TO", 0)
    large, scale_too = gptq(weight, h, group=group, act_order=act_order)
    consumed, _ = gptq(weight, h.clone(), group=group, act_order=act_order, consume=True)
    assert torch.equal(scale, scale_too)
    assert torch.equal(large, consumed)
    step = expand_groups(scale, 700, group)
    assert float((large != exact).float().mean()) < 1e-4
    reached, wanted = objective(weight, large * step, h), objective(weight, exact * step, h)
    assert reached == pytest.approx(wanted, rel=1e-3)
    nearest = round_weight(weight, scale, 4, group)
    plain = row_objective(weight, nearest * step, h)
    assert bool((row_objective(weight, large * step, h) <= plain * (1 + 1e-4)).all())


def test_where_float32_does_not_suffice_float64_does(monkeypatch: pytest.MonkeyPatch) -> None:
    """Twin channels, a last digit apart: damping that float32 cannot add to 1."""
    monkeypatch.setattr(module, "EXACT_UP_TO", 0)
    h = torch.tensor([[1.0, 1.0000001], [1.0000001, 1.0]])
    assert factors.factor_(h.clone(), 3e-12, tries=1) is None
    weight = torch.randn(8, 2, generator=torch.Generator().manual_seed(4))
    q, scale = gptq(weight, h, damp=3e-12)
    nearest = round_weight(weight, scale)
    assert objective(weight, q * scale, h) <= objective(weight, nearest * scale, h) + 1e-6


def test_plain_rounding_is_kept_where_it_is_better(monkeypatch: pytest.MonkeyPatch) -> None:
    """As in float64: the rows that fall back are the same."""
    h, weight = (
        gram(tokens(64, 16)),
        torch.randn(64, 16, generator=torch.Generator().manual_seed(1)),
    )
    exact, scale = gptq(weight, h)
    monkeypatch.setattr(module, "EXACT_UP_TO", 0)
    large, _ = gptq(weight, h)
    nearest = round_weight(weight, scale)
    kept = (exact == nearest).all(1)
    assert torch.equal((large == nearest).all(1), kept)
