"""Compiled layer norms against torch's."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn.functional import layer_norm

from numerics.problems import random
from omega_qvla.kernels.rows import compiled
from omega_qvla.modules import norm as norms
from omega_qvla.modules.norm import CompiledLayerNorm, use_compiled_norms

built = pytest.mark.skipif(compiled() is None, reason="the kernels are not built here")


def plain(bias: bool = True) -> nn.LayerNorm:
    made = nn.LayerNorm(48, eps=1e-4, bias=bias)
    made.weight = nn.Parameter(random(48, seed=1))
    if bias:
        made.bias = nn.Parameter(random(48, seed=2))
    return made


@built
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(48,), (7, 48), (2, 5, 48), (0, 48)])
def test_the_values_are_those_of_torch(bias: bool, shape: tuple[int, ...]) -> None:
    norm = plain(bias)
    made = CompiledLayerNorm.of(norm)
    assert made.weight is norm.weight and made.bias is norm.bias
    assert set(made.state_dict()) == set(norm.state_dict())
    x = 3 * random(*shape)
    with torch.inference_mode():
        torch.testing.assert_close(made(x), norm(x), rtol=2e-6, atol=4e-6)


@built
def test_the_kernel_runs_where_it_can_and_torch_elsewhere(monkeypatch: pytest.MonkeyPatch) -> None:
    def never(*_: object) -> None:
        raise AssertionError("torch ran")

    norm = CompiledLayerNorm.of(plain())
    x = random(3, 48)
    with monkeypatch.context() as patch, torch.inference_mode():
        patch.setattr(nn.LayerNorm, "forward", never)
        norm(x)
        with pytest.raises(AssertionError, match="torch ran"):
            norm.bfloat16()(x.bfloat16())
    norm = CompiledLayerNorm.of(plain())
    with torch.enable_grad():
        out = norm(x)
    assert torch.equal(out, layer_norm(x, (48,), norm.weight, norm.bias, 1e-4))
    out.sum().backward()
    assert norm.weight.grad is not None


@built
def test_plain_norms_are_replaced_and_no_others(monkeypatch: pytest.MonkeyPatch) -> None:
    class Own(nn.LayerNorm):
        pass

    def network() -> nn.Sequential:
        others = (Own(8), nn.LayerNorm(8, elementwise_affine=False), nn.LayerNorm((4, 8)))
        return nn.Sequential(nn.LayerNorm(8), nn.Sequential(*others, nn.LayerNorm(8)))

    module = network()
    names = set(module.state_dict())
    assert use_compiled_norms(module) == 2 and use_compiled_norms(module) == 0
    assert isinstance(module[0], CompiledLayerNorm) and isinstance(module[1][3], CompiledLayerNorm)
    assert set(module.state_dict()) == names
    monkeypatch.setattr(norms.rows, "compiled", lambda: None)
    assert use_compiled_norms(network()) == 0
