"""Weight scales: the step size of the int4 grid, per row or per (row, group of columns).

All weight quantization is symmetric: w ~ s * q with q in [-2^(bits-1), 2^(bits-1) - 1] and
qmax = 2^(bits-1) - 1. A scale is chosen by squared error over a few candidates: a scale below
absmax/qmax clips the largest weights and rounds all others more finely. A signed scale turns the
grid so that the largest weight falls on -2^(bits-1), the integer of largest magnitude (llama.cpp's
Q4_0 does so): absmax/8 then takes the place of absmax/7.
"""

from __future__ import annotations

import torch
from torch import Tensor

from omega_qvla.config.recipe import Grid
from omega_qvla.errors import NumericsError

# Candidates as fractions of absmax / qmax. `paper`: alpha of s = max|w| / (qmax * alpha).
# `fine`: dense where the optimum of bell-shaped rows lies. absmax / qmax itself is always
# tried first, so that no grid is worse than `max`.
GRIDS: dict[Grid, tuple[float, ...]] = {
    "max": (),
    "paper": tuple(1.0 / alpha for alpha in (0.5, 0.75, 1.0, 1.25, 1.5)),
    "fine": tuple(0.5 + 0.05 * i for i in range(12)),
    "output": (),  # searched by output error elsewhere, see `search.output_scales`
}
# A layer whose step is below this has no precise 16-bit float: better refused than distorted.
SMALLEST_STORED_STEP = 2.0**-20
_CACHED = 1 << 17  # numbers at a time: half a MiB in float32


def qrange(bits: int) -> tuple[int, int]:
    """(qmin, qmax) of signed integers of `bits` bits: (-8, 7) for 4."""
    return -(1 << (bits - 1)), (1 << (bits - 1)) - 1


