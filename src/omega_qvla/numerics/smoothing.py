"""Channel smoothing: x/d before everything, W·d after, folded exactly where it can be.

A divisor d [in] moves range from activations into weights: d_j = rms(x_j)^α / rms(w_j)^(1-α)
(SmoothQuant, Xiao et al. 2023, with rms in place of max). The profile of x is *robust*: each
token is divided by its own rms first, else one massive token owns the profile. That also
removes the gain of a denoising step.

Folds return new tensors; they compute in float64 and round once to the dtype given, so give
them float32 where the fold must be exact to float32.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from omega_qvla.config.recipe import Profile
from omega_qvla.errors import NumericsError
from omega_qvla.numerics.checks import require_finite, require_matrix, require_vector

NormConvention = Literal["plain", "one_plus"]
# Divisors are stored in 16 bits: within 2^±12 every one is a normal float16.
DIVISOR_LIMIT = 4096.0


def robust_energy(x: Tensor) -> tuple[Tensor, int]:
    """Sum over tokens of token-normalized squares, float64 [in], and the tokens counted.

    x [n, in]; zero tokens have no direction and are not counted. Sums of several batches add
    up: profile = sqrt(Σ energy / Σ count).
    """
    require_matrix(x, "activations")
    wide = x.to(torch.float32) if x.dtype != torch.float64 else x
    peak = wide.abs().amax(dim=1, keepdim=True)
    live = peak[:, 0] > 0
    wide = wide[live] / peak[live]
    wide = wide / wide.square().mean(dim=1, keepdim=True).sqrt()
    return wide.square().sum(dim=0, dtype=torch.float64), int(live.sum())


def robust_profile(x: Tensor) -> Tensor:
    """Channel rms of token-normalized activations: x [n, in] -> float32 [in], zeros if all 0."""
    energy, count = robust_energy(x)
    return (energy / max(count, 1)).sqrt().to(torch.float32)


def plain_profile(x: Tensor) -> Tensor:
    """Channel rms of activations as they are: x [n, in] -> float32 [in]."""
    require_matrix(x, "activations")
    return x.to(torch.float64).square().mean(dim=0).sqrt().to(torch.float32)


def weight_profile(weights: Sequence[Tensor], kind: Profile = "rms") -> Tensor:
    """Channel rms over the rows of all layers that share the input: [out_i, in]... -> [in].

    kind `max`: the largest magnitude instead of the rms.
    """
    if not weights:
        raise NumericsError("weight_profile needs at least one weight")
    width = weights[0].shape[-1]
    energy = torch.zeros(width, dtype=torch.float64, device=weights[0].device)
    rows = 0
    for weight in weights:
        require_matrix(weight, "weight")
        if weight.shape[1] != width:
            raise NumericsError(f"weights of one input have widths {width} and {weight.shape[1]}")
        if kind == "max":
            energy = torch.maximum(energy, weight.abs().amax(dim=0).to(torch.float64).square())
            rows = 1
        else:
            energy += weight.to(torch.float64).square().sum(dim=0)
            rows += weight.shape[0]
    return (energy / rows).sqrt().to(torch.float32)


def token_profile(tokens: Sequence[Tensor], kind: Profile) -> Tensor:
    """Channel size over all steps' tokens [n_s, in]: largest or mean magnitude, float32 [in]."""
    pooled = torch.cat([sample.float() for sample in tokens])
    require_matrix(pooled, "activations")
    return pooled.abs().amax(dim=0) if kind == "max" else pooled.abs().mean(dim=0)


def smoothing_divisor(x_profile: Tensor, w_profile: Tensor, alpha: float = 0.5) -> Tensor:
    """d [in] float32, finite and positive: x^α / w^(1-α), scaled to geometric mean 1.

    The common factor cancels between x/d and W·d. Channels whose activations or weights are
    all zero get 1. Values stay within 1/DIVISOR_LIMIT..DIVISOR_LIMIT, so that float16 holds
    them. Raises NumericsError for shapes that differ, negative or non-finite profiles.
    """
    require_vector(w_profile, x_profile.numel(), "weight profile")
    require_vector(x_profile, x_profile.numel(), "activation profile")
    if not 0.0 <= alpha <= 1.0:
        raise NumericsError(f"alpha must lie in [0, 1], got {alpha}")
    for profile, what in ((x_profile, "activation profile"), (w_profile, "weight profile")):
        require_finite(profile, what)
        if bool((profile < 0).any()):
            raise NumericsError(f"{what} holds negative values; it must be an rms or a maximum")
    x, w = x_profile.to(torch.float64), w_profile.to(torch.float64)
    live = (x > 0) & (w > 0)
    if not bool(live.any()):
        return torch.ones_like(x, dtype=torch.float32)
    log_d = alpha * torch.log(x[live]) - (1.0 - alpha) * torch.log(w[live])
    d = torch.ones_like(x)
    d[live] = torch.exp(log_d - log_d.mean())
    return d.clamp(1.0 / DIVISOR_LIMIT, DIVISOR_LIMIT).to(torch.float32)


def tie_over_heads(d: Tensor, num_q_heads: int, num_kv_heads: int, head_dim: int) -> Tensor:
    """Make d [num_q_heads·head_dim] equal over the query heads that share one v head.

    Query head i reads v head i // (num_q_heads // num_kv_heads), as in grouped-query attention;
    the shared value is the geometric mean. Only a tied d folds into v's rows.
    """
    grouped = _by_kv_head(d, num_q_heads, num_kv_heads, head_dim)
    mean = grouped.to(torch.float64).log().mean(dim=1, keepdim=True).exp()
    return mean.expand_as(grouped).reshape(-1).to(d.dtype)


