"""Small layers with their calibration, for tests."""

from __future__ import annotations

import torch

from omega_qvla.numerics.smoothing import robust_profile
from omega_qvla.numerics.stats import LayerStats


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def tokens(n: int, width: int, steps: int = 1, seed: int = 0) -> tuple[torch.Tensor, ...]:
    """Per step [n, width]: mixed channels, some of them large, growing from step to step."""
    mix = torch.eye(width) + 0.3 * random(width, width, seed=seed) / width**0.5
    gain = torch.exp(0.8 * random(width, seed=seed + 1))
    gain[:: max(1, width // 3)] *= 8
    return tuple(
        random(n, width, seed=seed + 2 + step) @ mix * gain * (1 + step) for step in range(steps)
    )


def stats_of(samples: tuple[torch.Tensor, ...]) -> LayerStats:
    x = torch.cat(samples)
    return LayerStats(x.T @ x / len(x), robust_profile(x), samples, len(x))


def layer_weight(out: int, width: int, seed: int = 50) -> torch.Tensor:
    return random(out, width, seed=seed) / width**0.5
