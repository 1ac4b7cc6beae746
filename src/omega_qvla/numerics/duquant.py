"""DuQuant's change of basis: a greedy rotation, a zig-zag permutation, a second rotation.

Lin et al. 2024, arXiv:2406.01721. Each rotation is one B x B block used for every B channels.
It is searched on calibration tokens: one after the other, elementary rotations are applied that
spread the channel with the largest value over its whole block, and the product of those up to
the lowest peak is kept. The permutation deals the channels out to the blocks, largest first and
back and forth, so that all blocks carry alike; then comes the second rotation.
"""

from __future__ import annotations

import torch
from torch import Tensor

from omega_qvla.errors import NumericsError

# Greedy steps that are tried (`max_rotation_step`); the best prefix of them is kept.
GREEDY_STEPS = 256


def shared_block(width: int, block: int) -> int:
    """The largest power of two up to `block` that divides `width`: every block is whole."""
    size = block
    while width % size:
        size //= 2
    return size


def spreading_rotation(size: int) -> Tensor:
    """Orthogonal float64 [size, size] whose first row is 1/sqrt(size) throughout.

    x R spreads channel 0 evenly; the other rows are those of the Helmert matrix.
    """
    rows = torch.arange(size, dtype=torch.float64)
    matrix = torch.tril(torch.ones(size, size, dtype=torch.float64), -1)
    matrix[1:] /= (rows[1:] * (rows[1:] + 1)).sqrt()[:, None]
    matrix.diagonal()[1:] = -(rows[1:] / (rows[1:] + 1)).sqrt()
    matrix[0] = size**-0.5
    return matrix


def apply_shared(x: Tensor, rotation: Tensor) -> Tensor:
    """x [..., in] times rotation [1, B, B], the same for every B channels; dtype of x.

    Raises:
        NumericsError: B does not divide the width.
    """
    size = rotation.shape[-1]
    if x.shape[-1] % size:
        raise NumericsError(f"a shared rotation of {size} does not divide width {x.shape[-1]}")
    return (x.reshape(-1, size) @ rotation[0].to(x.dtype)).reshape(x.shape)


def apply_shared_t(x: Tensor, rotation: Tensor) -> Tensor:
    """The inverse of `apply_shared`."""
    return apply_shared(x, rotation.transpose(1, 2))


def greedy_rotation(x: Tensor, block: int, steps: int = GREEDY_STEPS) -> Tensor:
    """The rotation [1, B, B], float64, that the greedy search finds for tokens x [n, in].

    Peaks are the largest magnitudes of a channel over tokens and blocks, so max |x R| falls or
    stays. B divides in.
    """
    values = x.float().reshape(-1, block)
    spread = spreading_rotation(block).to(x.device)
    current = torch.eye(block, dtype=torch.float64, device=x.device)
    best, lowest = current, float(values.abs().max())
    for _ in range(steps):
        peak = int(values.abs().amax(0).argmax())
        order = torch.arange(block, device=x.device)
        order[0], order[peak] = peak, 0
        elementary = spread[order][:, order]  # spreads channel `peak` instead of channel 0
        values, current = values @ elementary.float(), current @ elementary
        highest = float(values.abs().max())
        if highest < lowest:
            best, lowest = current, highest
    return best.unsqueeze(0)


def dealing_permutation(x: Tensor, block: int) -> Tensor:
    """Order of the channels of x [n, in], int64 [in]: dealt out to the blocks of `block`
    channels in falling order of their peak, back and forth; in each block largest first."""
    width = x.shape[1]
    order = x.abs().amax(0).argsort(descending=True, stable=True)
    hands = order.reshape(block, width // block).clone()
    hands[1::2] = hands[1::2].flip(1)
    return hands.T.reshape(-1).contiguous()


def duquant_transform(x: Tensor, block: int) -> tuple[Tensor, Tensor, Tensor]:
    """(first rotation, permutation, second rotation) for tokens x [n, in], see the module.

    Rotations float16 [1, B, B], permutation int32 [in]; later parts are searched on what the
    stored earlier ones make of the tokens. The published code looks at the tokens of a single
    sequence; so may x be a sample.
    """
    size = shared_block(x.shape[1], block)
    first = greedy_rotation(x, size).half()
    x = apply_shared(x.float(), first)
    permutation = dealing_permutation(x, size)
    x = x[:, permutation]
    return first, permutation.to(torch.int32), greedy_rotation(x, size).half()
