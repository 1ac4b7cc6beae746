"""Learnable weight clipping and a learnable equivalent transformation, as OmniQuant has them.

Shao et al. 2023, arXiv:2308.13137. The smoothing divisor (in log space) and, per row, the
fraction of absmax that the weight grid spans (a sigmoid, starting at sigmoid(4) = .98) are moved
by Adam to lower the output error of the rounded layer; rounding passes gradients straight
through. Shortened against the paper: one layer at a time instead of a block, on inputs of the
full-precision network, a few hundred steps instead of 20 epochs, and no shift of the channels
(a pack has no room for one). Symmetric like everything here, so one clipping factor a row.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from omega_qvla.config.recipe import ActivationScheme, Learning, Scheme
from omega_qvla.numerics.qparams import check_storable, qrange, storable
from omega_qvla.numerics.search import sample_tokens
from omega_qvla.numerics.smoothing import DIVISOR_LIMIT

_INITIAL_CLIP = 4.0  # before the sigmoid
_TOKENS = 2048
_CHECKS = 10  # how often the loss on all tokens is looked at


@dataclass(frozen=True)
class Learned:
    """What learning gives: divisor float16 [in], scale [out, 1] exact in float16.

    losses: on all tokens, before, now and then, and at the end; divisor and scale are those
    of the lowest.
    """

    divisor: Tensor
    scale: Tensor
    losses: tuple[float, ...]


def _straight(x: Tensor, rounded: Tensor) -> Tensor:
    """`rounded`, with the gradient of x."""
    return x + (rounded - x).detach()


def _round_inputs(x: Tensor, activation: ActivationScheme) -> Tensor:
    if activation.kind == "none":
        return x
    assert activation.kind == "per_token"  # `Scheme` refuses to learn with others
    low, high = qrange(activation.bits)
    scale = (x.abs().amax(-1, keepdim=True) * (activation.clip / high)).clamp_min(1e-12)
    scaled = x / scale
    return _straight(scaled, scaled.round().clamp(low, high)) * scale


def learn(weight: Tensor, tokens: tuple[Tensor, ...], divisor: Tensor, scheme: Scheme) -> Learned:
    """Divisor and weight scales for weight [out, in], from the given divisor [in].

    The best state by the loss on all tokens is kept, so the end is never worse than the start.

    A divisor beyond DIVISOR_LIMIT is brought back to it, and the scales are those of what it then
    makes of the weights: x/d and W*d stay each other's inverse, whatever d is.

    Raises:
        NumericsError: the scales do not fit in float16.
    """
    learning = scheme.learning
    assert learning is not None
    x = sample_tokens(tokens, _TOKENS)
    target = x @ weight.T
    log_d = divisor.float().log().clone().requires_grad_()
    clip = torch.full((len(weight), 1), _INITIAL_CLIP, device=weight.device).requires_grad_()

    def scale_of(smoothed: Tensor) -> Tensor:
        peak = smoothed.abs().amax(1, keepdim=True)
        return peak * torch.sigmoid(clip) / qrange(scheme.weight.bits)[1]

    def loss_on(inputs: Tensor, expected: Tensor) -> Tensor:
        d = log_d.exp()
        smoothed = weight * d
        scale = scale_of(smoothed).clamp_min(1e-12)
        low, high = qrange(scheme.weight.bits)
        scaled = smoothed / scale
        wq = _straight(scaled.clamp(low, high), scaled.round().clamp(low, high)) * scale
        return (_round_inputs(inputs / d, scheme.activation) @ wq.T - expected).square().mean()

    with torch.inference_mode(False), torch.enable_grad():
        best, losses = _descend(loss_on, x, target, log_d, clip, learning)
    with torch.no_grad():
        log_d.copy_(best[0])
        clip.copy_(best[1])
        half = log_d.exp().clamp(1 / DIVISOR_LIMIT, DIVISOR_LIMIT).half()
        scale = scale_of(weight * half.float())
        check_storable(scale, torch.float16)
        scale = storable(scale, torch.float16)
    return Learned(half, scale, losses)


def _descend(
    loss_on: object, x: Tensor, target: Tensor, log_d: Tensor, clip: Tensor, learning: Learning
) -> tuple[tuple[Tensor, Tensor], tuple[float, ...]]:
    """Adam on random batches; the best state seen and the losses on all tokens."""
    assert callable(loss_on)
    rates = [
        {"params": [log_d], "lr": learning.smooth_rate},
        {"params": [clip], "lr": learning.clip_rate},
    ]
    optimizer = torch.optim.Adam(rates)
    generator = torch.Generator().manual_seed(0)
    every = max(1, learning.steps // _CHECKS)
    losses: list[float] = []
    best = (log_d.detach().clone(), clip.detach().clone())
    for step in range(learning.steps + 1):
        if step % every == 0 or step == learning.steps:
            with torch.no_grad():
                losses.append(float(loss_on(x, target)))
            if losses[-1] <= min(losses):
                best = (log_d.detach().clone(), clip.detach().clone())
        if step == learning.steps:
            break
        rows = torch.randint(len(x), (min(len(x), learning.batch),), generator=generator)
        optimizer.zero_grad()
        loss_on(x[rows], target[rows]).backward()
        optimizer.step()
    return best, tuple(losses)
