"""The recipes that have a name."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType

from omega_qvla.config.baselines import (
    awq_w4a16,
    both_sides,
    duquant_w4a4,
    gptq_w4a4,
    gptq_w4a16,
    omniquant_w4a4,
    quantvla_w4a4,
    quarot_w4a4,
    rtn,
    smoothquant_w4a4,
    smoothquant_w8a8,
    svdquant_w4a4,
)
from omega_qvla.config.recipe import (
    ActivationScheme,
    Recipe,
    Rotation,
    Scheme,
    SideRecipe,
    Smoothing,
    WeightScheme,
    load_yaml,
)
from omega_qvla.errors import RecipeError

_SIGNED_GROUPS = ActivationScheme("per_token_group", group=64, clip=0.97, signed=True)
_GPTQ = WeightScheme(method="gptq", grid="fine", act_order=True)


def _omega(
    name: str,
    activation: ActivationScheme,
    weight: WeightScheme = _GPTQ,
    ranks: tuple[int, int] = (0, 4),
) -> Recipe:
    """The default with other roundings; `ranks` of the backbone and of the action head."""

    def side(rank: int) -> SideRecipe:
        scheme = Scheme(
            rotation=Rotation("hadamard", block=64),
            weight=dataclasses.replace(weight, rank=rank),
            activation=activation,
            smoothing=Smoothing(alpha=0.5, robust=True),
        )
        return SideRecipe(scheme)

    backbone, action_head = ranks
    return Recipe(name, backbone=side(backbone), action_head=side(action_head))


def omega() -> Recipe:
    """The default: everything runs on integers. Ingredients chosen by docs/results/recipes.md.

    Robust smoothing, Hadamard blocks, full GPTQ per row in activation order, dynamic scales
    per token and group, with the sign that uses all 16 integers; in the action head on the
    residual of rank 4.
    """
    return _omega("omega", _SIGNED_GROUPS)


def omega_r32() -> Recipe:
    """`omega` with SVDQuant's branch: rank 32 on both sides, and weight scales per group of 64.

    These scales have a sign too. Half of the 16-bit bytes at the demo policies' widths, as
    `svdquant-w4a4`; on square layers of 2048 channels 3 points more than `omega` for the rank and
    1.6 for the scales.
    """
    weight = dataclasses.replace(_GPTQ, group=64, signed=True)
    return _omega("omega-r32", _SIGNED_GROUPS, weight, ranks=(32, 32))


def w4a8() -> Recipe:
    """`omega` with 8-bit activations, whose 256 integers have no need of a sign."""
    return _omega("w4a8", ActivationScheme("per_token_group", bits=8, group=64))


def w4a16() -> Recipe:
    """4-bit weights only: Hadamard blocks and full GPTQ, activations left alone."""
    scheme = Scheme(
        rotation=Rotation("hadamard", block=64), weight=WeightScheme(method="gptq", grid="fine")
    )
    return both_sides("w4a16", scheme)


def omega_paper() -> Recipe:
    """The recipe as Omega-QVLA published it; its per-channel scales are emulated only."""
    rotation = Rotation("svd_hadamard", block=64)
    activation = ActivationScheme("per_step_channel", percentile=99.9)
    backbone = Scheme(
        rotation=rotation,
        weight=WeightScheme(group=128, method="gptq_block", grid="paper", damp=0.05, block=128),
        activation=activation,
    )
    action_head = Scheme(
        rotation=rotation,
        weight=WeightScheme(group=128, method="rtn", grid="paper", rank=0),
        activation=activation,
        permutation=True,
        output_rotation=True,
    )
    return Recipe("omega-paper", SideRecipe(backbone), SideRecipe(action_head))


PRESETS: Mapping[str, Callable[[], Recipe]] = MappingProxyType(
    {
        "omega": omega,
        "omega-r32": omega_r32,
        "omega-paper": omega_paper,
        "w4a8": w4a8,
        "w4a16": w4a16,
        "rtn": rtn,
        "gptq-w4a16": gptq_w4a16,
        "gptq-w4a4": gptq_w4a4,
        "awq-w4a16": awq_w4a16,
        "smoothquant-w4a4": smoothquant_w4a4,
        "smoothquant-w8a8": smoothquant_w8a8,
        "omniquant-w4a4": omniquant_w4a4,
        "duquant-w4a4": duquant_w4a4,
        "quarot-w4a4": quarot_w4a4,
        "quantvla-w4a4": quantvla_w4a4,
        "svdquant-w4a4": svdquant_w4a4,
    }
)


def preset(name: str) -> Recipe:
    """The preset called `name`. Raises RecipeError naming those there are."""
    if name not in PRESETS:
        raise RecipeError(f"unknown preset {name!r}; one of {', '.join(PRESETS)}")
    return PRESETS[name]()


def resolve_recipe(name_or_path: str | os.PathLike[str]) -> Recipe:
    """A preset or an ablation by name, or a recipe from a YAML file. Raises RecipeError."""
    from omega_qvla.config.ablations import ABLATIONS  # which is made from the presets

    name = os.fspath(name_or_path)
    if name in PRESETS:
        return PRESETS[name]()
    if name in ABLATIONS:
        return ABLATIONS[name]
    if Path(name).suffix in (".yaml", ".yml") or Path(name).exists():
        return load_yaml(name)
    raise RecipeError(
        f"{name!r} is neither a preset ({', '.join(PRESETS)}) nor the path of a YAML file"
    )
