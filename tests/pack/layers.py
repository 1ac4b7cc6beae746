"""Quantized layers of every kind that a pack can hold, small and quick to make."""

from __future__ import annotations

import torch

from omega_qvla.config import ActivationScheme, Rotation, Scheme, Smoothing, WeightScheme, preset
from omega_qvla.numerics.layer import QuantizedLayer
from omega_qvla.numerics.quantize_layer import quantize_layer
from omega_qvla.numerics.smoothing import robust_profile
from omega_qvla.numerics.stats import LayerStats
from omega_qvla.pack.manifest import Manifest

STEPS = 3
RECIPE = preset("omega")
SCHEMES = {
    "plain": Scheme(activation=ActivationScheme("per_token")),
    "omega": RECIPE.backbone.scheme if RECIPE.backbone else Scheme(),
    "randomized": Scheme(
        rotation=Rotation("full_hadamard", randomized=True, seed=5),
        smoothing=Smoothing(),
        activation=ActivationScheme("per_step_group", group=32),
    ),
    "everything": Scheme(
        rotation=Rotation("svd_hadamard", block=64),
        weight=WeightScheme(group=32, grid="paper", rank=2),
        activation=ActivationScheme("per_step_channel"),
        smoothing=Smoothing(),
        permutation=True,
        output_rotation=True,
    ),
}


def random_stats(width: int, steps: int, seed: int) -> LayerStats:
    """Statistics of `steps` times 40 random tokens with unequal channels."""
    generator = torch.Generator().manual_seed(seed)
    gains = 1 + 4 * torch.rand(width, generator=generator)
    tokens = tuple(gains * torch.randn(40, width, generator=generator) for _ in range(steps))
    x = torch.cat(tokens)
    return LayerStats(x.T @ x / len(x), robust_profile(x), tokens, len(x))


def random_weight(seed: int, out: int = 96, width: int = 128) -> tuple[torch.Tensor, torch.Tensor]:
    """(weight [out, width], bias [out])."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(out, width, generator=generator) / width**0.5
    return weight, torch.randn(out, generator=generator)


def make_layer(
    name: str, kind: str = "omega", seed: int = 0, side: str = "backbone", bias: bool = True
) -> QuantizedLayer:
    """The layer that `random_weight(seed)` becomes under `SCHEMES[kind]`."""
    weight, offset = random_weight(seed)
    inside = side == "action_head"
    stats = random_stats(weight.shape[1], STEPS if inside else 1, seed)
    return quantize_layer(
        name,
        side,
        weight,
        offset if bias else None,
        SCHEMES[kind],
        stats,
        STEPS if inside else None,
    )


def all_layers() -> dict[str, QuantizedLayer]:
    """One layer of each scheme, alternating sides, one without bias."""
    layers = {}
    for i, kind in enumerate(SCHEMES):
        side = "action_head" if i % 2 else "backbone"
        layers[f"net.{i}.{kind}"] = make_layer(f"net.{i}.{kind}", kind, i, side, bias=i != 1)
    return layers


def make_manifest(**changes: object) -> Manifest:
    """A manifest of an imaginary checkpoint of two tensors."""
    fields: dict[str, object] = {
        "family": "pi05",
        "source": {"net.0.weight": "a" * 64, "net.1.weight": "b" * 64},
        "recipe": RECIPE.to_dict(),
        "num_steps": STEPS,
        "config": {"depth": 2, "prompt": "öffne\u2028"},
        "calibration": {"source": "test", "count": 2},
        "software": {"omega_qvla": "0"},
    }
    return Manifest(**{**fields, **changes})  # type: ignore[arg-type]
