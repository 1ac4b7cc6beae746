import math

import numpy as np
import pytest
from scipy.stats import binom

from omega_qvla.errors import EvaluationError
from omega_qvla.evaluation.power import episodes_needed, mcnemar_power, power_note
from omega_qvla.evaluation.statistics import PairedTable, mcnemar


def brute_force(n, difference, discordance):
    """Every table of n pairs, tested with the exact test itself."""
    lost, won = (discordance - difference) / 2, (discordance + difference) / 2
    total = 0.0
    for m in range(n + 1):
        for c in range(m + 1):
            if mcnemar(m - c, c) <= 0.05:
                chance = won / (won + lost)
                total += binom.pmf(m, n, discordance) * binom.pmf(c, m, chance)
    return total


@pytest.mark.parametrize(
    ("n", "difference", "discordance"), [(20, 0.3, 0.4), (60, 0.1, 0.2), (40, 0.2, 0.2)]
)
def test_power_is_that_of_the_exact_test(n, difference, discordance):
    expected = brute_force(n, difference, discordance)
    assert mcnemar_power(n, difference, discordance) == pytest.approx(expected, abs=1e-9)


def test_without_a_difference_the_test_rejects_at_most_5_percent():
    for discordance in (0.05, 0.3, 0.9):
        assert mcnemar_power(200, 1e-12, discordance) / 2 <= 0.05 + 1e-9


@pytest.mark.parametrize(("difference", "discordance"), [(0.05, 0.1), (0.1, 0.1), (0.1, 0.4)])
def test_the_episodes_asked_for_have_the_power_and_fewer_do_not(difference, discordance):
    count = episodes_needed(difference, discordance)
    assert mcnemar_power(count, difference, discordance) >= 0.8
    assert mcnemar_power(int(0.9 * count), difference, discordance) < 0.8
    # Connor's formula, which knows nothing of the exact test's caution, lies a little below.
    root = 1.96 * math.sqrt(discordance) + 0.8416 * math.sqrt(discordance - difference**2)
    assert count / 1.3 <= (root / difference) ** 2 <= count


def test_a_simulated_experiment_finds_what_it_should():
    count = episodes_needed(0.1, 0.3)
    generator = np.random.default_rng(0)
    found = 0
    for _ in range(1000):
        draws = generator.uniform(size=count)
        b, c = int((draws < 0.1).sum()), int((draws > 0.8).sum())
        found += mcnemar(b, c) <= 0.05
    assert 0.77 <= found / 1000 <= 0.86


def test_a_discordance_below_the_difference_is_impossible_and_raised():
    assert episodes_needed(0.1, 0.0) == episodes_needed(0.1, 0.1)


def test_the_note_says_what_was_seen():
    note = power_note(PairedTable(both=90, b=6, c=2, neither=22))
    assert note["discordance"] == pytest.approx(8 / 120)
    assert list(note["episodes_needed"]) == ["2", "5", "10"]
    counts = list(note["episodes_needed"].values())
    assert counts == sorted(counts, reverse=True)
    assert note["power"]["2"] < note["power"]["5"] < note["power"]["10"] <= 1


@pytest.mark.parametrize(("difference", "discordance"), [(0, 0.1), (-0.1, 0.1), (0.1, 1.5)])
def test_impossible_questions_are_refused(difference, discordance):
    with pytest.raises(EvaluationError):
        episodes_needed(difference, discordance)