def value_divisor(d: Tensor, num_q_heads: int, num_kv_heads: int, head_dim: int) -> Tensor:
    """The tied d seen from the v projection: [num_kv_heads·head_dim], for `fold_into_rows`."""
    grouped = _by_kv_head(d, num_q_heads, num_kv_heads, head_dim)
    if not torch.equal(grouped, grouped[:, :1].expand_as(grouped)):
        raise NumericsError("d differs between query heads of one v head; use tie_over_heads first")
    return grouped[:, 0].reshape(-1).clone()


def fold_into_norm(
    weight: Tensor,
    d: Tensor,
    bias: Tensor | None = None,
    convention: NormConvention = "plain",
) -> tuple[Tensor, Tensor | None]:
    """Divide a norm's output by d: (weight', bias') for RMSNorm or LayerNorm, all [in].

    `plain`: the norm multiplies by weight. `one_plus` (Gemma): it multiplies by 1 + weight, so
    weight' = (1 + weight)/d - 1.
    """
    wide = _divisor(d, weight.shape[0])
    if convention == "plain":
        folded = weight.to(torch.float64) / wide
    elif convention == "one_plus":
        folded = (1.0 + weight.to(torch.float64)) / wide - 1.0
    else:
        raise NumericsError(f"unknown norm convention {convention!r}: plain or one_plus")
    return folded.to(weight.dtype), _fold_bias(bias, wide)


def fold_into_modulation(
    weight: Tensor,
    bias: Tensor | None,
    d: Tensor,
    *,
    scale_chunk: int,
    shift_chunk: int | None,
) -> tuple[Tensor, Tensor]:
    """Divide a modulated norm's output, normed·(1 + scale) + shift, by d.

    scale and shift come from one linear, weight [chunks·in, cond] and bias [chunks·in]; the
    chunk numbers say which rows are which (adaRMS of pi0.5: scale 0, shift 1, gate 2; AdaLN of
    GR00T: scale 0, shift 1). Exact: scale' = (1 + scale)/d - 1 and shift' = shift/d, that is
    rows W/d for both, b' = (1 + b)/d - 1 for scale and b/d for shift. The other rows stay.
    """
    if bias is None:
        raise NumericsError("a modulation linear without bias cannot take a fold; give it a bias")
    width = d.numel()
    chunks = _modulation_chunks(weight, bias, width)
    for chunk in (scale_chunk, shift_chunk):
        if chunk is not None and not 0 <= chunk < chunks:
            raise NumericsError(f"chunk {chunk} is not within the {chunks} chunks of {width} rows")
    wide = _divisor(d, width)
    new_weight, new_bias = weight.to(torch.float64), bias.to(torch.float64)
    new_weight, new_bias = new_weight.clone(), new_bias.clone()
    rows = slice(scale_chunk * width, (scale_chunk + 1) * width)
    new_weight[rows] /= wide[:, None]
    new_bias[rows] = (1.0 + new_bias[rows]) / wide - 1.0
    if shift_chunk is not None:
        rows = slice(shift_chunk * width, (shift_chunk + 1) * width)
        new_weight[rows] /= wide[:, None]
        new_bias[rows] /= wide
    return new_weight.to(weight.dtype), new_bias.to(bias.dtype)


def fold_into_rows(
    weight: Tensor, d: Tensor, bias: Tensor | None = None
) -> tuple[Tensor, Tensor | None]:
    """Divide a linear producer's output by d: rows of weight [in, k] and bias [in] over d.

    For v (with `value_divisor`) and up projections, whose output reaches the consumer linearly.
    """
    require_matrix(weight, "producer weight")
    wide = _divisor(d, weight.shape[0])
    return (weight.to(torch.float64) / wide[:, None]).to(weight.dtype), _fold_bias(bias, wide)


def fold_into_columns(weight: Tensor, d: Tensor) -> Tensor:
    """Multiply a consumer's columns: weight [out, in] · d, which takes x/d for x."""
    require_matrix(weight, "consumer weight")
    return (weight.to(torch.float64) * _divisor(d, weight.shape[1])).to(weight.dtype)


def _divisor(d: Tensor, size: int) -> Tensor:
    require_vector(d, size, "smoothing divisor")
    if not bool((torch.isfinite(d) & (d > 0)).all()):
        raise NumericsError("smoothing divisor must be finite and positive in every channel")
    return d.to(torch.float64)


def _fold_bias(bias: Tensor | None, wide: Tensor) -> Tensor | None:
    if bias is None:
        return None
    require_vector(bias, wide.numel(), "bias")
    return (bias.to(torch.float64) / wide).to(bias.dtype)


def _modulation_chunks(weight: Tensor, bias: Tensor, width: int) -> int:
    require_matrix(weight, "modulation weight")
    require_vector(bias, weight.shape[0], "modulation bias")
    chunks, rest = divmod(weight.shape[0], width)
    if rest:
        raise NumericsError(f"{weight.shape[0]} modulation rows are no multiple of width {width}")
    return chunks


def _by_kv_head(d: Tensor, num_q_heads: int, num_kv_heads: int, head_dim: int) -> Tensor:
    if min(num_q_heads, num_kv_heads, head_dim) < 1 or num_q_heads % num_kv_heads:
        raise NumericsError(
            f"{num_q_heads} query heads do not divide over {num_kv_heads} v heads of {head_dim}"
        )
    _divisor(d, num_q_heads * head_dim)
    return d.reshape(num_kv_heads, num_q_heads // num_kv_heads, head_dim)
