"""Error metrics between a reference and an estimate, and the channel-outlier ratio.

All sums run in float64; results are Python floats unless said otherwise. Shapes must agree
(NumericsError). Non-finite values are refused: a metric of a broken tensor means nothing.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from omega_qvla.errors import NumericsError
from omega_qvla.numerics.checks import require_finite


def nmse(reference: Tensor, estimate: Tensor) -> float:
    """Normalized squared error Σ(r - e)² / Σr²; a zero reference gives 0 when equal, else inf."""
    r, e = _pair(reference, estimate)
    error = float((r - e).square().sum())
    energy = float(r.square().sum())
    if energy == 0.0:
        return 0.0 if error == 0.0 else math.inf
    return error / energy


def sqnr_db(reference: Tensor, estimate: Tensor) -> float:
    """Signal to quantization noise, -10·log10(nmse) in dB; inf when equal."""
    value = nmse(reference, estimate)
    if value == 0.0:
        return math.inf
    return -math.inf if math.isinf(value) else -10.0 * math.log10(value)


def cosine(reference: Tensor, estimate: Tensor) -> float:
    """Cosine of the two tensors seen as one vector each; 1 for two zeros, 0 for one zero."""
    r, e = _pair(reference, estimate)
    return float(_cosine(r.reshape(1, -1), e.reshape(1, -1))[0])


def cosine_rows(reference: Tensor, estimate: Tensor) -> Tensor:
    """Cosine over the last dimension, float64 [...] of the leading shape; zeros as in `cosine`."""
    r, e = _pair(reference, estimate)
    return _cosine(r, e)


def max_abs(reference: Tensor, estimate: Tensor) -> float:
    """Largest absolute difference."""
    r, e = _pair(reference, estimate)
    return float((r - e).abs().max())


def channel_ratio(x: Tensor) -> float:
    """Outlier ratio of activations [..., in]: largest channel maximum / median of them.

    1 when every channel is zero, inf when the median channel is zero but some channel is not.
    """
    if x.ndim < 1 or x.numel() == 0:
        raise NumericsError(f"channel_ratio needs a non-empty tensor, got {tuple(x.shape)}")
    require_finite(x, "activations")
    peaks = x.reshape(-1, x.shape[-1]).abs().amax(dim=0).to(torch.float64)
    top, median = float(peaks.max()), float(torch.quantile(peaks, 0.5))
    if top == 0.0:
        return 1.0
    return math.inf if median == 0.0 else top / median


def _pair(reference: Tensor, estimate: Tensor) -> tuple[Tensor, Tensor]:
    if reference.shape != estimate.shape:
        raise NumericsError(
            f"shapes differ: reference {tuple(reference.shape)}, estimate {tuple(estimate.shape)}"
        )
    if reference.numel() == 0:
        raise NumericsError("a metric needs at least one element")
    require_finite(reference, "reference")
    require_finite(estimate, "estimate")
    return reference.to(torch.float64), estimate.to(torch.float64)


def _cosine(r: Tensor, e: Tensor) -> Tensor:
    # Normalizing by the peak first keeps squares of huge and tiny values in range.
    nr = r / r.abs().amax(dim=-1, keepdim=True).clamp_min(torch.finfo(torch.float64).tiny)
    ne = e / e.abs().amax(dim=-1, keepdim=True).clamp_min(torch.finfo(torch.float64).tiny)
    lengths = torch.linalg.vector_norm(nr, dim=-1) * torch.linalg.vector_norm(ne, dim=-1)
    value = (nr * ne).sum(dim=-1) / lengths.clamp_min(torch.finfo(torch.float64).tiny)
    both_zero = (nr == 0).all(dim=-1) & (ne == 0).all(dim=-1)
    return torch.where(both_zero, torch.ones_like(value), value.clamp(-1.0, 1.0))
