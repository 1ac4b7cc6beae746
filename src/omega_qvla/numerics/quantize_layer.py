"""One layer's way from floating point to int4: smooth, permute, rotate, split, round, pack.

Pure: the same inputs give the same tensors. Whatever is stored in 16 bits is rounded to 16
bits before anything is derived from it, so that what was optimised is what runs.
"""

from __future__ import annotations

import torch
from torch import Tensor

from omega_qvla.config.recipe import Scheme
from omega_qvla.errors import CalibrationError, NumericsError
from omega_qvla.numerics.activation import (
    step_channel_scale,
    step_group_scale,
    step_tensor_scale,
)
from omega_qvla.numerics.duquant import duquant_transform
from omega_qvla.numerics.gptq import EXACT_UP_TO, gptq, gptq_block
from omega_qvla.numerics.hadamard import random_signs
from omega_qvla.numerics.layer import QuantizedLayer
from omega_qvla.numerics.learned import Learned, learn
from omega_qvla.numerics.low_rank import low_rank_split
from omega_qvla.numerics.packing import pack_integers
from omega_qvla.numerics.permutation import zigzag_permutation
from omega_qvla.numerics.phases import phase
from omega_qvla.numerics.qparams import check_weight, weight_scales
from omega_qvla.numerics.rotation import (
    apply_output_rotation,
    build_output_rotation,
    build_rotation,
)
from omega_qvla.numerics.rtn import round_weight
from omega_qvla.numerics.search import (
    SEARCH_TOKENS,
    divisor_for,
    output_scales,
    rounded_moments,
    sample_tokens,
    search_divisor,
)
from omega_qvla.numerics.smoothing import token_profile, weight_profile
from omega_qvla.numerics.stats import LayerStats
from omega_qvla.numerics.transform import InputTransform

HALF = torch.float16
MOMENT_TOKENS = 4096  # that rounding noise is measured on


def needs_stats(scheme: Scheme) -> bool:
    """Whether the scheme cannot do without calibration statistics."""
    weight = scheme.weight
    return (
        scheme.smoothing is not None
        or scheme.activation.static
        or scheme.rotation.kind == "duquant"
        or weight.method != "rtn"
        or weight.grid == "output"
    )


def quantize_layer(
    name: str,
    side: str,
    weight: Tensor,
    bias: Tensor | None,
    scheme: Scheme,
    stats: LayerStats | None,
    num_steps: int | None,
    site_profile: Tensor | None = None,
    *,
    consume: bool = False,
) -> QuantizedLayer:
    """Quantize weight [out, in] (any float dtype) and bias [out] of layer `name` by `scheme`.

    stats: of the layer's raw inputs; None only for schemes that need none. num_steps: of the
    denoising loop that the layer runs in, None outside. site_profile [in]: `weight_profile` of
    all layers that read the same input, so that they get the same smoothing divisor and can
    share one transformed input; None: of this layer alone. consume: the statistics are not
    needed afterwards, and a large Hessian may be overwritten in place of a copy. Computes in
    float32 (float64 where decompositions need it or sizes allow it) on the weight's device; the
    result stays there.

    Raises:
        CalibrationError: statistics missing, of another layer, of a step left out, not finite.
        NumericsError: a weight that is not finite, or a scale that does not fit in 16 bits.
    """
    try:
        check_weight(weight)
        if bias is not None and not bool(torch.isfinite(bias).all()):
            raise NumericsError("the bias is not finite")
        stats = _checked_stats(name, weight, scheme, stats, num_steps)
        weight = weight.detach().float()
        learned = None
        if scheme.learning is not None and stats is not None:
            divisor = smoothing_for(weight, scheme, stats, site_profile)
            learned = learn(weight, stats.tokens, divisor, scheme)
        transform = build_transform(weight, scheme, stats, site_profile, learned)
        output_rotation, a, b, rest = _to_round(weight, scheme, transform)
        q, scale = round_to_grid(rest, scheme, stats, transform, consume, learned)
        return QuantizedLayer(
            name=name,
            side=side,
            in_features=weight.shape[1],
            out_features=weight.shape[0],
            scheme=scheme,
            num_steps=num_steps,
            qweight=pack_integers(q, scheme.weight.bits),
            weight_scale=scale.to(HALF),
            bias=None if bias is None else bias.detach().float(),
            smooth=transform.smooth,
            permutation=transform.permutation,
            rotation=transform.blocks,
            signs=transform.signs,
            output_rotation=output_rotation,
            act_scale=static_table(scheme, stats, transform),
            lowrank_a=a,
            lowrank_b=b,
            first_rotation=transform.first,
        )
    except NumericsError as error:
        raise NumericsError(f"layer {name}: {error}") from error


def _checked_stats(
    name: str, weight: Tensor, scheme: Scheme, stats: LayerStats | None, num_steps: int | None
) -> LayerStats | None:
    if stats is None:
        if needs_stats(scheme):
            raise CalibrationError(f"layer {name}: its scheme needs calibration and has none")
        return None
    stats.check(name, weight.shape[1], num_steps)
    return stats.to(weight.device)


