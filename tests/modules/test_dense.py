"""Layers in full precision on the other product: the same layer, the same values."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from numerics.problems import random
from omega_qvla.kernels.rows import compiled
from omega_qvla.modules.dense import WORTH_IT, DenseLinear, onednn_available, use_dense

pytestmark = pytest.mark.skipif(
    not onednn_available() or compiled() is None, reason="needs x86, oneDNN and the kernels"
)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(64, 256), (2, 40, 256), (1, 256)])
def test_the_values_are_those_of_torch(
    bias: bool, shape: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = nn.Linear(256, 192, bias=bias)
    dense = DenseLinear.of(plain)
    assert dense.weight is plain.weight and dense.bias is plain.bias
    assert set(dense.state_dict()) == set(plain.state_dict())
    x = random(*shape)
    with torch.inference_mode():
        torch.testing.assert_close(dense(x), plain(x), rtol=0, atol=3e-6)
        assert dense.packed is not None
        dense.packed, small = None, dense._small
        monkeypatch.setattr("omega_qvla.modules.dense.SMALL", 0)  # as larger layers run
        torch.testing.assert_close(dense(x), plain(x), rtol=0, atol=3e-6)
        assert dense.packed is None and small(x) is not None
        assert dense._takes(x) == (x.numel() * 192 >= WORTH_IT)
        strided = torch.cat([x, x], -1)[..., 256:]
        torch.testing.assert_close(dense(strided), plain(x), rtol=0, atol=3e-6)


def test_gradients_and_other_dtypes_take_the_usual_way() -> None:
    plain = nn.Linear(256, 256)
    dense, x = DenseLinear.of(plain), random(64, 256)
    with torch.enable_grad():
        out = dense(x)
    assert torch.equal(out, plain(x)) and out.requires_grad
    half = DenseLinear.of(nn.Linear(256, 256).bfloat16())
    with torch.inference_mode():
        assert half(x.bfloat16()).dtype == torch.bfloat16


def test_all_plain_layers_are_replaced_and_no_others() -> None:
    class Own(nn.Linear):
        pass

    module = nn.Sequential(nn.Linear(8, 8), nn.Sequential(Own(8, 8), nn.Linear(8, 4)))
    names = set(module.state_dict())
    assert use_dense(module) == 2
    assert [type(m).__name__ for m in module.modules() if isinstance(m, nn.Linear)] == [
        "DenseLinear", "Own", "DenseLinear",
    ]  # fmt: skip
    assert set(module.state_dict()) == names
    assert use_dense(module) == 0
