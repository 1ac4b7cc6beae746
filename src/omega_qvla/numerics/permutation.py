"""Zig-zag permutation of input channels: strong and weak channels alternate in every block."""

from __future__ import annotations

import torch
from torch import Tensor

from omega_qvla.errors import NumericsError
from omega_qvla.numerics.checks import require_matrix


def zigzag_permutation(weight: Tensor, smooth: float = 0.85) -> Tensor:
    """Order of the input channels of `weight` [out, in]: int64 [in].

    By energy e = mean(W², rows), smoothed e ← smooth·e + (1 - smooth)·mean(e): largest,
    smallest, second largest, second smallest, ... Equal energies keep their order, so a build
    is reproducible. x' = x[..., perm] and W' = W[:, perm] leave x Wᵀ unchanged.
    """
    require_matrix(weight, "weight")
    if not 0.0 <= smooth <= 1.0:
        raise NumericsError(f"smooth must lie in [0, 1], got {smooth}")
    energy = weight.to(torch.float64).square().mean(dim=0)
    energy = smooth * energy + (1.0 - smooth) * energy.mean()
    order = torch.argsort(energy, descending=True, stable=True)
    width = order.numel()
    result = torch.empty_like(order)
    strong = (width + 1) // 2
    result[0::2] = order[:strong]
    result[1::2] = order[strong:].flip(0)
    return result


def inverse_permutation(permutation: Tensor) -> Tensor:
    """int64 [in] with inverse[permutation[i]] = i; NumericsError when it is no permutation."""
    order = permutation.to(torch.int64)
    positions = torch.arange(order.numel(), device=order.device)
    if order.ndim != 1 or not torch.equal(torch.sort(order).values, positions):
        raise NumericsError(
            f"not a permutation: shape {tuple(permutation.shape)} must hold each of 0..n-1 once"
        )
    result = torch.empty_like(order)
    result[order] = positions
    return result
