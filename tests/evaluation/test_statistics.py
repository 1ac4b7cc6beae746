import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from omega_qvla.errors import EvaluationError
from omega_qvla.evaluation.statistics import (
    PairedTable,
    mcnemar,
    paired_difference,
    paired_table,
    wilson,
)


@given(st.integers(1, 500), st.data())
def test_wilson_agrees_with_scipy(n, data):
    k = data.draw(st.integers(0, n))
    z = stats.norm.ppf(0.975)
    expected = stats.binomtest(k, n).proportion_ci(0.95, method="wilson")
    assert wilson(k, n, z) == pytest.approx((expected.low, expected.high), abs=1e-9)


def test_wilson_by_hand():
    # 8 of 10: (0.8 + 1.96^2/20 -+ 1.96 sqrt(0.016 + 1.96^2/400)) / (1 + 1.96^2/10)
    assert wilson(8, 10) == pytest.approx((0.4902, 0.9433), abs=1e-4)
    assert wilson(0, 20)[0] == 0.0
    assert wilson(20, 20)[1] == 1.0


@pytest.mark.parametrize(("k", "n"), [(0, 0), (3, 2), (-1, 5)])
def test_wilson_refuses_impossible_counts(k, n):
    with pytest.raises(EvaluationError):
        wilson(k, n)


@given(st.integers(0, 200), st.integers(0, 200))
def test_mcnemar_is_the_exact_binomial_test(b, c):
    expected = stats.binomtest(b, b + c, 0.5).pvalue if b + c else 1.0
    assert mcnemar(b, c) == pytest.approx(expected, rel=1e-9)


def test_mcnemar_survives_counts_that_underflow():
    assert mcnemar(1000, 1500) < 1e-20
    assert math.isfinite(mcnemar(3000, 3000))


def test_paired_table_counts_every_cell():
    reference = [1, 1, 1, 0, 0, 1, 0]
    other = [1, 0, 0, 1, 0, 1, 0]
    assert paired_table(reference, other) == PairedTable(both=2, b=2, c=1, neither=2)
    with pytest.raises(EvaluationError, match="not paired"):
        paired_table([True], [])


def _profile_score(table: PairedTable, d: float) -> float:
    """The score statistic of Tango with the constrained maximum found by brute force."""
    grid = np.linspace(max(0.0, -d), (1 - d) / 2, 200_001)[1:-1]
    with np.errstate(divide="ignore"):
        likelihood = (
            table.c * np.log(grid + d)
            + table.b * np.log(grid)
            + (table.both + table.neither) * np.log(1 - 2 * grid - d)
        )
    q = grid[np.argmax(np.nan_to_num(likelihood, nan=-np.inf))]
    return (table.c - table.b - table.n * d) / math.sqrt(table.n * (2 * q + d - d * d))


@pytest.mark.parametrize("table", [PairedTable(60, 20, 10, 30), PairedTable(90, 7, 12, 11)])
def test_interval_ends_where_the_score_test_rejects(table):
    value, low, high = paired_difference(table)
    assert value == pytest.approx((table.c - table.b) / table.n)
    assert _profile_score(table, low) == pytest.approx(1.96, abs=2e-3)
    assert _profile_score(table, high) == pytest.approx(-1.96, abs=2e-3)


def test_interval_without_discordant_pairs_has_a_width():
    # Tango (1998): the interval for n concordant pairs is -+ z^2 / (n + z^2).
    half = 1.96**2 / (120 + 1.96**2)
    value, low, high = paired_difference(PairedTable(100, 0, 0, 20))
    assert value == 0.0
    assert (low, high) == pytest.approx((-half, half), abs=1e-6)


@settings(max_examples=60)
@given(st.lists(st.integers(0, 80), min_size=4, max_size=4).filter(any))
def test_interval_is_ordered_contains_the_estimate_and_mirrors(cells):
    both, b, c, neither = cells
    value, low, high = paired_difference(PairedTable(both, b, c, neither))
    assert -1 <= low <= value <= high <= 1
    mirrored = paired_difference(PairedTable(both, c, b, neither))
    assert mirrored == pytest.approx((-value, -high, -low), abs=1e-6)


def test_interval_covers_the_truth():
    rng = np.random.default_rng(0)
    probabilities = np.array([0.75, 0.06, 0.03, 0.16])  # both, b, c, neither
    draws = rng.multinomial(120, probabilities, size=1500)
    intervals = [paired_difference(PairedTable(*map(int, cells))) for cells in draws]
    covered = np.mean([low <= -0.03 <= high for _, low, high in intervals])
    assert 0.93 < covered < 0.98


def test_interval_of_nothing_is_refused():
    with pytest.raises(EvaluationError):
        paired_difference(PairedTable(0, 0, 0, 0))
