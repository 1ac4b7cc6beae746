"""Best rank-r part of a weight, so that only the residual has to be quantized."""

from __future__ import annotations

import torch
from torch import Tensor

from omega_qvla.errors import NumericsError
from omega_qvla.numerics.checks import require_matrix
from omega_qvla.numerics.rotation import left_singular_vectors


def low_rank_split(weight: Tensor, rank: int) -> tuple[Tensor, Tensor, Tensor]:
    """Split W [out, in] into a [out, r], b [in, r] and the residual W - a bᵀ [out, in].

    a bᵀ is the best rank-r approximation (Eckart-Young), from the float64 Gram matrix of the
    shorter side; the singular value is shared evenly (square roots) so that both factors fit
    16 bits. The layer's product is x resᵀ + (x b) aᵀ. rank 0 gives empty factors and W itself.
    Results have W's dtype and the residual belongs to the returned (rounded) factors.
    Raises NumericsError when rank is negative or exceeds min(out, in).
    """
    require_matrix(weight, "weight")
    out, width = weight.shape
    if not 0 <= rank <= min(out, width):
        raise NumericsError(f"rank {rank} is not within 0..{min(out, width)} of {out}x{width}")
    wide = weight.to(torch.float64)
    if out >= width:
        b = left_singular_vectors(wide.T @ wide)[:, :rank]
        a = wide @ b
        sigma = torch.linalg.vector_norm(a, dim=0)
    else:
        a = left_singular_vectors(wide @ wide.T)[:, :rank]
        b = wide.T @ a
        sigma = torch.linalg.vector_norm(b, dim=0)
    root = torch.where(sigma > 0, sigma, torch.ones_like(sigma)).sqrt()
    a, b = (a / root, b * root) if out >= width else (a * root, b / root)
    a, b = a.to(weight.dtype), b.to(weight.dtype)
    residual = (wide - a.to(torch.float64) @ b.to(torch.float64).T).to(weight.dtype)
    return a, b, residual
