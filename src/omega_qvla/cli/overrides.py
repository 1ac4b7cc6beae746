"""Single fields of a recipe, set on the command line.

The published scripts are steered by flags; these are their counterparts. A flag that would
change nothing in the recipe at hand is refused: whoever gives it expects an effect.
"""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

from omega_qvla.cli.parsing import SIDES, at_least
from omega_qvla.config.recipe import Recipe, Scheme, SideRecipe
from omega_qvla.errors import RecipeError

#: Returns the scheme with the value set, or None where the scheme has no use for it.
Setter = Callable[[Scheme, Any], Scheme | None]


def _rank(scheme: Scheme, value: int) -> Scheme | None:
    return None if _kept(scheme) else _weight(scheme, rank=value)


def _weight_bits(scheme: Scheme, value: int) -> Scheme | None:
    return None if _kept(scheme) else _weight(scheme, bits=value)


def _kept(scheme: Scheme) -> bool:
    """Whether the recipe leaves the layer in 16 bits, with nothing to set."""
    return scheme.weight.bits == 16


def _damp(scheme: Scheme, value: float) -> Scheme | None:
    return None if scheme.weight.method == "rtn" else _weight(scheme, damp=value)


def _block(scheme: Scheme, value: int) -> Scheme | None:
    """Columns that are rounded together; published layers have one scale for as many."""
    weight = scheme.weight
    grouped = weight.group == weight.block
    if weight.method == "rtn" and not grouped:
        return None
    return _weight(scheme, block=value, group=value if grouped else weight.group)


def _rotation_block(scheme: Scheme, value: int) -> Scheme | None:
    if scheme.rotation.kind in ("none", "full_hadamard"):
        return None
    return dataclasses.replace(scheme, rotation=dataclasses.replace(scheme.rotation, block=value))


def _act_bits(scheme: Scheme, value: int) -> Scheme | None:
    return None if scheme.activation.kind == "none" else _activation(scheme, bits=value)


def _percentile(scheme: Scheme, value: float) -> Scheme | None:
    used = scheme.activation.kind == "per_step_channel"
    return _activation(scheme, percentile=value) if used else None


def _weight(scheme: Scheme, **changes: Any) -> Scheme:
    return dataclasses.replace(scheme, weight=dataclasses.replace(scheme.weight, **changes))


def _activation(scheme: Scheme, **changes: Any) -> Scheme:
    return dataclasses.replace(scheme, activation=dataclasses.replace(scheme.activation, **changes))


#: flag -> (type, setter, what it sets, what a scheme must have for it to matter)
OVERRIDES: dict[str, tuple[Callable[[str], Any], Setter, str, str]] = {
    "weight-bits": (at_least(1), _weight_bits, "bits of a weight: 2, 3, 4 or 8", ""),
    "act-bits": (at_least(1), _act_bits, "bits of an activation: 4, 6 or 8", "rounded activations"),
    "svd-rank": (at_least(0), _rank, "rank kept in 16 bits beside the integers", ""),
    "act-percentile": (float, _percentile, "of |x|, for static scales", "per_step_channel scales"),
    "block-size": (at_least(1), _block, "columns per GPTQ block", "GPTQ, or scales per block"),
    "rotation-block": (at_least(1), _rotation_block, "width of a rotation block", "blocks"),
    "damp": (float, _damp, "GPTQ damping, relative to the mean diagonal", "GPTQ"),
}


def add_overrides(parser: argparse.ArgumentParser) -> None:
    """One flag for each of OVERRIDES."""
    group = parser.add_argument_group("recipe fields, instead of the recipe's own")
    for flag, (kind, _, help_text, _) in OVERRIDES.items():
        group.add_argument(f"--{flag}", type=kind, metavar="N", help=help_text)


def override(recipe: Recipe, args: argparse.Namespace, sides: Sequence[str]) -> Recipe:
    """The recipe with the given flags set in every scheme of `sides`, and named after them.

    A flag need not matter to all schemes (the published backbone is GPTQ, its action head is
    not), but to one at least.

    Raises:
        RecipeError: an impossible value, or a flag that no scheme has a use for.
    """
    for flag, (_, setter, _, need) in OVERRIDES.items():
        value = getattr(args, flag.replace("-", "_"))
        if value is None:
            continue
        changes: dict[str, Any] = {}
        used = False
        for side in SIDES:
            side_recipe = recipe.side(side)
            if side in sides and side_recipe is not None:
                changes[side], mattered = _set(side_recipe, setter, value)
                used = used or mattered
        if not used:
            raise RecipeError(
                f"--{flag} changes nothing: recipe {recipe.name!r} has no {need} in "
                f"{' and '.join(sides)}"
            )
        recipe = dataclasses.replace(recipe, name=f"{recipe.name}+{flag}={value}", **changes)
    return recipe


def _set(side: SideRecipe, setter: Setter, value: Any) -> tuple[SideRecipe, bool]:
    """The side with `value` set wherever it matters, and whether it did anywhere."""
    scheme = setter(side.scheme, value)
    others = [(regex, old, setter(old, value)) for regex, old in side.overrides]
    changed = dataclasses.replace(
        side,
        scheme=side.scheme if scheme is None else scheme,
        overrides=tuple((regex, old if new is None else new) for regex, old, new in others),
    )
    return changed, scheme is not None or any(new is not None for *_, new in others)
