"""How many episodes it takes to see a difference, given how often the arms disagree."""

from __future__ import annotations

import math
from typing import Any

from omega_qvla.errors import EvaluationError
from omega_qvla.evaluation.statistics import Z95, PairedTable, wilson

#: Differences, in points of success rate, that the note speaks of.
POINTS = (2, 5, 10)
#: Chance of seeing a difference that is there, and of seeing one that is not.
POWER, ALPHA = 0.8, 0.05
_Z80 = 0.8416
#: Probabilities this many standard deviations out are left out of sums.
_WIDTH = 7.0


def episodes_needed(difference: float, discordance: float) -> int:
    """Paired episodes for the exact McNemar test to find `difference` with 80% power at 5%.

    R. J. Connor, "Sample size for testing differences in proportions for the paired-sample
    design", Biometrics 43 (1987), 207-211: n = (z_a sqrt(q) + z_b sqrt(q - d^2))^2 / d^2,
    with d the difference and q the share of discordant pairs; then raised until the power
    of the exact test, which is the more careful one, is there.

    Args:
        difference: of the success rates, in (0, 1].
        discordance: share of pairs that only one arm solves; raised to `difference`, below
            which it cannot lie.

    Raises:
        EvaluationError: a share outside its range.
    """
    if not 0 < difference <= 1 or not 0 <= discordance <= 1:
        raise EvaluationError(
            f"no sample size for a difference of {difference} at a discordance of {discordance}"
        )
    share = max(difference, discordance)
    root = Z95 * math.sqrt(share) + _Z80 * math.sqrt(max(0.0, share - difference**2))
    count = max(1, math.ceil((root / difference) ** 2))
    while mcnemar_power(count, difference, share) < POWER:
        count = max(count + 1, math.ceil(1.01 * count))
    return count


def mcnemar_power(n: int, difference: float, discordance: float) -> float:
    """Chance that the exact McNemar test of `n` pairs rejects equality at 5%.

    The number m of discordant pairs is binomial(n, discordance); of these the better arm
    wins each with probability (1 + difference / discordance) / 2.
    """
    if discordance == 0:
        return 0.0
    wins = (1 + difference / discordance) / 2
    total = 0.0
    for m in _likely(n, discordance):
        critical = _critical(m)
        if critical < 0:
            continue
        rejected = _at_most(critical, m, wins) + _at_most(critical, m, 1 - wins)
        total += _binomial(m, n, discordance) * rejected
    return min(1.0, total)


def power_note(table: PairedTable) -> dict[str, Any]:
    """What `table` allows, JSON-ready.

    `discordance` (share of pairs that one arm alone solved), its `interval` (Wilson, 95%),
    `episodes_needed` {points: episodes} for a difference of so many points at this
    discordance, and `power` {points: chance of finding it with these episodes}.
    """
    discordant = table.b + table.c
    share = discordant / table.n
    return {
        "episodes": table.n,
        "discordance": share,
        "interval": list(wilson(discordant, table.n)),
        "episodes_needed": {str(p): episodes_needed(p / 100, share) for p in POINTS},
        "power": {
            str(p): round(mcnemar_power(table.n, p / 100, max(share, p / 100)), 3) for p in POINTS
        },
    }


def _critical(m: int) -> int:
    """The largest k with 2 P(X <= k) <= 5% for X binomial(m, 1/2); -1 if there is none."""
    total, k = 0.0, 0
    while k <= m:
        total += _binomial(k, m, 0.5)
        if 2 * total > ALPHA:
            break
        k += 1
    return k - 1


def _likely(n: int, share: float) -> range:
    spread = _WIDTH * math.sqrt(n * share * (1 - share)) + 1
    return range(max(0, math.floor(n * share - spread)), min(n, math.ceil(n * share + spread)) + 1)


def _at_most(k: int, m: int, p: float) -> float:
    """P(X <= k) of X binomial(m, p)."""
    likely = _likely(m, p)
    low = min(likely.start, k)
    return sum(_binomial(i, m, p) for i in range(low, min(k + 1, likely.stop)))


def _binomial(k: int, n: int, p: float) -> float:
    """P(X = k) of X binomial(n, p)."""
    if p in (0.0, 1.0):
        return float(k == n * p)
    log = math.lgamma(n + 1) - math.lgamma(k + 1) - math.lgamma(n - k + 1)
    return math.exp(log + k * math.log(p) + (n - k) * math.log1p(-p))
