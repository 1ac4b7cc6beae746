"""Round to nearest: the plainest quantizer, and the baseline of every other."""

from __future__ import annotations

import torch
from torch import Tensor

from omega_qvla.errors import NumericsError
from omega_qvla.numerics.qparams import expand_groups, group_count, qrange


def infer_group(width: int, n_groups: int, group: int | None) -> int | None:
    """The group size behind `n_groups` scales, checked against `group` where that is given.

    One scale is a row's. Without `group`, several scales must divide the width evenly:
    a short last group cannot be guessed.
    """
    if group is not None:
        if group_count(width, group) != n_groups:
            raise NumericsError(f"{n_groups} scales, but groups of {group} in {width} columns")
        return group
    if n_groups == 1:
        return None
    if width % n_groups:
        raise NumericsError(f"{n_groups} scales do not divide {width} columns: pass group=")
    return width // n_groups


def round_weight(weight: Tensor, scale: Tensor, bits: int = 4, group: int | None = None) -> Tensor:
    """Nearest integers of weight [out, in] on the grid of scale [out, n_groups]: int8 [out, in].

    Raises:
        NumericsError: the scales do not fit the width.
    """
    width = weight.shape[-1]
    low, high = qrange(bits)
    step = expand_groups(scale, width, infer_group(width, scale.shape[-1], group))
    return (weight / step).round_().clamp_(low, high).to(torch.int8)


def dequantize(q: Tensor, scale: Tensor, group: int | None = None) -> Tensor:
    """q [out, in] times its scale [out, n_groups], in the scale's dtype.

    Raises:
        NumericsError: the scales do not fit the width.
    """
    width = q.shape[-1]
    step = expand_groups(scale, width, infer_group(width, scale.shape[-1], group))
    return q.to(scale.dtype) * step
