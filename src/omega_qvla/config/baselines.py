"""Methods of others as recipes, each with its paper's defaults.

Three things hold for all of them and are not the papers': integers are symmetric (no zero
points), everything that feeds a layer is kept with that layer (divisors and rotations are not
folded into norms, which changes no result), and each layer is calibrated on the inputs that the
full-precision network gives it. Attention's own products and the KV cache stay as they are.
"""

from __future__ import annotations

import dataclasses

from omega_qvla.config.recipe import (
    ActivationScheme,
    Balance,
    Learning,
    Recipe,
    Rotation,
    Scheme,
    SideRecipe,
    Smoothing,
    WeightScheme,
)

_PLAIN = WeightScheme(method="rtn", grid="max")
_PER_TOKEN = ActivationScheme("per_token")
_GPTQ = WeightScheme(method="gptq", grid="max", damp=0.01, block=128)
QUERIES_AND_KEYS = r"(q_proj|k_proj|to_q|to_k)$"


def both_sides(name: str, scheme: Scheme, overrides: tuple[tuple[str, Scheme], ...] = ()) -> Recipe:
    """One scheme for backbone and action head."""
    side = SideRecipe(scheme, overrides=overrides)
    return Recipe(name, backbone=side, action_head=side)


def rtn() -> Recipe:
    """Naive W4A4: absmax weights per row, absmax activations per token, nothing else."""
    return both_sides("rtn", Scheme(weight=_PLAIN, activation=_PER_TOKEN))


def gptq_w4a16() -> Recipe:
    """GPTQ (Frantar et al. 2022), W4A16: each rounding error is made up for in later columns.

    Per row, min-max grid, 1% damping, blocks of 128, column order: the paper's settings.
    """
    return both_sides("gptq-w4a16", Scheme(weight=_GPTQ))


def gptq_w4a4() -> Recipe:
    """GPTQ weights with absmax activations per token, W4A4."""
    return both_sides("gptq-w4a4", Scheme(weight=_GPTQ, activation=_PER_TOKEN))


def awq_w4a16() -> Recipe:
    """AWQ (Lin et al. 2023), W4A16: salient channels scaled up before rounding, then clipping.

    Groups of 128; d = mean|x|^alpha, alpha of least output error among 20; clipping per group
    by output error, not of queries and keys. Divisors are searched layer by layer (the paper
    ties those that one norm feeds).
    """
    smoothing = Smoothing(profile="mean", search=True)
    weight = WeightScheme(group=128, method="rtn", grid="output")
    unclipped = dataclasses.replace(weight, grid="max")
    attention = (QUERIES_AND_KEYS, Scheme(weight=unclipped, smoothing=smoothing))
    return both_sides("awq-w4a16", Scheme(weight=weight, smoothing=smoothing), (attention,))


def smoothquant_w4a4() -> Recipe:
    """SmoothQuant (Xiao et al. 2022) at W4A4: outliers moved half-way into the weights.

    alpha = 0.5 of channel maxima; absmax weights per row, absmax activations per token.
    """
    smoothing = Smoothing(alpha=0.5, robust=False, profile="max")
    scheme = Scheme(weight=_PLAIN, activation=_PER_TOKEN, smoothing=smoothing)
    return both_sides("smoothquant-w4a4", scheme)


def smoothquant_w8a8() -> Recipe:
    """SmoothQuant (Xiao et al. 2022) as published, W8A8: outliers moved half-way into the weights.

    As `smoothquant-w4a4` with 8 bits on both sides; runs emulated.
    """
    smoothing = Smoothing(alpha=0.5, robust=False, profile="max")
    weight = dataclasses.replace(_PLAIN, bits=8)
    activation = dataclasses.replace(_PER_TOKEN, bits=8)
    return both_sides("smoothquant-w8a8", Scheme(weight=weight, activation=activation,
                                                 smoothing=smoothing))  # fmt: skip


