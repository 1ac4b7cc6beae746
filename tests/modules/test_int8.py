"""Rows in 8 bits: nearest, one scale each, however many rows there are."""

from __future__ import annotations

import pytest
import torch

from omega_qvla.errors import NumericsError
from omega_qvla.modules.int8 import QMAX, quantize_rows


def test_rows_are_rounded_each_by_its_own_scale() -> None:
    weight = torch.randn(9000, 6, generator=torch.Generator().manual_seed(0)).bfloat16()
    weight[7] = 0
    q, scale = quantize_rows(weight)
    assert q.dtype == torch.int8 and tuple(scale.shape) == (9000, 1)
    wide = weight.float()
    expected = wide.abs().amax(1, keepdim=True) / QMAX
    expected[7] = 1
    assert torch.equal(scale, expected)
    assert torch.equal(q, (wide / expected).round().to(torch.int8))
    assert float((q * scale - wide).abs().max()) <= float(scale.max()) / 2 * (1 + 1e-5)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_8_bits_cannot_hold_is_refused(value: float) -> None:
    """Rounded, it would be some integer, and the fault of the checkpoint would be hidden."""
    weight = torch.ones(5000, 2)
    weight[4500, 1] = value
    with pytest.raises(NumericsError, match="8 bits holds NaN or infinite"):
        quantize_rows(weight)
