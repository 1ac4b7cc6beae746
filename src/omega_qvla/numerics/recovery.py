"""Back from dequantized weights to integers: which grid do stored floats lie on?

A fake-quantized file holds fl(q * s), rounded to 16 (or 32) bits, q an integer of few bits
and s one number per row and group of columns. Both are recovered, not fitted: every stored
value says in which interval s must lie for its q, and the grid is accepted only if one s
satisfies all values of its group, that is, reproduces every stored bit.
"""

from __future__ import annotations

import torch
from torch import Tensor

from omega_qvla.errors import NumericsError
from omega_qvla.numerics.qparams import check_weight, qrange, split_groups

# (fraction bits, smallest exponent) of the dtypes that weights are stored in.
_FORMATS = {torch.float16: (10, -14), torch.float32: (23, -126)}
# fl16(fl32(q * s)): a product on the edge of an interval may have been rounded across it.
_SLACK = 1 + 2.0**-12
_CHUNK = 1 << 20


def recover_grid(weight: Tensor, bits: int = 4, group: int | None = 128) -> tuple[Tensor, Tensor]:
    """(q int8 [out, in], scale float64 [out, n_groups]) of a stored weight [out, in].

    fl(q * scale), fl rounding to the weight's dtype, equals `weight` in every entry. q is
    unique up to a factor common to its group; the smallest integers are taken. Scales are
    float32 values, as they were where the weight was made; a group of zeros has scale 1.

    Args:
        weight: float16 or float32, as stored.
        bits: of the integers.
        group: columns that share a scale; None: a whole row.

    Raises:
        NumericsError: a group lies on no such grid (row and columns named), or the dtype is
            none that weights are stored in.
    """
    check_weight(weight)
    if weight.dtype not in _FORMATS:
        raise NumericsError(f"stored weights are float16 or float32, not {weight.dtype}")
    step = max(1, _CHUNK // weight.shape[1])
    parts = [_recover(part, bits, group) for part in torch.split(weight, step)]
    found = torch.cat([part[2] for part in parts])
    if not bool(found.all()):
        row, column = (int(i) for i in (~found).nonzero()[0])
        width = weight.shape[1] if group is None else group
        first = column * width
        raise NumericsError(
            f"{int((~found).sum())} of {found.numel()} groups lie on no {bits}-bit grid, the "
            f"first in row {row}, columns {first} to {min(first + width, weight.shape[1]) - 1}"
        )
    q = torch.cat([part[0] for part in parts]).flatten(1)[:, : weight.shape[1]]
    return q.contiguous(), torch.cat([part[1] for part in parts])


def _recover(weight: Tensor, bits: int, group: int | None) -> tuple[Tensor, Tensor, Tensor]:
    """(q int8 [out, n, group], scale [out, n], on a grid? [out, n]) of a few rows."""
    lowest, highest = qrange(bits)
    values = split_groups(weight.double(), group)
    below, above = _margins(values, weight.dtype)
    largest = values.abs().amax(-1)
    found = largest == 0
    q, scale = torch.zeros_like(values, dtype=torch.int8), torch.ones_like(largest)
    for top in range(1, -lowest + 1):  # the integer of the largest value
        guess = (
            values / (largest / top).clamp_min(torch.finfo(values.dtype).tiny)[..., None]
        ).round()
        size, inside = guess.abs(), (guess >= lowest) & (guess <= highest)
        low = torch.where(size > 0, (values.abs() - below) / size, 0.0).amax(-1)
        high = torch.where(size > 0, (values.abs() + above) / size, torch.inf).amin(-1)
        wrong = ((size == 0) & (values != 0)) | ~inside
        middle = ((low + high) / 2).float().double()  # what is computed in float32 was one
        # On the edge of its interval a tie may go the other way: what counts is the result.
        wrong |= (guess * middle[..., None]).to(weight.dtype) != values.to(weight.dtype)
        fits = (low <= high) & ~wrong.any(-1) & ~found
        q = torch.where(fits[..., None], guess.to(torch.int8), q)
        scale = torch.where(fits, middle, scale)
        found |= fits
    return q, scale, found


def _margins(values: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """How far below and above |value| a number may lie that `dtype` rounds to it."""
    fraction, smallest = _FORMATS[dtype]
    mantissa, exponent = torch.frexp(values.abs())  # in [0.5, 1)
    exponent = (exponent - 1).clamp_min(smallest)
    half = torch.ldexp(torch.full_like(values, 0.5 * _SLACK), exponent - fraction)
    at_power = (mantissa == 0.5) & (exponent > smallest)  # the spacing below is half as wide
    return torch.where(at_power, half / 2, half), half