def group_count(width: int, group: int | None) -> int:
    """How many groups of `group` columns cover `width` columns (None: one; the last is short)."""
    return 1 if group is None else -(-width // group)


def expand_groups(scale: Tensor, width: int, group: int | None) -> Tensor:
    """[..., n_groups] -> [..., width]: the scale of each column."""
    if scale.shape[-1] != group_count(width, group):
        raise NumericsError(
            f"{scale.shape[-1]} scales do not cover {width} columns in groups of {group}"
        )
    if group is None:
        return scale.expand(*scale.shape[:-1], width)
    return scale.repeat_interleave(group, dim=-1)[..., :width]


def split_groups(values: Tensor, group: int | None) -> Tensor:
    """[..., width] -> [..., n_groups, group]; a short last group is padded with zeros."""
    width = values.shape[-1]
    group = width if group is None else group
    n_groups = group_count(width, group)
    padded = torch.nn.functional.pad(values, (0, n_groups * group - width))
    return padded.reshape(*values.shape[:-1], n_groups, group)


def check_weight(weight: Tensor) -> None:
    """Raise NumericsError unless `weight` is a finite, non-empty float matrix [out, in]."""
    if weight.ndim != 2 or 0 in weight.shape:
        raise NumericsError(f"a weight must be a non-empty matrix, not {tuple(weight.shape)}")
    if not weight.is_floating_point():
        raise NumericsError(f"a weight must be floating point, not {weight.dtype}")
    if not bool(torch.isfinite(weight).all()):
        raise NumericsError("a weight has values that are not finite")


def widest_scale(blocks: Tensor, bits: int, clip: float = 1.0, signed: bool = False) -> Tensor:
    """blocks [..., n] -> [...]: the scale at which the value of largest magnitude, times `clip`,
    falls on the integer of largest magnitude of its side.

    clip * absmax / qmax; signed, clip * absmax / -qmin, negative where that value is positive,
    so that it falls on qmin.
    """
    low, high = qrange(bits)
    if not signed:
        return blocks.abs().amax(-1) * (clip / high)
    return signed_scale(blocks, clip / -low).squeeze(-1)


def signed_scale(values: Tensor, largest: float, other: float = 0.0, least: float = 0.0) -> Tensor:
    """values [..., n] -> [..., 1]: the scale that takes the largest magnitude M to qmin's side.

    Its size is max(M * largest, m * other, least), m the largest magnitude of the other sign (0 if
    there is none). It is negative where M is of a positive value; of two that are as large the
    negative one counts, and zeros alone have a positive scale. With 1/8 and clip/7 M falls on -8,
    or nearer to 0 where m needs more room than that: tokens of +c and -c alone, as a Hadamard
    makes them of a single value, would have half of their values cut from 8 to 7 by M / 8.
    """
    low, high = torch.aminmax(values, dim=-1, keepdim=True)
    below = -low
    first = torch.maximum(below, high) * largest
    second = torch.minimum(below, high).clamp_min(0) * other
    size = torch.maximum(first, second).clamp_min_(least)
    return torch.where(below >= high, size, -size)


def weight_scales(
    weight: Tensor,
    bits: int = 4,
    group: int | None = None,
    grid: Grid = "fine",
    *,
    store: torch.dtype | None = None,
    clip: float = 1.0,
    signed: bool = False,
) -> Tensor:
    """Scales of `weight` [out, in], the best of `grid` by squared rounding error.

    The candidates are fractions of `widest_scale`: of clip * absmax / qmax, or, signed, of
    clip * absmax / -qmin with the sign that takes the largest weight to qmin.

    Returns [out, n_groups] in the weight's dtype; finite, not zero, positive unless `signed`; 1
    where a group is all zero. With `store` (float16 in a pack) every candidate is rounded to that
    dtype before it is judged, so the result is exactly what can be stored.

    Raises:
        NumericsError: weight not finite; or its scales do not fit `store`.
    """
    check_weight(weight)
    if group is not None and group < 1:
        raise NumericsError(f"a group must have at least one column, not {group}")
    blocks = split_groups(weight, group)
    absmax_scale = widest_scale(blocks, bits, clip, signed)
    check_storable(absmax_scale, store)
    # Rows are independent; a few at a time stay in the processor's cache for all candidates.
    rows = max(_CACHED // max(weight.shape[1], 1), 1)
    parts = zip(torch.split(blocks, rows), torch.split(absmax_scale, rows), strict=True)
    return torch.cat([_best_scales(part, scale, bits, grid, store) for part, scale in parts])


def _best_scales(
    blocks: Tensor, absmax_scale: Tensor, bits: int, grid: Grid, store: torch.dtype | None
) -> Tensor:
    """`weight_scales` of some rows: blocks [rows, n_groups, group], scales [rows, n_groups]."""
    best_scale = storable(absmax_scale, store)
    best_error = rounding_error(blocks, best_scale, bits)
    for fraction in GRIDS[grid]:
        scale = storable(absmax_scale * fraction, store)
        error = rounding_error(blocks, scale, bits)
        better = error < best_error
        best_error = torch.where(better, error, best_error)
        best_scale = torch.where(better, scale, best_scale)
    return best_scale


def rounding_error(blocks: Tensor, scale: Tensor, bits: int) -> Tensor:
    """Squared error [..., n_groups] of rounding blocks [..., n_groups, group] with `scale`."""
    low, high = qrange(bits)
    step = scale.unsqueeze(-1)
    rounded = (blocks / step).round_().clamp_(low, high).mul_(step)
    return rounded.sub_(blocks).square_().sum(-1)


def storable(scale: Tensor, store: torch.dtype | None) -> Tensor:
    """`scale` rounded to dtype `store` (its own if None) and back, its sign kept; zeros become 1.

    A scale below the smallest number of `store` becomes that number: next to a layer's other
    scales (`check_storable` refuses a layer of nothing else) its weights vanish.
    """
    info = torch.finfo(scale.dtype if store is None else store)
    smallest = info.tiny if store is None else info.smallest_normal * info.eps  # subnormal
    rounded = scale.abs().clamp_(smallest, info.max)
    if store is not None:
        rounded = rounded.to(store).to(scale.dtype)
    return torch.where(scale.abs() > 0, torch.copysign(rounded, scale), torch.ones_like(scale))


def check_storable(scale: Tensor, store: torch.dtype | None) -> None:
    """Raise NumericsError where `storable` would distort a layer: its largest scale overflows
    `store`, or all of them are too small to be told apart in it."""
    largest = float(scale.abs().max())
    if store is None or largest == 0:
        return
    if largest > torch.finfo(store).max:
        raise NumericsError(f"a weight scale of {largest:.3g} overflows {store}; rescale the layer")
    if largest < SMALLEST_STORED_STEP:
        raise NumericsError(
            f"weight scales of at most {largest:.3g} are lost in {store}; rescale the layer"
        )
