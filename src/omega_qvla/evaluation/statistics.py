"""Success rates and paired comparisons, with honest uncertainty. Pure Python."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from omega_qvla.errors import EvaluationError

#: Half-width of a 95% interval in standard deviations.
Z95 = 1.96


class Interval(NamedTuple):
    """A confidence interval [low, high]."""

    low: float
    high: float


def wilson(successes: int, n: int, z: float = Z95) -> Interval:
    """Wilson's score interval of a success rate.

    E. B. Wilson, "Probable inference, the law of succession, and statistical
    inference", JASA 22 (1927), 209-212. Stays in [0, 1] and keeps a sensible width at
    0 and n successes, where the usual p +- z*se collapses to a point.

    Raises:
        EvaluationError: unless 0 <= successes <= n and n > 0.
    """
    if n <= 0 or not 0 <= successes <= n:
        raise EvaluationError(f"no success rate from {successes} successes in {n} episodes")
    rate = successes / n
    scale = 1.0 + z * z / n
    centre = (rate + z * z / (2 * n)) / scale
    half = z * math.sqrt(rate * (1 - rate) / n + z * z / (4 * n * n)) / scale
    # At the ends the bound is exactly 0 or 1; rounding would leave it at 1e-17 beside it.
    low = 0.0 if successes == 0 else centre - half
    high = 1.0 if successes == n else centre + half
    return Interval(low, high)


def mcnemar(b: int, c: int) -> float:
    """Exact two-sided McNemar p-value of `b` against `c` discordant pairs.

    Under the null hypothesis the smaller count is binomial(b + c, 1/2); p doubles its
    lower tail, at most 1. Without discordant pairs p = 1.

    Raises:
        EvaluationError: a count is negative.
    """
    if b < 0 or c < 0:
        raise EvaluationError(f"discordant pairs must be counts, got {b} and {c}")
    n = b + c
    tail = combinations = 1
    for k in range(1, min(b, c) + 1):
        combinations = combinations * (n - k + 1) // k
        tail += combinations
    outcomes: int = 2**n
    # Integers of any size divide exactly rounded; 0.5**n would underflow.
    return min(1.0, 2 * tail / outcomes)


@dataclass(frozen=True)
class PairedTable:
    """Outcomes of the same episodes under a reference arm and another arm.

    both / neither: episodes that both / none of the arms solved.
    b: solved by the reference only.  c: solved by the other arm only.
    """

    both: int
    b: int
    c: int
    neither: int

    @property
    def n(self) -> int:
        """Number of paired episodes."""
        return self.both + self.b + self.c + self.neither

    @property
    def p(self) -> float:
        """Exact McNemar p-value of "the arms succeed equally often"."""
        return mcnemar(self.b, self.c)


def paired_table(reference: Sequence[bool], other: Sequence[bool]) -> PairedTable:
    """Cross-tabulate outcomes of the same episodes, given in the same order.

    Raises:
        EvaluationError: the two differ in length.
    """
    if len(reference) != len(other):
        raise EvaluationError(
            f"episodes are not paired: {len(reference)} of the reference, {len(other)} of the other"
        )
    pairs = [(bool(r), bool(o)) for r, o in zip(reference, other, strict=True)]
    return PairedTable(
        both=pairs.count((True, True)),
        b=pairs.count((True, False)),
        c=pairs.count((False, True)),
        neither=pairs.count((False, False)),
    )


class Difference(NamedTuple):
    """Success rate of the other arm minus the reference's, with its interval."""

    value: float
    low: float
    high: float


def paired_difference(table: PairedTable, z: float = Z95) -> Difference:
    """Difference of two paired success rates (other - reference) with Tango's interval.

    T. Tango, "Equivalence test and confidence interval for the difference in
    proportions for the paired-sample design", Statistics in Medicine 17 (1998),
    891-908: all differences d that the score test does not reject,
    |c - b - n d| <= z sqrt(n (2 q + d (1 - d))), with q the constrained maximum
    likelihood estimate of the probability of the reference-only cell. Unlike Wald's it
    has a width without discordant pairs, and covers at these sample sizes.

    Raises:
        EvaluationError: the table is empty.
    """
    if table.n == 0:
        raise EvaluationError("no paired episodes: nothing to compare")
    value = (table.c - table.b) / table.n
    low = _score_bound(table, value, -1.0, z)
    high = _score_bound(table, value, 1.0, z)
    return Difference(value, low, high)


def _score_bound(table: PairedTable, value: float, end: float, z: float) -> float:
    """Bisect between the estimate (not rejected) and `end` for |score| = z."""
    inside, outside = value, end
    if abs(_score(table, end)) <= z:
        return end
    for _ in range(60):
        middle = (inside + outside) / 2
        if abs(_score(table, middle)) <= z:
            inside = middle
        else:
            outside = middle
    return inside


def _score(table: PairedTable, d: float) -> float:
    """Tango's score statistic of "the difference is d"."""
    n, b, c = table.n, table.b, table.c
    # Constrained maximum likelihood estimate of P(reference only): root of A q^2 + B q + C.
    coef_a = 2.0 * n
    coef_b = -b - c + (2 * n - c + b) * d
    coef_c = -b * d * (1 - d)
    root = math.sqrt(max(0.0, coef_b**2 - 4 * coef_a * coef_c))
    q = max(0.0, (root - coef_b) / (2 * coef_a))
    variance = n * (2 * q + d * (1 - d))
    distance = c - b - n * d
    if variance <= 0:
        return 0.0 if abs(distance) < 1e-12 else math.copysign(math.inf, distance)
    return distance / math.sqrt(variance)
