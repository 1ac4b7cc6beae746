"""Numbers in words."""

from __future__ import annotations

from collections.abc import Sequence


def size(count: int) -> str:
    """Bytes with a unit that fits: 512 B, 1.5 KiB, 23.4 MiB."""
    value = float(count)
    for unit in ("B", "KiB", "MiB"):
        if value < 1024:
            return f"{value:.0f} {unit}" if unit == "B" else f"{value:.1f} {unit}"
        value /= 1024
    return f"{value:.2f} GiB"


def percent(value: float, digits: int = 0) -> str:
    """0.257 -> 26%."""
    return f"{100 * value:.{digits}f}%"


def rate(success: float, interval: Sequence[float]) -> str:
    """A success rate with its interval: 83% (61-94)."""
    low, high = interval
    return f"{percent(success)} ({100 * low:.0f}-{100 * high:.0f})"


def count(number: int) -> str:
    """Parameters: 3.1 M."""
    for limit, unit in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if number >= limit:
            return f"{number / limit:.1f} {unit}"
    return str(number)
