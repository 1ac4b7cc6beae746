"""DuQuant's parts do what they are for: peaks fall, blocks carry alike, nothing else changes."""

from __future__ import annotations

import pytest
import torch

from omega_qvla.errors import NumericsError
from omega_qvla.numerics.duquant import (
    apply_shared,
    apply_shared_t,
    dealing_permutation,
    duquant_transform,
    greedy_rotation,
    shared_block,
    spreading_rotation,
)

from .problems import random


def outlier_tokens(width: int = 96, at: int = 37) -> torch.Tensor:
    x = random(200, width)
    x[:, at] *= 60
    x[3, 5] = 400  # a massive token on another channel
    return x


@pytest.mark.parametrize("size", [1, 2, 8, 64])
def test_the_elementary_rotation_is_orthogonal_and_spreads_channel_0(size: int) -> None:
    rotation = spreading_rotation(size)
    eye = torch.eye(size, dtype=torch.float64)
    torch.testing.assert_close(rotation @ rotation.T, eye, rtol=0, atol=1e-12)
    torch.testing.assert_close(rotation[0], torch.full((size,), size**-0.5, dtype=torch.float64))


@pytest.mark.parametrize(
    ("width", "expected"), [(256, 128), (192, 64), (576, 64), (100, 4), (7, 1)]
)
def test_blocks_divide_the_width(width: int, expected: int) -> None:
    assert shared_block(width, 128) == expected


def test_the_greedy_search_lowers_the_peak_more_the_longer_it_looks() -> None:
    x = outlier_tokens()
    peaks = []
    for steps in (0, 1, 16, 64):
        rotation = greedy_rotation(x, 32, steps)
        eye = torch.eye(32, dtype=torch.float64)
        torch.testing.assert_close(rotation[0] @ rotation[0].T, eye, rtol=0, atol=1e-10)
        peaks.append(float(apply_shared(x.double(), rotation).abs().max()))
    assert peaks == sorted(peaks, reverse=True)
    assert peaks[0] == 400 and peaks[-1] < 0.45 * peaks[0]  # .33 measured


def test_channels_are_dealt_out_so_that_blocks_carry_alike() -> None:
    x = random(50, 64) * torch.arange(1.0, 65.0)
    order = dealing_permutation(x, 16)
    assert torch.equal(order.sort().values, torch.arange(64))
    peaks = x.abs().amax(0)[order].view(4, 16)
    assert bool((peaks[:, :-1] >= peaks[:, 1:]).all())  # largest first in each block
    before = x.abs().amax(0).view(4, 16).mean(1)
    assert float(peaks.mean(1).std()) < 0.05 * float(before.std())
    # By hand: 4 channels in 2 blocks are dealt 3 | 2, then back 0 | 1.
    assert dealing_permutation(torch.tensor([[1.0, 2.0, 3.0, 4.0]]), 2).tolist() == [3, 0, 2, 1]


def test_both_rotations_and_the_permutation_flatten_the_channels() -> None:
    x = outlier_tokens(128)
    first, order, second = duquant_transform(x, 32)
    assert first.shape == second.shape == (1, 32, 32) and first.dtype == torch.float16
    one = apply_shared(x, first)
    both = apply_shared(one[:, order.long()], second)
    peaks = [float(value.abs().max()) for value in (x, one, both)]
    assert peaks[0] == 400 and peaks[1] < 100 and peaks[2] <= peaks[1]  # 73 measured
    torch.testing.assert_close(apply_shared_t(one, first), x, rtol=0, atol=0.5)  # 16-bit blocks


def test_a_block_that_does_not_divide_is_refused() -> None:
    with pytest.raises(NumericsError, match="8 does not divide width 12"):
        apply_shared(torch.ones(1, 12), torch.eye(8)[None])
