"""Statistics of states and actions, and the two normalizations built on them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from omega_qvla.errors import CheckpointError

FIELDS = ("mean", "std", "q01", "q99", "min", "max")

#: openpi's guard against an empty range (src/openpi/transforms.py).
QUANTILE_EPSILON = 1e-6


@dataclass(frozen=True)
class Stats:
    """Per-channel statistics, float64 [d] each; None where the checkpoint has none."""

    mean: np.ndarray | None = None
    std: np.ndarray | None = None
    q01: np.ndarray | None = None
    q99: np.ndarray | None = None
    min: np.ndarray | None = None
    max: np.ndarray | None = None

    @classmethod
    def from_dict(cls, data: Mapping[str, Sequence[float]], where: str) -> Stats:
        """Read the known fields of a JSON object; other fields are ignored.

        Raises:
            CheckpointError: lengths differ or a value is not finite, naming `where`.
        """
        arrays = {k: np.asarray(data[k], np.float64) for k in FIELDS if data.get(k) is not None}
        if len({a.shape for a in arrays.values()}) > 1 or any(a.ndim != 1 for a in arrays.values()):
            raise CheckpointError(f"{where}: statistics must be lists of one length")
        if not all(np.isfinite(a).all() for a in arrays.values()):
            raise CheckpointError(f"{where}: statistics must be finite")
        return cls(**arrays)

    def to_dict(self, names: Sequence[str] = FIELDS) -> dict[str, list[float]]:
        """The fields called `names` that are known, as JSON."""
        values = {name: getattr(self, name) for name in names}
        return {name: value.tolist() for name, value in values.items() if value is not None}

    def take(self, where: str, *names: str) -> tuple[np.ndarray, ...]:
        """The fields called `names`. Raises CheckpointError naming those that are missing."""
        missing = [name for name in names if getattr(self, name) is None]
        if missing:
            raise CheckpointError(f"{where}: statistics lack {', '.join(missing)}")
        return tuple(getattr(self, name) for name in names)

    @classmethod
    def concatenate(cls, parts: Sequence[Stats]) -> Stats:
        """Channels of several parts in order; a field that one part lacks is dropped."""
        columns: dict[str, Any] = {}
        for name in FIELDS:
            arrays = [getattr(part, name) for part in parts]
            if arrays and all(a is not None for a in arrays):
                columns[name] = np.concatenate(arrays)
        return cls(**columns)


def compute_statistics(values: np.ndarray) -> Stats:
    """Statistics of values [n, d] (or [..., d]); exact quantiles, population deviation."""
    rows = np.asarray(values, np.float64).reshape(-1, values.shape[-1])
    q01, q99 = np.quantile(rows, [0.01, 0.99], axis=0)
    return Stats(rows.mean(0), rows.std(0), q01, q99, rows.min(0), rows.max(0))


class QuantileNorm:
    """openpi's: (x - q01) / (q99 - q01 + 1e-6) * 2 - 1, not clipped."""

    def __init__(self, stats: Stats, where: str) -> None:
        low, high = stats.take(where, "q01", "q99")
        self.low, self.span = low, high - low + QUANTILE_EPSILON

    def __len__(self) -> int:
        return len(self.low)

    def normalize(self, x: np.ndarray) -> np.ndarray:
        """[..., d] raw to about [-1, 1], float64."""
        normed: np.ndarray = (x - self.low) / self.span * 2 - 1
        return normed

    def unnormalize(self, x: np.ndarray) -> np.ndarray:
        """The inverse of `normalize`."""
        raw: np.ndarray = (x + 1) / 2 * self.span + self.low
        return raw


class MinMaxNorm:
    """GR00T's: [min, max] to [-1, 1], not clipped; 0 where min equals max."""

    def __init__(self, stats: Stats, where: str) -> None:
        low, high = stats.take(where, "min", "max")
        self.low, self.range = low, high - low
        self.varies = self.range > 0

    def __len__(self) -> int:
        return len(self.low)

    def normalize(self, x: np.ndarray) -> np.ndarray:
        """[..., d] raw to [-1, 1], float64."""
        span = np.where(self.varies, self.range, 1.0)
        normed: np.ndarray = np.where(self.varies, (x - self.low) / span * 2 - 1, 0.0)
        return normed

    def unnormalize(self, x: np.ndarray) -> np.ndarray:
        """The inverse of `normalize`."""
        raw: np.ndarray = (x + 1) / 2 * self.range + self.low
        return raw


def pad_last(x: np.ndarray, width: int) -> np.ndarray:
    """x [..., d] to float32 [..., width], zeros behind."""
    padded = np.zeros((*x.shape[:-1], width), np.float32)
    padded[..., : x.shape[-1]] = x
    return padded
