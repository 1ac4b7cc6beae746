"""Other activation bits for layers that are already quantized: weights do not depend on them."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

from omega_qvla.errors import PackError
from omega_qvla.numerics.layer import QuantizedLayer
from omega_qvla.numerics.qparams import qrange


def with_activation_bits(
    layers: Mapping[str, QuantizedLayer], bits: int
) -> dict[str, QuantizedLayer]:
    """The same layers with inputs rounded to `bits` bits (4, 6 or 8).

    Dynamic scales follow by themselves. A static scale per channel is a percentile over qmax
    and is moved to the new qmax. (GPTQ and smoothing were computed from unrounded inputs.)

    Raises:
        RecipeError: bits that no activation has.
        PackError: a layer does not round its inputs, or its static scales were searched for
            the old bits (named).
    """
    return {name: _change(layer, bits) for name, layer in layers.items()}


def _change(layer: QuantizedLayer, bits: int) -> QuantizedLayer:
    activation = layer.scheme.activation
    if activation.kind == "none":
        raise PackError(f"layer {layer.name} does not round its inputs: no bits to override")
    changed = dataclasses.replace(activation, bits=bits)
    if bits == activation.bits:
        return layer
    table = layer.act_scale
    if table is not None:
        if activation.kind != "per_step_channel":
            raise PackError(
                f"layer {layer.name}: its {activation.kind} scales were searched for "
                f"{activation.bits} bits; build the pack anew with --act-bits {bits}"
            )
        table = table * (qrange(activation.bits)[1] / qrange(bits)[1])
    scheme = dataclasses.replace(layer.scheme, activation=changed)
    return dataclasses.replace(layer, scheme=scheme, act_scale=table)
