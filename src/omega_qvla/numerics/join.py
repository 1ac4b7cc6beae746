"""Layers that read the same input as one layer: their rows, one below the other."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import torch
from torch import Tensor

from omega_qvla.errors import NumericsError
from omega_qvla.numerics.layer import QuantizedLayer

# What decides the integers of the input, besides the scheme.
_INPUT = ("smooth", "permutation", "rotation", "signs", "act_scale")


def same_input(a: QuantizedLayer, b: QuantizedLayer) -> bool:
    """Whether a and b turn every input into the same integers and scales, to the last bit.

    An output rotation belongs to one layer's rows: a layer with one agrees with none.
    """
    if a.output_rotation is not None or b.output_rotation is not None:
        return False
    mine, yours = (
        (layer.in_features, layer.side, layer.num_steps, layer.scheme) for layer in (a, b)
    )
    return mine == yours and all(_same(getattr(a, n), getattr(b, n)) for n in _INPUT)


def _same(a: Tensor | None, b: Tensor | None) -> bool:
    if a is None or b is None:
        return a is b
    return torch.equal(a, b)


def join_layers(layers: Sequence[QuantizedLayer]) -> QuantizedLayer:
    """One layer whose output is that of `layers`, side by side in the last dimension.

    Weights, scales and biases are stacked (a missing bias is zeros where another has one).
    Low-rank parts stay apart: their ranks follow one another, and a row has zeros in `lowrank_a`
    but for its own layer's ranks, which adds nothing to any sum.

    Raises:
        NumericsError: there are fewer than two, or their inputs are not the same.
    """
    if len(layers) < 2 or not all(same_input(layers[0], layer) for layer in layers[1:]):
        names = ", ".join(layer.name for layer in layers) or "none"
        raise NumericsError(f"layers that do not share their input's integers: {names}")
    first = layers[0]
    weight = dataclasses.replace(first.scheme.weight, rank=first.scheme.weight.rank * len(layers))
    ranked = first.scheme.weight.rank > 0
    return dataclasses.replace(
        first,
        name=" + ".join(layer.name for layer in layers),
        out_features=sum(layer.out_features for layer in layers),
        scheme=dataclasses.replace(first.scheme, weight=weight),
        qweight=torch.cat([layer.qweight for layer in layers]),
        weight_scale=torch.cat([layer.weight_scale for layer in layers]),
        bias=_biases(layers),
        lowrank_a=_diagonal(_all(layers, "lowrank_a")) if ranked else None,
        lowrank_b=torch.cat(_all(layers, "lowrank_b"), dim=1) if ranked else None,
    )


def _biases(layers: Sequence[QuantizedLayer]) -> Tensor | None:
    if all(layer.bias is None for layer in layers):
        return None
    parts = [
        layer.weight_scale.new_zeros(layer.out_features, dtype=torch.float32)
        if layer.bias is None
        else layer.bias
        for layer in layers
    ]
    return torch.cat(parts)


def _diagonal(blocks: list[Tensor]) -> Tensor:
    joined: Tensor = torch.block_diag(*blocks)  # type: ignore[no-untyped-call]
    return joined


def _all(layers: Sequence[QuantizedLayer], field: str) -> list[Tensor]:
    return [getattr(layer, field) for layer in layers]
