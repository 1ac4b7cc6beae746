"""Weights in 8 bits with one scale per row: storage only, the product is in floating point.

For what 4 bits would harm and 16 bits would bloat: the embedding table, the vision tower.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from omega_qvla.numerics.checks import require_finite

QMAX = 127
_ROWS = 4096


def quantize_rows(weight: Tensor) -> tuple[Tensor, Tensor]:
    """weight [rows, columns] -> int8 [rows, columns], float32 scale [rows, 1]; nearest.

    A row of zeros gets scale 1. Some rows at a time: a wide copy of an embedding table would be
    several times its size.

    Raises:
        NumericsError: a value is not finite.
    """
    quantized = torch.empty(weight.shape, dtype=torch.int8, device=weight.device)
    scales = torch.empty(len(weight), 1, device=weight.device)
    for start in range(0, len(weight), _ROWS):
        rows = slice(start, start + _ROWS)
        wide = weight[rows].float()
        require_finite(wide, "a weight to be stored in 8 bits")
        scale = wide.abs().amax(1, keepdim=True) / QMAX
        scales[rows] = torch.where(scale > 0, scale, torch.ones_like(scale))
        quantized[rows] = (wide / scales[rows]).round().clamp(-QMAX, QMAX).to(torch.int8)
    return quantized, scales


class Int8Linear(nn.Module):
    """y = x W^T + b with W = weight * scale; weight int8 [out, in], scale float32 [out, 1].

    The scale is applied to the product, so no wide copy of W outlives the call.
    """

    weight: Tensor
    scale: Tensor
    bias: nn.Parameter | None

    def __init__(self, in_features: int, out_features: int, bias: bool) -> None:
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        weight = torch.zeros(out_features, in_features, dtype=torch.int8)
        self.register_buffer("weight", weight)
        self.register_buffer("scale", torch.ones(out_features, 1))
        self.bias = nn.Parameter(torch.zeros(out_features)) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        """x [..., in] -> [..., out], dtype of x."""
        out = linear(x, self.weight.to(x.dtype)) * self.scale[:, 0].to(x.dtype)
        return out if self.bias is None else out + self.bias


class Int8Embedding(nn.Module):
    """Rows weight[i] * scale[i] as `output_dtype`; weight int8 [n, d], scale float32 [n, 1]."""

    weight: Tensor
    scale: Tensor

    def __init__(self, num_embeddings: int, embedding_dim: int, output_dtype: torch.dtype) -> None:
        super().__init__()
        self.num_embeddings, self.embedding_dim = num_embeddings, embedding_dim
        self.output_dtype = output_dtype
        table = torch.zeros(num_embeddings, embedding_dim, dtype=torch.int8)
        self.register_buffer("weight", table)
        self.register_buffer("scale", torch.ones(num_embeddings, 1))

    def forward(self, ids: Tensor) -> Tensor:
        """ids int64 [...] -> [..., d]."""
        return (self.weight[ids].float() * self.scale[ids]).to(self.output_dtype)


class Absent(nn.Module):
    """In place of a layer that was left out because nothing runs it."""