def omniquant_w4a4() -> Recipe:
    """OmniQuant (Shao et al. 2023), W4A4: learned weight clipping and learned smoothing.

    Starts from SmoothQuant's divisor at 0.5; learning rates 5e-3 (transformation) and 1e-2
    (clipping). Shortened: one layer at a time, 200 steps, no shift (numerics/learned.py).
    """
    smoothing = Smoothing(alpha=0.5, robust=False, profile="max")
    scheme = Scheme(
        weight=_PLAIN, activation=_PER_TOKEN, smoothing=smoothing, learning=Learning(steps=200)
    )
    return both_sides("omniquant-w4a4", scheme)


def duquant_w4a4() -> Recipe:
    """DuQuant (Lin et al. 2024), W4A4: greedy rotation, zig-zag permutation, second rotation.

    Smoothing at 0.6, blocks of 128 (or the largest power of two that divides the width), 256
    greedy steps, one permutation, activations clipped to 0.9 and weights to 0.8 of absmax.
    """
    scheme = Scheme(
        rotation=Rotation("duquant", block=128),
        weight=dataclasses.replace(_PLAIN, clip=0.8),
        activation=ActivationScheme("per_token", clip=0.9),
        smoothing=Smoothing(alpha=0.6, robust=False, profile="max"),
    )
    return both_sides("duquant-w4a4", scheme)


def quarot_w4a4() -> Recipe:
    """QuaRot (Ashkboos et al. 2024), W4A4: randomized Hadamard over the whole width, GPTQ.

    Weights per row with a clipping search, activations per token clipped to 0.9. Every input
    is rotated at run time here; QuaRot folds most of its rotations into the weights before.
    """
    scheme = Scheme(
        rotation=Rotation("full_hadamard", randomized=True),
        weight=dataclasses.replace(_GPTQ, grid="fine"),
        activation=ActivationScheme("per_token", clip=0.9),
    )
    return both_sides("quarot-w4a4", scheme)


def svdquant_w4a4() -> Recipe:
    """SVDQuant (Li et al. 2024), W4A4: outliers moved into the weights, a 16-bit branch of
    rank 32 takes them over, GPTQ rounds the rest.

    Smoothing by channel maxima with the power of least output error; scales per group of 64
    on both sides.
    """
    scheme = Scheme(
        weight=dataclasses.replace(_GPTQ, group=64, rank=32),
        activation=ActivationScheme("per_token_group", group=64),
        smoothing=Smoothing(robust=False, profile="max", search=True),
    )
    return both_sides("svdquant-w4a4", scheme)


def quantvla_w4a4() -> Recipe:
    """QuantVLA (Zhang et al. 2026), W4A4: the action head's attention stays in 16 bits, its
    temperature and output energy are matched; everything else is rotated and rounded.

    From the paper and its public code: language model and the head's feed-forward layers, SVD
    rotation of inputs (blocks of 64) and outputs, absmax weights per row, a static activation
    scale per channel (99.9th percentile). The paper's main setting is W4A8; this is the 4-bit
    arm. Here a table per denoising step stands for the single one of the public code, and the
    kept layers are stored in the pack and counted.
    """
    scheme = Scheme(
        rotation=Rotation("svd", block=64),
        weight=_PLAIN,
        activation=ActivationScheme("per_step_channel", percentile=99.9),
        output_rotation=True,
    )

    def kept(balance: Balance) -> Scheme:
        return Scheme(weight=WeightScheme(bits=16), balance=balance)

    head = SideRecipe(
        scheme,
        overrides=(
            (r"(q_proj|to_q)$", kept("temperature")),
            (r"(o_proj|to_out\.0)$", kept("output")),
            (r"(k_proj|v_proj|to_k|to_v)$", kept("none")),
        ),
    )
    return Recipe("quantvla-w4a4", backbone=SideRecipe(scheme), action_head=head)
