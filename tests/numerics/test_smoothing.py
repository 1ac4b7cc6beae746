"""Profiles by hand, divisors usable, and every fold leaves the network's function alone."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional

from omega_qvla.errors import NumericsError
from omega_qvla.numerics.smoothing import (
    DIVISOR_LIMIT,
    fold_into_columns,
    fold_into_modulation,
    fold_into_norm,
    fold_into_rows,
    plain_profile,
    robust_energy,
    robust_profile,
    smoothing_divisor,
    tie_over_heads,
    value_divisor,
    weight_profile,
)


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).double()


def divisor(n: int, seed: int = 9) -> Tensor:
    return torch.exp(random(n, seed=seed))


def same(a: Tensor, b: Tensor) -> None:
    torch.testing.assert_close(a, b, rtol=0, atol=1e-11 * float(a.abs().max()))


# profiles and divisors


def test_robust_profile_by_hand() -> None:
    # rows normalized by their own rms: [0, sqrt2], [sqrt2, 0]; the zero token does not count
    x = torch.tensor([[0.0, 5.0], [1000.0, 0.0], [0.0, 0.0]])
    torch.testing.assert_close(robust_profile(x), torch.tensor([1.0, 1.0]))
    torch.testing.assert_close(plain_profile(x)[0], torch.tensor(1000.0 / 3**0.5))


def test_one_massive_token_owns_the_plain_profile_but_not_the_robust_one() -> None:
    x = random(512, 32)
    clean = robust_profile(x)
    x[17, 3] = 2e4
    assert plain_profile(x)[3] / plain_profile(x)[4] > 500
    assert (robust_profile(x) / clean).max() < 1.06


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 30), st.integers(1, 40), st.integers(0, 99))
def test_robust_profile_ignores_token_gain_and_batches_add_up(
    n: int, width: int, seed: int
) -> None:
    x = random(n, width, seed=seed)
    gain = torch.exp(3 * random(n, 1, seed=seed + 1))
    torch.testing.assert_close(robust_profile(x * gain), robust_profile(x))
    (first, a), (second, b) = robust_energy(x[: n // 2 + 1]), robust_energy(x)
    torch.testing.assert_close(robust_energy(torch.cat((x[: n // 2 + 1], x)))[0], first + second)
    assert a + b == n // 2 + 1 + n
    assert robust_profile(x).square().mean().item() == pytest.approx(1.0, rel=1e-5)


def test_profiles_survive_extreme_values() -> None:
    x = torch.tensor([[1e30, 1e-30], [1e-38, 1e-38], [0.0, 0.0]])
    assert bool(torch.isfinite(robust_profile(x)).all())
    assert torch.equal(robust_profile(torch.zeros(4, 3)), torch.zeros(3))


def test_weight_profile_is_the_rms_over_all_rows_of_all_consumers() -> None:
    q, k = random(8, 5), random(2, 5, seed=1)
    expected = torch.cat((q, k)).square().mean(dim=0).sqrt().float()
    torch.testing.assert_close(weight_profile([q, k]), expected)


def test_divisor_is_the_formula_up_to_a_common_factor() -> None:
    x, w = random(64).abs() + 0.1, random(64, seed=1).abs() + 0.1
    for alpha in (0.0, 0.3, 0.5, 1.0):
        d = smoothing_divisor(x, w, alpha).double()
        formula = x**alpha / w ** (1 - alpha)
        torch.testing.assert_close(d / d[0], formula / formula[0], rtol=1e-5, atol=0)
        assert d.log().mean().abs() < 1e-6


@settings(max_examples=80, deadline=None)
@given(
    st.lists(st.tuples(st.floats(0, 1e30), st.floats(0, 1e30)), min_size=1, max_size=40),
    st.floats(0, 1),
)
def test_divisor_is_finite_positive_and_fits_float16(
    profiles: list[tuple[float, float]], alpha: float
) -> None:
    x, w = torch.tensor(profiles, dtype=torch.float64).T
    d = smoothing_divisor(x, w, alpha)
    half = d.to(torch.float16)
    assert bool(torch.isfinite(half).all()) and bool((half > 0).all())
    assert bool((d <= DIVISOR_LIMIT).all()) and bool((d >= 1 / DIVISOR_LIMIT).all())
    dead = (x == 0) | (w == 0)
    assert torch.equal(d[dead], torch.ones_like(d[dead]))


def test_half_smoothing_shares_the_range_evenly_and_keeps_the_product() -> None:
    x, weight = random(256, 16), random(8, 16, seed=1)
    x[:, 5] *= 100
    x_profile, w_profile = plain_profile(x), weight_profile([weight])
    d = smoothing_divisor(x_profile, w_profile, 0.5).double()
    folded = fold_into_columns(weight, d)
    shared = (x_profile * w_profile).sqrt()  # alpha = 1/2: both sides end with this profile
    for profile in (plain_profile(x / d), weight_profile([folded])):
        torch.testing.assert_close(profile / profile[0], shared / shared[0], rtol=1e-5, atol=0)
    same(x @ weight.T, (x / d) @ folded.T)


# folds: each compares the whole little network before and after


@pytest.mark.parametrize("convention", ["plain", "one_plus"])
def test_fold_into_rmsnorm(convention: str) -> None:
    x, gain, weight, d = random(6, 16), random(16, seed=1), random(9, 16, seed=2), divisor(16)
    new_gain, none = fold_into_norm(gain, d, convention=convention)  # type: ignore[arg-type]
    assert none is None
    one = 1.0 if convention == "one_plus" else 0.0
    normed = x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt()
    before = (normed * (one + gain)) @ weight.T
    same(before, (normed * (one + new_gain)) @ fold_into_columns(weight, d).T)


def test_fold_into_layernorm() -> None:
    x, gain, bias, weight = random(6, 16), random(16, seed=1), random(16, seed=3), random(9, 16)
    d = divisor(16)
    new_gain, new_bias = fold_into_norm(gain, d, bias)
    before = functional.layer_norm(x, (16,), gain, bias) @ weight.T
    same(
        before, functional.layer_norm(x, (16,), new_gain, new_bias) @ fold_into_columns(weight, d).T
    )


@pytest.mark.parametrize(
    ("chunks", "scale", "shift"), [(3, 0, 1), (2, 0, 1), (2, 1, 0), (1, 0, None)]
)
def test_fold_into_modulation(chunks: int, scale: int, shift: int | None) -> None:
    width = 16
    cond, mod, bias = (
        random(4, 7),
        random(chunks * width, 7, seed=1),
        random(chunks * width, seed=2),
    )
    x, weight, d = random(4, 5, width, seed=3), random(9, width, seed=4), divisor(width)

    def modulate(mod_weight: Tensor, mod_bias: Tensor) -> tuple[Tensor, ...]:
        parts = (cond @ mod_weight.T + mod_bias).view(4, chunks, width)
        normed = functional.layer_norm(x, (width,))
        out = normed * (1 + parts[:, None, scale])
        out = out if shift is None else out + parts[:, None, shift]
        rest = [parts[:, i] for i in range(chunks) if i not in (scale, shift)]
        return out, *rest

    new_mod, new_bias = fold_into_modulation(mod, bias, d, scale_chunk=scale, shift_chunk=shift)
    before, *gates = modulate(mod, bias)
    after, *new_gates = modulate(new_mod, new_bias)
    same(before @ weight.T, after @ fold_into_columns(weight, d).T)
    for gate, new_gate in zip(gates, new_gates, strict=True):
        assert torch.equal(gate, new_gate)


def test_fold_into_up_rows() -> None:
    x, gate, up, down = random(5, 8), random(12, 8, seed=1), random(12, 8, seed=2), random(8, 12)
    bias, d = random(12, seed=3), divisor(12)
    new_up, new_bias = fold_into_rows(up, d, bias)
    assert new_bias is not None
    act = functional.gelu(x @ gate.T, approximate="tanh")
    before = (act * (x @ up.T + bias)) @ down.T
    same(before, (act * (x @ new_up.T + new_bias)) @ fold_into_columns(down, d).T)


@pytest.mark.parametrize(("num_q", "num_kv"), [(8, 1), (6, 2), (4, 4)])
def test_fold_into_v_rows_under_grouped_query_attention(num_q: int, num_kv: int) -> None:
    dim, tokens, width = 4, 5, 10
    q, k = random(1, num_q, tokens, dim), random(1, num_kv, tokens, dim, seed=1)
    x, v, o = (
        random(tokens, width, seed=2),
        random(num_kv * dim, width, seed=3),
        random(7, num_q * dim),
    )

    def attend(v_weight: Tensor, o_weight: Tensor) -> Tensor:
        value = (x @ v_weight.T).view(1, tokens, num_kv, dim).transpose(1, 2)
        heads = functional.scaled_dot_product_attention(q, k, value, enable_gqa=True)
        return heads.transpose(1, 2).reshape(tokens, num_q * dim) @ o_weight.T

    tied = tie_over_heads(divisor(num_q * dim), num_q, num_kv, dim)
    new_v, _ = fold_into_rows(v, value_divisor(tied, num_q, num_kv, dim))
    same(attend(v, o), attend(new_v, fold_into_columns(o, tied)))


def test_tie_is_the_geometric_mean_over_the_query_heads_of_one_v_head() -> None:
    d = torch.tensor([1.0, 2.0, 4.0, 8.0, 3.0, 5.0, 27.0, 125.0])  # 4 query heads of 2, 2 v heads
    tied = tie_over_heads(d, 4, 2, 2)
    expected = torch.tensor([2.0, 4.0, 2.0, 4.0, 9.0, 25.0, 9.0, 25.0])
    torch.testing.assert_close(tied, expected)
    torch.testing.assert_close(value_divisor(tied, 4, 2, 2), torch.tensor([2.0, 4.0, 9.0, 25.0]))


def test_folds_keep_the_dtype_and_leave_their_inputs_alone() -> None:
    weight, bias, d = random(6, 3).float(), random(6).float(), divisor(3).float()
    kept = weight.clone(), bias.clone()
    new_weight, new_bias = fold_into_modulation(weight, bias, d, scale_chunk=0, shift_chunk=1)
    assert new_weight.dtype == new_bias.dtype == torch.float32
    assert torch.equal(weight, kept[0]) and torch.equal(bias, kept[1])


def test_bad_inputs_are_refused_by_name() -> None:
    ones = torch.ones(4)
    with pytest.raises(NumericsError, match="finite and positive"):
        fold_into_norm(ones, torch.tensor([1.0, 0.0, 1.0, 1.0]))
    with pytest.raises(NumericsError, match=r"divisor must have shape \[4\]"):
        fold_into_columns(torch.ones(2, 4), torch.ones(3))
    with pytest.raises(NumericsError, match="convention"):
        fold_into_norm(ones, ones, convention="two_plus")  # type: ignore[arg-type]
    with pytest.raises(NumericsError, match="without bias"):
        fold_into_modulation(torch.ones(8, 2), None, ones, scale_chunk=0, shift_chunk=1)
    with pytest.raises(NumericsError, match="no multiple of width 4"):
        fold_into_modulation(torch.ones(9, 2), torch.ones(9), ones, scale_chunk=0, shift_chunk=1)
    with pytest.raises(NumericsError, match="chunk 2"):
        fold_into_modulation(torch.ones(8, 2), torch.ones(8), ones, scale_chunk=0, shift_chunk=2)
    with pytest.raises(NumericsError, match="do not divide"):
        tie_over_heads(torch.ones(12), 3, 2, 4)
    with pytest.raises(NumericsError, match="tie_over_heads first"):
        value_divisor(torch.tensor([1.0, 2.0]), 2, 1, 1)
    with pytest.raises(NumericsError, match="negative"):
        smoothing_divisor(-ones, ones)
    with pytest.raises(NumericsError, match="NaN"):
        smoothing_divisor(ones * float("nan"), ones)
    with pytest.raises(NumericsError, match="alpha"):
        smoothing_divisor(ones, ones, alpha=1.5)
    with pytest.raises(NumericsError, match="weight profile must have shape"):
        smoothing_divisor(ones, torch.ones(3))
    with pytest.raises(NumericsError, match="widths 3 and 4"):
        weight_profile([torch.ones(2, 3), torch.ones(2, 4)])
    with pytest.raises(NumericsError, match="at least one weight"):
        weight_profile([])
    with pytest.raises(NumericsError, match="activations must be a non-empty matrix"):
        robust_profile(torch.zeros(0, 4))
