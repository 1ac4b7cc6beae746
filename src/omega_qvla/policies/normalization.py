"""Normalizations of LeRobot and Isaac-GR00T as one affine map per channel, both ways.

They are written from the two projects' formulas (LeRobot 0.4.4, processor/normalize_processor.py;
Isaac-GR00T N1.5, data/transform/state_action.py), which differ in how they treat a channel that
never moves. openpi's own is `statistics.QuantileNorm`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from omega_qvla.errors import CheckpointError
from omega_qvla.policies.statistics import Stats

LEROBOT_MODES = ("quantiles", "mean_std", "min_max", "identity")
ISAAC_MODES = ("min_max", "mean_std", "q99")


@dataclass(frozen=True)
class AffineNorm:
    """normalize: x * gain + offset, clipped to [-1, 1] where `clipped`; unnormalize: the other two.

    All float64 [d], `clipped` bool [d]. The two maps invert each other except on channels that
    never move.
    """

    gain: np.ndarray
    offset: np.ndarray
    back_gain: np.ndarray
    back_offset: np.ndarray
    clipped: np.ndarray

    def __len__(self) -> int:
        return len(self.gain)

    def normalize(self, x: np.ndarray) -> np.ndarray:
        """[..., d] raw to normalized, float64."""
        normed: np.ndarray = x * self.gain + self.offset
        return np.where(self.clipped, normed.clip(-1, 1), normed)

    def unnormalize(self, x: np.ndarray) -> np.ndarray:
        """[..., d] normalized to raw, float64; never clipped."""
        raw: np.ndarray = x * self.back_gain + self.back_offset
        return raw

    @classmethod
    def lerobot(cls, stats: Stats, mode: str, where: str, width: int, eps: float) -> AffineNorm:
        """LeRobot's: `eps` stands in for a range of zero, and is added to every deviation.

        Args:
            stats: of the feature; unread for `identity`.
            mode: of `LEROBOT_MODES` (LeRobot writes them in capitals).
            where: names the feature in messages.
            width: channels of the feature.
            eps: the normalizer step's, 1e-8 by default.

        Raises:
            CheckpointError: an unknown mode, or statistics that it needs are missing.
        """
        if mode == "identity":
            one, zero = np.ones(width), np.zeros(width)
            return cls(one, zero, one, zero, zero.astype(bool))
        if mode == "mean_std":
            mean, std = stats.take(where, "mean", "std")
            still = np.zeros(len(mean), bool)
            return cls(1 / (std + eps), -mean / (std + eps), std, mean, still)
        if mode not in LEROBOT_MODES:
            raise CheckpointError(
                f"{where}: normalization {mode!r} is not one of {', '.join(LEROBOT_MODES)}"
            )
        low, high = stats.take(where, *(("q01", "q99") if mode == "quantiles" else ("min", "max")))
        span = np.where(high == low, eps, high - low)
        return cls.of_range(low, span)

    @classmethod
    def isaac(cls, stats: Stats, mode: str, where: str) -> AffineNorm:
        """Isaac-GR00T's: a channel that never moves becomes 0 (min_max) or passes (the others).

        `q99` clips to [-1, 1]. Raises CheckpointError, as `lerobot`.
        """
        if mode not in ISAAC_MODES:
            raise CheckpointError(
                f"{where}: normalization {mode!r} is not one of {', '.join(ISAAC_MODES)}"
            )
        if mode == "mean_std":
            mean, std = stats.take(where, "mean", "std")
            moves, safe = std != 0, np.where(std != 0, std, 1.0)
            gain, offset = 1 / safe, np.where(moves, -mean / safe, 0.0)
            return cls(gain, offset, std, mean, np.zeros(len(mean), bool))
        low, high = stats.take(where, *(("q01", "q99") if mode == "q99" else ("min", "max")))
        moves, span = high != low, high - low
        ranged = cls.of_range(low, np.where(moves, span, 1.0))
        still = 1.0 if mode == "q99" else 0.0
        return cls(
            np.where(moves, ranged.gain, still),
            np.where(moves, ranged.offset, 0.0),
            span / 2,
            span / 2 + low,
            np.full(len(low), mode == "q99"),
        )

    @classmethod
    def of_range(cls, low: np.ndarray, span: np.ndarray) -> AffineNorm:
        """[low, low + span] to [-1, 1]."""
        clipped = np.zeros(len(low), bool)
        return cls(2 / span, -2 * low / span - 1, span / 2, span / 2 + low, clipped)

    @classmethod
    def concatenate(cls, parts: Sequence[AffineNorm]) -> AffineNorm:
        """Channels of several parts, in order."""
        names = ("gain", "offset", "back_gain", "back_offset", "clipped")
        return cls(*(np.concatenate([getattr(part, name) for part in parts]) for name in names))
