"""Shared input checks: each one names the tensor that is wrong and what was expected."""

from __future__ import annotations

import torch
from torch import Tensor

from omega_qvla.errors import NumericsError


def require_floating(x: Tensor, what: str) -> None:
    """Raise NumericsError unless `x` is a floating-point tensor of at least one dimension."""
    if x.ndim < 1:
        raise NumericsError(f"{what} must have at least one dimension, got a scalar")
    if not x.is_floating_point():
        raise NumericsError(f"{what} must be floating point, got {x.dtype}; convert it first")


def require_matrix(x: Tensor, what: str) -> None:
    """Raise NumericsError unless `x` is a floating, finite, non-empty matrix."""
    require_floating(x, what)
    if x.ndim != 2 or x.numel() == 0:
        raise NumericsError(f"{what} must be a non-empty matrix, got shape {tuple(x.shape)}")
    require_finite(x, what)


def require_finite(x: Tensor, what: str) -> None:
    """Raise NumericsError when `x` holds a NaN or an infinity."""
    if not bool(torch.isfinite(x).all()):
        raise NumericsError(f"{what} holds NaN or infinite values; mend the source tensor")


def require_vector(x: Tensor, size: int, what: str) -> None:
    """Raise NumericsError unless `x` has shape [size]."""
    if tuple(x.shape) != (size,):
        raise NumericsError(f"{what} must have shape [{size}], got {tuple(x.shape)}")
