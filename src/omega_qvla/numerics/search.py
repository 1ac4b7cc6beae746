"""Smoothing and clipping that are searched for the least output error, as AWQ does.

AWQ (Lin et al. 2023, arXiv:2306.00978) scales salient input channels up before rounding, by
their mean magnitude to a power found on a grid, then clips each group of weights where that
lowers the output error. The search over the power also serves SVDQuant's smoothing, where
inputs are rounded and a low-rank branch runs beside.
"""

from __future__ import annotations

import torch
from torch import Tensor

from omega_qvla.config.recipe import ActivationScheme, Scheme, Smoothing, WeightScheme
from omega_qvla.errors import NumericsError
from omega_qvla.numerics.activation import quantize_per_token, quantize_per_token_group
from omega_qvla.numerics.low_rank import low_rank_split
from omega_qvla.numerics.qparams import (
    expand_groups,
    group_count,
    qrange,
    split_groups,
    storable,
    weight_scales,
    widest_scale,
)
from omega_qvla.numerics.rtn import dequantize, round_weight
from omega_qvla.numerics.smoothing import DIVISOR_LIMIT, smoothing_divisor

# AWQ's own grids: 20 powers in [0, 1); clipping down to half of absmax in steps of a twentieth.
ALPHAS = tuple(i / 20 for i in range(20))
_SHRINKS = tuple(1 - i / 20 for i in range(10))
# Tokens that a search judges by: more change the choice of the power by a step at most.
SEARCH_TOKENS = 512


def sample_tokens(tokens: tuple[Tensor, ...], limit: int) -> Tensor:
    """At most `limit` of all steps' tokens, evenly spaced: float32 [n, in]."""
    pooled = torch.cat([sample.float() for sample in tokens])
    stride = max(1, -(-len(pooled) // limit))
    return pooled[::stride]


def rounded_inputs(x: Tensor, activation: ActivationScheme) -> Tensor:
    """x [n, in] as the layer sees it: rounded and scaled back; dynamic kinds and `none`.

    Raises:
        NumericsError: a static kind, whose table is not made yet.
    """
    if activation.kind == "none":
        return x
    if activation.kind == "per_token":
        q, scale = quantize_per_token(x, activation.bits, activation.clip, activation.signed)
        return q * scale
    if activation.kind == "per_token_group":
        group = activation.group
        q, scale = quantize_per_token_group(
            x, activation.bits, group, activation.clip, activation.signed
        )
        return q * expand_groups(scale, x.shape[-1], group)
    raise NumericsError(f"no search with {activation.kind} inputs: only dynamic kinds and none")


def divisor_for(smoothing: Smoothing, x: Tensor, w: Tensor, alpha: float) -> Tensor:
    """The divisor [in] of channel sizes x and w for one power.

    `mean` (AWQ): x^alpha alone, brought to sqrt(max * min) = 1 as AWQ has it.
    """
    if smoothing.profile != "mean":
        return smoothing_divisor(x, w, alpha)
    live = x > 0
    if not bool(live.any()):
        return torch.ones_like(x, dtype=torch.float32)
    d = torch.ones_like(x, dtype=torch.float64)
    d[live] = x[live].double().pow(alpha).clamp_min(1e-4)
    d /= (d[live].max() * d[live].min()).sqrt()
    d[~live] = 1.0
    return d.clamp(1 / DIVISOR_LIMIT, DIVISOR_LIMIT).float()


def output_error(weight: Tensor, x: Tensor, divisor: Tensor, scheme: Scheme) -> float:
    """Mean squared output error over tokens x [n, in] with this divisor, weights rounded to
    nearest, the low-rank part kept, inputs rounded as the scheme says."""
    w, inputs = weight * divisor, x / divisor
    part = scheme.weight
    exact = torch.zeros(len(x), len(weight), dtype=x.dtype, device=x.device)
    rest = w
    if part.rank:
        a, b, rest = low_rank_split(w, part.rank)
        exact = inputs @ b @ a.T
    grid = "max" if part.grid == "output" else part.grid
    scale = weight_scales(rest, part.bits, part.group, grid, signed=part.signed)
    wq = dequantize(round_weight(rest, scale, part.bits, part.group), scale, part.group)
    y = rounded_inputs(inputs, scheme.activation) @ wq.T + exact
    return float((y - x @ weight.T).square().mean())


def search_divisor(
    weight: Tensor, tokens: tuple[Tensor, ...], x: Tensor, w: Tensor, scheme: Scheme
) -> Tensor:
    """The divisor of least `output_error` among the powers ALPHAS, as 16 bits will hold it.

    weight [out, in]; x, w: channel sizes [in].
    """
    assert scheme.smoothing is not None
    sample = sample_tokens(tokens, SEARCH_TOKENS)
    best, least = torch.ones_like(x), float("inf")
    for alpha in ALPHAS:
        divisor = divisor_for(scheme.smoothing, x, w, alpha).half().float()
        error = output_error(weight, sample, divisor, scheme)
        if error < least:
            best, least = divisor, error
    return best


def output_scales(
    weight: Tensor, hessian: Tensor, scheme: WeightScheme, store: torch.dtype | None = None
) -> Tensor:
    """AWQ's clipping: per row and group, the scale of least e H_gg e^T, e the rounding error.

    weight [out, in], hessian [in, in] of its inputs -> [out, n_groups] in the weight's dtype.
    """
    (low, high), group = qrange(scheme.bits), scheme.group
    blocks = split_groups(weight, group)
    size = blocks.shape[-1]
    padded = group_count(weight.shape[1], group) * size - weight.shape[1]
    h = torch.nn.functional.pad(hessian.to(weight.dtype), (0, padded, 0, padded))
    n_groups = h.shape[0] // size
    h = h.view(n_groups, size, n_groups, size).diagonal(dim1=0, dim2=2).permute(2, 0, 1)
    absmax = widest_scale(blocks, scheme.bits, signed=scheme.signed)
    best = storable(absmax, store)
    least = torch.full_like(best, float("inf"))
    for shrink in _SHRINKS:
        scale = storable(absmax * (shrink * scheme.clip), store)
        step = scale.unsqueeze(-1)
        error = (blocks / step).round_().clamp_(low, high).mul_(step).sub_(blocks)
        loss = (torch.einsum("ogi,gij->ogj", error, h) * error).sum(-1)
        better = loss < least
        best, least = torch.where(better, scale, best), torch.where(better, loss, least)
    return best


def rounded_moments(hessian: Tensor, x: Tensor, activation: ActivationScheme) -> Tensor:
    """Second moments E[Q(x)^T Q(x)] of the inputs as the layer sees them, float64 [in, in].

    hessian: E[x^T x] [in, in] over all tokens; x [n, in]: a sample of them. Each channel is
    modelled alone, Q(x)_j = g_j x_j + n_j with a noise n_j that goes with nothing: nearly true
    where the step is below the spread, and a sample says nothing reliable about in^2 noise
    covariances. Positive semi-definite by construction.
    """
    x, rounded = x.double(), rounded_inputs(x, activation).double()
    energy = x.square().mean(0)
    live = energy > 0
    safe = torch.where(live, energy, torch.ones_like(energy))
    gain = torch.where(live, (x * rounded).mean(0) / safe, torch.ones_like(energy))
    noise = (rounded - gain * x).square().mean(0)
    plain = hessian.double()
    # The sample's energy is not quite the Hessian's: noise is taken relative to it.
    noise = noise * torch.where(live, plain.diagonal() / safe, torch.zeros_like(energy))
    return gain[:, None] * plain * gain + torch.diag(noise)
