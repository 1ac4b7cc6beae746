"""Outlier channels for networks that have none, without changing what they compute.

A small network trained from scratch has no outlier channels, so 4-bit activations cost it
little and every method looks good. Real checkpoints have them: a few channels 20-200 times
the median one. Here they are put in by scaling channels up in the layer that produces them
and the columns of the layers that read them down, by powers of two, so that the actions stay
what they were and only quantization notices.
"""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass

import torch
from torch import Tensor

from omega_qvla.errors import NumericsError
from omega_qvla.policies.base import Policy, Site
from omega_qvla.policies.folding import divide_site, producer_gain

#: A gated product varies several-fold between channels by itself: less is put on top of it.
_GATED = 0.5
#: The weakest outlier of a site is this much below the strongest (log-uniform in between).
_SPREAD = 4.0


@dataclass(frozen=True)
class OutlierSite:
    """What was done to one site: `channels` (of the producer) times `factors`.

    consumers: every layer whose input it changed.
    """

    consumers: tuple[str, ...]
    channels: tuple[int, ...]
    factors: tuple[float, ...]


def add_outliers(
    policy: Policy, ratio: float = 100.0, channels: int = 4, seed: int = 0
) -> tuple[OutlierSite, ...]:
    """Give every site with a producer outlier channels, in place, preserving the function.

    Channels are drawn among those whose producer weights are of ordinary size, so that the
    measured ratio of channel maximum to median comes out near the factor. The strongest
    factor of a site is `ratio` (half of it behind a gated product), the others log-uniform
    down to a quarter of that, all rounded down to powers of two.

    Args:
        policy: not quantized, weights in 32 bits where folding needs it.
        ratio: wanted ratio of the largest channel to the median one, at least 2.
        channels: how many per site, at most half of its width.
        seed: decides channels and factors, site by site.

    Returns:
        What was changed, in the order of `policy.sites()`.

    Raises:
        NumericsError: an impossible ratio or count, or weights too narrow to be exact.
    """
    if not (math.isfinite(ratio) and ratio >= 2 and channels >= 1):
        raise NumericsError(
            f"outliers need a ratio of at least 2 and a channel or more, got {ratio}, {channels}"
        )
    sites = [site for site in policy.sites() if site.producer is not None]
    gains = [producer_gain(policy.module, site) for site in sites]
    # All drawn before the first is applied: a refusal leaves the policy whole.
    drawn = [_draw(s, g, ratio, channels, seed) for s, g in zip(sites, gains, strict=True)]
    done = []
    for site, gain, (chosen, factors) in zip(sites, gains, drawn, strict=True):
        divisor = torch.ones(len(gain), dtype=torch.float64)
        divisor[chosen] = 1.0 / factors
        divide_site(policy.module, site, divisor)
        consumers = (*site.consumers, *site.coupled)
        done.append(OutlierSite(consumers, tuple(chosen.tolist()), tuple(factors.tolist())))
    return tuple(done)


def _draw(
    site: Site, gain: Tensor, ratio: float, channels: int, seed: int
) -> tuple[Tensor, Tensor]:
    """Channels int64 [n] and factors float64 [n] of one site."""
    width = len(gain)
    if channels > width // 2:
        raise NumericsError(f"{channels} outliers do not fit {site.consumers[0]}: width {width}")
    # Seeded by name, so that a site's outliers do not depend on the sites before it.
    digest = hashlib.sha256(f"{seed} {site.consumers[0]}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))
    middle = gain.cpu().argsort()[width // 4 : width - width // 4]
    chosen = middle[torch.randperm(len(middle), generator=generator)[:channels]]
    producer = site.producer
    if producer is not None and producer.kind == "rows" and producer.heads is None:
        ratio *= _GATED
    exponents = math.log2(ratio) - math.log2(_SPREAD) * torch.rand(
        channels, generator=generator, dtype=torch.float64
    )
    exponents[0] = math.log2(ratio)
    return chosen, torch.exp2(exponents.floor())
