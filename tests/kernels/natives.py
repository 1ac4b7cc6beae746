"""Layers and inputs for the tests of the native kernels and of what equals them."""

from __future__ import annotations

import pytest
import torch

from omega_qvla.config.recipe import ActivationScheme, Scheme, WeightScheme
from omega_qvla.kernels.cpu import isa_names
from omega_qvla.numerics.layer import QuantizedLayer
from omega_qvla.numerics.packing import pack_int4

CPU = torch.device("cpu")
DYNAMIC = ("per_token", "per_token_group")
KINDS = (*DYNAMIC, "per_step_tensor", "per_step_group")
ISAS = isa_names()

needs_native = pytest.mark.skipif(not ISAS, reason="the native kernels are not built here")


def codes(width: int, out: int) -> torch.Tensor:
    """The weights of `integers`: int8 [out, width], the first row as low as can be."""
    generator = torch.Generator().manual_seed(width + out)
    q = torch.randint(-8, 8, (out, width), generator=generator, dtype=torch.int8)
    q[0] = -8
    return q


def integers(
    kind: str, width: int, out: int, bits: int = 4, group: int | None = None, act_group: int = 64
) -> QuantizedLayer:
    """A layer of random int4 weights whose scales are all 1."""
    activation = ActivationScheme(kind, bits=bits, group=act_group)  # type: ignore[arg-type]
    groups = -(-width // act_group) if kind == "per_step_group" else 1
    return QuantizedLayer(
        name="l",
        side="backbone",
        in_features=width,
        out_features=out,
        scheme=Scheme(weight=WeightScheme(group=group), activation=activation),
        num_steps=None,
        qweight=pack_int4(codes(width, out)),
        weight_scale=torch.ones(out, 1 if group is None else -(-width // group)).half(),
        act_scale=torch.ones(1, groups) if activation.static else None,
    )


def whole_numbers(rows: int, layer: QuantizedLayer) -> torch.Tensor:
    """Inputs that quantize to themselves: int64 [rows, in], the first row as large as can be."""
    activation = layer.scheme.activation
    qmax = 2 ** (activation.bits - 1) - 1
    generator = torch.Generator().manual_seed(rows)
    x = torch.randint(-qmax - 1, qmax + 1, (rows, layer.in_features), generator=generator)
    if not activation.static:
        x = x.clamp(-qmax, qmax)
        x[:, :: activation.group] = qmax  # the largest of every group
    x[0] = -qmax
    return x
