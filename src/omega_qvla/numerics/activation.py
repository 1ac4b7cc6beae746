"""Activation quantization: dynamic scales per token (and group), static scales from samples.

q are integer-valued float tensors in [-2^(bits-1), 2^(bits-1) - 1], so that products of them
are exact integer sums in floating point. NaN stays NaN; static schemes saturate infinities.
"""

from __future__ import annotations

import torch
from torch import Tensor

from omega_qvla.errors import CalibrationError, NumericsError
from omega_qvla.numerics.qparams import (
    expand_groups,
    qrange,
    signed_scale,
    split_groups,
    widest_scale,
)

# Fractions of absmax tried for a static scale by squared error: geometric, 1 .. 1/100; one
# massive token among thousands pulls the optimum far below its absmax.
_STATIC_FRACTIONS = tuple(0.01 ** (i / 47) for i in range(48))


def _round(x: Tensor, scale: Tensor, bits: int) -> Tensor:
    low, high = qrange(bits)
    return (x / scale).round_().clamp_(low, high)


def token_scale(x: Tensor, bits: int = 4, clip: float = 1.0, signed: bool = False) -> Tensor:
    """x [..., in] -> [..., 1], the scale of each token: clip * absmax / qmax, or, signed,
    max(M / -qmin, clip * m / qmax) with the sign of `signed_scale`; 1 of a zero token."""
    low, high = qrange(bits)
    if signed:
        scale = signed_scale(x, 1 / -low, clip / high)
    else:
        scale = widest_scale(x, bits, clip).unsqueeze(-1)
    return scale.masked_fill_(scale == 0, 1.0)


def quantize_per_token(
    x: Tensor, bits: int = 4, clip: float = 1.0, signed: bool = False
) -> tuple[Tensor, Tensor]:
    """Each token (row of x [..., in]) on its own grid, that of `token_scale`.

    Returns (q [..., in], scale [..., 1]).
    """
    scale = token_scale(x, bits, clip, signed)
    return _round(x, scale, bits), scale


def quantize_per_token_group(
    x: Tensor, bits: int = 4, group: int = 64, clip: float = 1.0, signed: bool = False
) -> tuple[Tensor, Tensor]:
    """Each group of `group` channels of each token on its own grid.

    Returns (q [..., in], scale [..., n_groups]); an all-zero group has scale 1. The last
    group is short where `group` does not divide the width.
    """
    q, scale = quantize_per_token(split_groups(x, group), bits, clip, signed)
    return q.flatten(-2)[..., : x.shape[-1]], scale.squeeze(-1)


def quantize_static(x: Tensor, scale: Tensor, bits: int = 4) -> Tensor:
    """x [..., in] on the grid of a given scale, broadcast over the last dimension:
    [1] or [in] as it is, [n_groups] after `expand_groups`."""
    return _round(x, scale, bits)


def _check_samples(samples: Tensor) -> Tensor:
    if samples.ndim != 2 or 0 in samples.shape:
        raise CalibrationError(f"samples must be [n, in] with n > 0, not {tuple(samples.shape)}")
    if not bool(torch.isfinite(samples).all()):
        raise CalibrationError("calibration samples are not finite")
    return samples


def _positive(scale: Tensor) -> Tensor:
    return torch.where(scale > 0, scale, torch.ones_like(scale))


def step_channel_scale(samples: Tensor, percentile: float = 99.9, bits: int = 4) -> Tensor:
    """The published static scale: per channel the percentile of |x| over qmax.

    samples [n, in] -> [in]. A channel whose percentile is 0 takes its maximum; one that is
    always 0, scale 1.

    Raises:
        CalibrationError: no samples, or not finite.
    """
    magnitude = _check_samples(samples).abs().T.contiguous()
    level = _high_quantile(magnitude, percentile / 100.0)
    return _positive(torch.where(level > 0, level, magnitude.amax(1)) / qrange(bits)[1])


def _high_quantile(values: Tensor, fraction: float) -> Tensor:
    """torch.quantile(values [k, n], fraction, dim=1), linear interpolation, for high fractions.

    Only the largest values are sorted out: many times faster, and no limit of 2^24 elements.
    """
    position = fraction * (values.shape[1] - 1)
    below = int(position)
    top = values.topk(values.shape[1] - below, dim=1).values  # falling
    low = top[:, -1]
    return low if top.shape[1] == 1 else low + (top[:, -2] - low) * (position - below)


def _mse_scale(values: Tensor, bits: int) -> Tensor:
    """values [k, m] -> [k]: per row the scale with the least squared rounding error."""
    peak = values.abs().amax(1)
    best = _positive(peak / qrange(bits)[1])
    best_error = torch.full_like(peak, float("inf"))
    for fraction in _STATIC_FRACTIONS:
        scale = _positive(peak * (fraction / qrange(bits)[1]))
        step = scale.unsqueeze(1)
        error = _round(values, step, bits).mul_(step).sub_(values).square_().sum(1)
        better = error < best_error
        best, best_error = torch.where(better, scale, best), torch.minimum(best_error, error)
    return best


def step_group_scale(samples: Tensor, group: int = 64, bits: int = 4) -> Tensor:
    """One static scale per group of channels, of least squared error.

    samples [n, in] -> [n_groups]; an all-zero group has scale 1.

    Raises:
        CalibrationError: no samples, or not finite.
    """
    blocks = split_groups(_check_samples(samples), group)
    return _mse_scale(blocks.transpose(0, 1).flatten(1), bits)


def step_tensor_scale(samples: Tensor, bits: int = 4) -> Tensor:
    """One static scale for all channels, of least squared error: samples [n, in] -> [1].

    Raises:
        CalibrationError: no samples, or not finite.
    """
    return _mse_scale(_check_samples(samples).reshape(1, -1), bits)


def expand_static(scale: Tensor, width: int, kind: str, group: int) -> Tensor:
    """A row of a static table (per_step_tensor [1], _group [n_groups], _channel [in]) as
    something that broadcasts over [..., width].

    Raises:
        NumericsError: the row does not fit the width.
    """
    if kind == "per_step_group":
        return expand_groups(scale, width, group)
    expected = 1 if kind == "per_step_tensor" else width
    if scale.shape[-1] != expected:
        raise NumericsError(f"{kind}: {scale.shape[-1]} scales where {expected} are due")
    return scale
