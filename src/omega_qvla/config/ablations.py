"""Recipes with one thing changed, by name: what each ingredient is worth.

A name is `<base>+<change>`. The bases are `omega-paper`, whose changes are the rows of the
published ablation table, `omega`, and SVDQuant for its rank. Nothing here is for use on a
robot: the comparison (`omega-qvla compare --recipes ablations`) builds and measures them.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

from omega_qvla.config.baselines import svdquant_w4a4
from omega_qvla.config.presets import omega, omega_paper
from omega_qvla.config.recipe import (
    ActivationScheme,
    Recipe,
    Rotation,
    Scheme,
    SideRecipe,
    Smoothing,
)

Change = Callable[[Scheme], Scheme]


def _rotation(kind: Any, block: int = 64, randomized: bool = False) -> Change:
    return lambda scheme: dataclasses.replace(scheme, rotation=Rotation(kind, block, randomized))


def _weight(**changes: Any) -> Change:
    return lambda scheme: dataclasses.replace(
        scheme, weight=dataclasses.replace(scheme.weight, **changes)
    )


def _activation(**changes: Any) -> Change:
    return lambda scheme: dataclasses.replace(
        scheme, activation=dataclasses.replace(scheme.activation, **changes)
    )


def _scales(kind: Any, **values: Any) -> Change:
    """Another kind of activation scales, its fields anew."""
    return lambda scheme: dataclasses.replace(scheme, activation=ActivationScheme(kind, **values))


def _smoothing(alpha: float | None, robust: bool = True) -> Change:
    smoothing = None if alpha is None else Smoothing(alpha, robust=robust)
    return lambda scheme: dataclasses.replace(scheme, smoothing=smoothing)


def _field(**changes: Any) -> Change:
    return lambda scheme: dataclasses.replace(scheme, **changes)


def _all(*changes: Change) -> Change:
    def apply(scheme: Scheme) -> Scheme:
        for change in changes:
            scheme = change(scheme)
        return scheme

    return apply


#: A scale's sign takes the largest value to -8. Nothing is left to clip: with 7 for the largest
#: value, 0.95 of absmax is 0.95 * 8/7 = 1.09 of what the sign makes of it.
_SIGNED_INPUTS = _activation(signed=True, clip=1.0)
_SIGNED_WEIGHTS = _weight(signed=True)
_SIGNED = _all(_SIGNED_INPUTS, _SIGNED_WEIGHTS)
_POOLED = _activation(pooled=True)
#: The published recipe's parts. Rotation alone with the one static scale per channel and step
#: is its table's "per-step" column; `pooled` is the column without.
_PAPER: Mapping[str, Change] = {
    "no-rotation": _rotation("none"),
    "svd": _rotation("svd"),
    "hadamard": _rotation("hadamard"),
    "pooled-steps": _POOLED,
    "svd+pooled-steps": _all(_rotation("svd"), _POOLED),
    "hadamard+pooled-steps": _all(_rotation("hadamard"), _POOLED),
    "no-permutation": _field(permutation=False),
    "no-output-rotation": _field(output_rotation=False),
    "smoothing": _smoothing(0.5),
    "block-32": _rotation("svd_hadamard", 32),
    "block-128": _rotation("svd_hadamard", 128),
    "full-hadamard": _rotation("full_hadamard", randomized=True),
    "weights-rtn": _weight(method="rtn"),
    "weights-gptq-block": _weight(method="gptq_block", damp=0.05),
    "weights-gptq": _weight(method="gptq", damp=0.01),
    "weight-group-64": _weight(group=64),
    "weights-per-row": _weight(group=None),
    "percentile-99": _activation(percentile=99.0),
    "percentile-99.99": _activation(percentile=99.99),
    "percentile-100": _activation(percentile=100.0),
    "act-bits-6": _activation(bits=6),
    "act-bits-8": _activation(bits=8),
    "per-token-group": _scales("per_token_group", group=64, clip=0.95),
}
#: The default's parts. Its action head keeps its rank-4 residual unless the change is about it.
_OMEGA: Mapping[str, Change] = {
    "no-rotation": _rotation("none"),
    "svd": _rotation("svd"),
    "svd-hadamard": _rotation("svd_hadamard"),
    "random-signs": _rotation("hadamard", randomized=True),
    "block-32": _rotation("hadamard", 32),
    "block-128": _rotation("hadamard", 128),
    "full-hadamard": _rotation("full_hadamard", randomized=True),
    "permutation": _field(permutation=True),
    "output-rotation": _field(output_rotation=True),
    "no-smoothing": _smoothing(None),
    "no-smoothing+svd-hadamard": _all(_smoothing(None), _rotation("svd_hadamard")),
    "plain-smoothing": _smoothing(0.5, robust=False),
    "alpha-0.3": _smoothing(0.3),
    "alpha-0.7": _smoothing(0.7),
    "weights-rtn": _weight(method="rtn"),
    "weights-gptq-block": _weight(method="gptq_block"),
    "weights-gptq-in-column-order": _weight(act_order=False),
    "weights-gptq-for-rounded-inputs": _weight(rounded_inputs=True),
    "weight-group-64": _weight(group=64),
    "weight-group-128": _weight(group=128),
    "weight-group-128+rtn": _weight(group=128, method="rtn"),
    "act-group-32": _activation(group=32),
    "act-group-128": _activation(group=128),
    "clip-0.9": _activation(clip=0.9),
    "clip-1": _activation(clip=1.0),
    "act-bits-6": _activation(bits=6, clip=1.0),
    "act-bits-8": _activation(bits=8, clip=1.0),
    "per-token": _scales("per_token", clip=0.9),
    "per-token+full-hadamard": _all(
        _scales("per_token", clip=0.9), _rotation("full_hadamard", randomized=True)
    ),
    "per-step-tensor": _scales("per_step_tensor"),
    "per-step-group": _scales("per_step_group", group=64),
    "per-step-channel": _scales("per_step_channel"),
    "pooled-group": _scales("per_step_group", group=64, pooled=True),
    "pooled-channel": _scales("per_step_channel", pooled=True),
    "rank-0": _weight(rank=0),
    "rank-4-in-both": _weight(rank=4),
    "rank-8-in-both": _weight(rank=8),
    "rank-32-in-both": _weight(rank=32),
    "signed-activations": _SIGNED_INPUTS,
    "signed-weights": _SIGNED_WEIGHTS,
    "signed": _SIGNED,
    "signed+clip-0.95": _all(_SIGNED, _activation(clip=0.95)),
    "signed+clip-1.05": _all(_SIGNED, _activation(clip=1.05)),
    "signed+weight-group-64": _all(_SIGNED, _weight(group=64)),
    "signed+rank-32": _all(_SIGNED, _weight(rank=32)),
    "signed+rank-32+weight-group-64": _all(_SIGNED, _weight(rank=32, group=64)),
}
#: SVDQuant's rank is 32 at widths of thousands; on a network a tenth as wide that is half of the
#: 16-bit bytes. With rank 4 its branch is as large, relative to the width, as in its paper.
_SVDQUANT: Mapping[str, Change] = {"rank-4": _weight(rank=4)}


def _changed(base: Recipe, name: str, change: Change) -> Recipe:
    def side(recipe: SideRecipe | None) -> SideRecipe | None:
        if recipe is None:
            return None
        others = tuple((regex, change(scheme)) for regex, scheme in recipe.overrides)
        return dataclasses.replace(recipe, scheme=change(recipe.scheme), overrides=others)

    return dataclasses.replace(
        base, name=name, backbone=side(base.backbone), action_head=side(base.action_head)
    )


def _one_side(base: Recipe) -> dict[str, Recipe]:
    return {
        f"{base.name}+backbone-only": dataclasses.replace(
            base, name=f"{base.name}+backbone-only", action_head=None
        ),
        f"{base.name}+action-head-only": dataclasses.replace(
            base, name=f"{base.name}+action-head-only", backbone=None
        ),
    }


def _ablations() -> dict[str, Recipe]:
    found: dict[str, Recipe] = {}
    changed = ((omega_paper(), _PAPER), (omega(), _OMEGA), (svdquant_w4a4(), _SVDQUANT))
    for base, changes in changed:
        for change, apply in changes.items():
            name = f"{base.name}+{change}"
            found[name] = _changed(base, name, apply)
    return found | _one_side(omega_paper()) | _one_side(omega())


#: Name -> recipe, the published recipe's changes first.
ABLATIONS: Mapping[str, Recipe] = MappingProxyType(_ablations())
