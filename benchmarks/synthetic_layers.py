"""Linear layers whose inputs have the statistics measured on the real checkpoints.

Omega-QVLA's authors give, per layer, the error of the inputs (NMSE) at 4 bits with one static
scale per channel (99.9th percentile), raw, after the SVD rotation and after SVD·Hadamard. No
real activations are at hand; a layer here is drawn from a handful of parameters that were fitted
to reproduce those three numbers (by a random search with penalties on the channel ratios; the
parameters found are in synthetic_layers.json). What the parameters stand for is what is known of
such activations: channels of very different size, elements with heavy tails, a constant part
(the shift of an adaptive norm), and *massive tokens*: a few tokens with one or two channels
thousands of times larger than all others.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from omega_qvla.numerics.activation import quantize_static, step_channel_scale
from omega_qvla.numerics.rotation import apply_blocks, build_rotation

TOKENS = 4096
OUT = 256
PERCENTILE = 99.9

# (layer, raw, SVD, SVD·Hadamard) as the authors measured them.
MEASURED: tuple[tuple[str, float, float, float], ...] = (
    ("GR00T LLM L2.down", 0.001, 0.148, 0.056),
    ("GR00T LLM L5.down", 0.374, 0.275, 0.134),
    ("GR00T LLM L9.down", 0.397, 0.386, 0.133),
    ("GR00T LLM L2.q", 0.153, 0.139, 0.028),
    ("GR00T LLM L2.gate", 0.091, 0.085, 0.015),
    ("GR00T DiT L2.q", 0.096, 0.051, 0.019),
    ("GR00T DiT L2.ff.down", 0.089, 0.053, 0.028),
    ("GR00T DiT L8.q", 0.050, 0.031, 0.024),
    ("GR00T DiT L8.ff.down", 0.181, 0.104, 0.067),
    ("GR00T DiT L14.q", 0.062, 0.053, 0.024),
    ("pi0.5 LLM L2.down", 0.055, 0.194, 0.063),
    ("pi0.5 LLM L8.down", 0.301, 0.305, 0.129),
    ("pi0.5 LLM L14.down", 0.116, 0.357, 0.149),
    ("pi0.5 LLM L2.q", 0.188, 0.170, 0.038),
    ("pi0.5 LLM L2.gate", 0.073, 0.063, 0.017),
    ("pi0.5 expert L2.q", 0.035, 0.023, 0.010),
    ("pi0.5 expert L2.down", 0.105, 0.008, 0.004),
    ("pi0.5 expert L8.q", 0.094, 0.054, 0.018),
    ("pi0.5 expert L8.down", 0.215, 0.136, 0.115),
    ("pi0.5 expert L14.q", 0.022, 0.017, 0.012),
)


@dataclass(frozen=True)
class Shape:
    """Parameters of one synthetic layer.

    width: channels. profile: spread (log) of the channel sizes. tail: spread (log) of the size
    of each single element, 0 = Gaussian. token: spread (log) of the size of whole tokens.
    constant: size of each channel's constant part over its spread. outliers, ratio: so many
    channels are `ratio` times larger; steady: and nearly the same for every token.
    massive: fraction of massive tokens; magnitude: size of
    their entries over the median channel's; spread: of that size (log); channels: on how many
    channels. together: the outlier channels lie in the block of the first massive one. rare:
    fraction of all elements that are spikes of one size, `spike` times the median channel's
    (what is left of a GELU). columns: spread (log) of the weight's column norms, which decides
    how far the SVD rotation mixes channels.
    """

    width: int = 512
    profile: float = 0.3
    tail: float = 0.0
    token: float = 0.0
    constant: float = 0.0
    outliers: int = 0
    ratio: float = 1.0
    steady: bool = False
    massive: float = 0.0
    magnitude: float = 1.0
    spread: float = 0.0
    channels: int = 1
    together: bool = False
    rare: float = 0.0
    spike: float = 1.0
    columns: float = 0.3
    seed: int = 0


def draw(shape: Shape, tokens: int = TOKENS) -> tuple[Tensor, Tensor]:
    """(tokens [n, in], weight [OUT, in]) of one layer, float32; the seed alone decides them."""
    generator = torch.Generator().manual_seed(shape.seed)

    def normal(*size: int) -> Tensor:
        return torch.randn(*size, generator=generator)

    width = shape.width
    size = torch.exp(shape.profile * normal(width))
    order = torch.randperm(width, generator=generator)
    if shape.together:
        block = int(order[-1]) // 64 * 64
        order = torch.cat([block + torch.randperm(64, generator=generator), order[-2:]])
    size[order[: shape.outliers]] *= shape.ratio
    x = normal(tokens, width) * torch.exp(shape.tail * normal(tokens, width))
    x = x * torch.exp(shape.token * normal(tokens, 1)) + shape.constant * normal(width)
    if shape.steady:
        chosen = order[: shape.outliers]
        x[:, chosen] = (1 + 0.03 * normal(tokens, len(chosen))) * normal(len(chosen)).sign()
    x = x * size
    level = float(x.abs().amax(0).median())
    if shape.rare:
        spikes = torch.rand(tokens, width, generator=generator) < shape.rare
        x = torch.where(spikes, normal(tokens, width).sign() * (shape.spike * level), x)
    hit = torch.randperm(tokens, generator=generator)[: round(shape.massive * tokens)]
    for channel in order[-shape.channels :]:
        sign = 1.0 if float(normal(1)) > 0 else -1.0
        entries = torch.exp(shape.spread * normal(len(hit))) * (shape.magnitude * level)
        x[hit, channel] = sign * entries
    weight = normal(OUT, width) * torch.exp(shape.columns * normal(width))
    return x, weight / (weight.square().mean() * width).sqrt()


def activation_nmse(x: Tensor, rounded: Tensor) -> float:
    """Squared error of the rounded inputs over their energy, all tokens together."""
    return float((x - rounded).double().square().sum() / x.double().square().sum())


def static_errors(x: Tensor, weight: Tensor, block: int = 64) -> tuple[float, float, float]:
    """The authors' three numbers for tokens x [n, in]: raw, SVD, SVD·Hadamard."""
    errors = []
    for kind in ("none", "svd", "svd_hadamard"):
        rotated = x
        if kind != "none":
            rotated = apply_blocks(x, build_rotation(weight, kind, block))
        scale = step_channel_scale(rotated, PERCENTILE)
        errors.append(activation_nmse(rotated, quantize_static(rotated, scale) * scale))
    return errors[0], errors[1], errors[2]