def smoothing_for(
    weight: Tensor, scheme: Scheme, stats: LayerStats, site_profile: Tensor | None = None
) -> Tensor:
    """The smoothing divisor [in], float32, of a scheme that has one."""
    smoothing = scheme.smoothing
    assert smoothing is not None
    if smoothing.profile != "rms":
        profile = token_profile(stats.tokens, smoothing.profile)
    elif smoothing.robust:
        profile = stats.profile
    else:
        profile = stats.hessian.diagonal().clamp_min(0).sqrt()
    if site_profile is None:
        site_profile = weight_profile([weight], smoothing.profile)
    site_profile = site_profile.to(weight.device)
    if smoothing.search:
        return search_divisor(weight, stats.tokens, profile, site_profile, scheme)
    return divisor_for(smoothing, profile, site_profile, smoothing.alpha)


def build_transform(
    weight: Tensor,
    scheme: Scheme,
    stats: LayerStats | None,
    site_profile: Tensor | None = None,
    learned: Learned | None = None,
) -> InputTransform:
    """The change of basis for float32 weight [out, in], its parts as they are stored."""
    smooth = None
    if scheme.smoothing is not None and stats is not None:
        if learned is not None:
            smooth = learned.divisor
        else:
            smooth = smoothing_for(weight, scheme, stats, site_profile).to(HALF)
        weight = weight * smooth.float()
    if scheme.rotation.kind == "duquant" and stats is not None:
        x = sample_tokens(stats.tokens, SEARCH_TOKENS)
        x = x if smooth is None else x / smooth.float()
        first, order, second = duquant_transform(x, scheme.rotation.block)
        return InputTransform(scheme.rotation, smooth, order, second, None, first)
    permutation = None
    if scheme.permutation:
        permutation = zigzag_permutation(weight).to(torch.int32)
        weight = weight[:, permutation.long()]
    rotation, blocks, signs = scheme.rotation, None, None
    if rotation.kind == "svd" or rotation.kind == "svd_hadamard":
        blocks = build_rotation(weight, rotation.kind, rotation.block).to(HALF)
    elif rotation.kind != "none" and rotation.randomized:
        signs = random_signs(weight.shape[1], rotation.seed).to(weight.device)
    return InputTransform(rotation, smooth, permutation, blocks, signs)


def _to_round(
    weight: Tensor, scheme: Scheme, transform: InputTransform
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor]:
    """(output rotation, a, b, what remains to be rounded): 16-bit parts, each taken out as
    rounded."""
    rest, output_rotation = transform.weight(weight), None
    if scheme.output_rotation:
        output_rotation = build_output_rotation(weight, scheme.rotation.block).to(HALF)
        rest = apply_output_rotation(rest, output_rotation.float())
    if scheme.weight.rank == 0:
        return output_rotation, None, None, rest
    a, b, _ = low_rank_split(rest, scheme.weight.rank)
    a, b = a.to(HALF), b.to(HALF)
    return output_rotation, a, b, rest - a.float() @ b.float().T


def round_to_grid(
    weight: Tensor,
    scheme: Scheme,
    stats: LayerStats | None,
    transform: InputTransform,
    consume: bool = False,
    learned: Learned | None = None,
) -> tuple[Tensor, Tensor]:
    """(q int8 [out, in], scale [out, groups]) of the transformed weight, by its method.

    With 16 bits q is the weight itself.
    """
    w = scheme.weight
    if w.bits == 16:  # kept: the gains of the rows are 1 until something balances them
        return weight.to(HALF), torch.ones(len(weight), 1, device=weight.device)
    if w.method == "rtn" or stats is None:
        with phase("scales"):
            if learned is not None:
                scale = learned.scale
            elif w.grid == "output" and stats is not None:
                scale = output_scales(weight, transform.hessian_(stats.hessian.clone()), w, HALF)
            else:
                scale = weight_scales(
                    weight, w.bits, w.group, w.grid, store=HALF, clip=w.clip, signed=w.signed
                )
            return round_weight(weight, scale, w.bits, w.group), scale
    with phase("factorize"):
        hessian = transform.hessian_(_own_hessian(stats.hessian, consume))
        if w.rounded_inputs:
            x = transform.activations(sample_tokens(stats.tokens, MOMENT_TOKENS))
            hessian = rounded_moments(hessian, x, scheme.activation)
    if w.method == "gptq_block":
        return gptq_block(
            weight, hessian, w.bits, w.group, w.grid, w.damp, w.block, store=HALF, signed=w.signed
        )
    return gptq(
        weight,
        hessian,
        w.bits,
        w.group,
        w.grid,
        w.damp,
        w.block,
        w.act_order,
        store=HALF,
        consume=True,
        signed=w.signed,
    )


def _own_hessian(hessian: Tensor, consume: bool) -> Tensor:
    """A Hessian that may be overwritten: in float64 where that is small."""
    if len(hessian) <= EXACT_UP_TO:
        return hessian.to(torch.float64, copy=True)
    return hessian if consume else hessian.clone()


def static_table(
    scheme: Scheme, stats: LayerStats | None, transform: InputTransform
) -> Tensor | None:
    """Static activation scales f32 [steps, ...] from each step's transformed tokens.

    A pooled scheme has one row, from the tokens of all steps, in every place.
    """
    act = scheme.activation
    if stats is None or not act.static:
        return None
    rows = []
    for tokens in (torch.cat(stats.tokens),) if act.pooled else stats.tokens:
        x = transform.activations(tokens.float())
        if act.kind == "per_step_channel":
            rows.append(step_channel_scale(x, act.percentile, act.bits))
        elif act.kind == "per_step_group":
            rows.append(step_group_scale(x, act.group, act.bits))
        else:
            rows.append(step_tensor_scale(x, act.bits))
    return torch.stack(rows * len(stats.tokens) if act.pooled else rows)
