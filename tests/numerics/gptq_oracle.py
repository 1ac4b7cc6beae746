"""GPTQ as a textbook says it, without any factorization: slow, for tests."""

from __future__ import annotations

import torch


def solve(
    weight: torch.Tensor, hessian: torch.Tensor, step: torch.Tensor, damp: float, bits: int = 4
) -> torch.Tensor:
    """Round column after column; after each, the open columns take the values that minimise
    the damped objective given all fixed ones (a linear system). Returns integers, float64.
    """
    width = weight.shape[1]
    h = hessian.double()
    mean = h.diagonal()[h.diagonal() > 0].mean()
    h = h + damp * mean * torch.eye(width, dtype=torch.float64)
    low, high = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
    weight, step = weight.double(), step.double()
    current, q = weight.clone(), torch.zeros_like(weight)
    for i in range(width):
        q[:, i] = (current[:, i] / step[:, i]).round().clamp(low, high)
        fixed_error = weight[:, : i + 1] - q[:, : i + 1] * step[:, : i + 1]
        if i + 1 < width:
            pull = fixed_error @ h[: i + 1, i + 1 :]
            moved = torch.linalg.solve(h[i + 1 :, i + 1 :], pull.T).T
            current[:, i + 1 :] = weight[:, i + 1 :] + moved
    return q
