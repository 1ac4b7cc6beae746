"""Which layers a recipe quantizes, and how."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass

from torch import nn

from omega_qvla.config.recipe import Scheme, SideRecipe
from omega_qvla.errors import RecipeError
from omega_qvla.policies.base import PROTECTED, Policy, check_side


@dataclass(frozen=True)
class Selection:
    """The chosen layers of one side, in the module's order; iterates over (name, scheme).

    unused: layers that the regexes matched and inference never runs; they stay as they are.
    """

    layers: tuple[tuple[str, Scheme], ...]
    unused: tuple[str, ...] = ()

    def __iter__(self) -> Iterator[tuple[str, Scheme]]:
        return iter(self.layers)

    def __len__(self) -> int:
        return len(self.layers)

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the chosen layers."""
        return tuple(name for name, _ in self.layers)


def select_targets(
    policy: Policy, side_recipe: SideRecipe, side: str, allow_protected: bool = False
) -> Selection:
    """The `nn.Linear` layers of `side` that match include and not exclude, with their schemes.

    Args:
        policy: not yet quantized.
        side_recipe: a regex that is None there means the family's default.
        side: `backbone` or `action_head`; layers of the other one are never candidates.
        allow_protected: accept layers that collapse at 4 bits (`policies.base.PROTECTED`).

    Raises:
        RecipeError: nothing matched, or a protected layer did.
    """
    known = check_side(side)
    default_include, default_exclude = policy.targets(known)
    include = default_include if side_recipe.include is None else side_recipe.include
    exclude = default_exclude if side_recipe.exclude is None else side_recipe.exclude
    linears = [
        name
        for name, module in policy.module.named_modules()
        if isinstance(module, nn.Linear) and policy.side_of(name) == known
    ]
    matched = [
        name
        for name in linears
        if re.search(include, name) and not (exclude and re.search(exclude, name))
    ]
    protected = [name for name in matched if re.search(PROTECTED, name)]
    if protected and not allow_protected:
        raise RecipeError(
            f"{side}: the recipe catches protected layers, which collapse at 4 bits: "
            f"{_some(protected)}. Narrow `include`, or set `allow_protected: true`"
        )
    never_run = set(policy.unused_linears())
    chosen = [name for name in matched if name not in never_run]
    if not chosen:
        raise RecipeError(
            f"{side}: include {include!r} and exclude {exclude!r} leave none of the "
            f"{len(linears)} linear layers, for instance {_some(linears)}"
        )
    return Selection(
        tuple((name, side_recipe.scheme_for(name)) for name in chosen),
        tuple(name for name in matched if name in never_run),
    )


def _some(names: list[str], count: int = 3) -> str:
    more = f" and {len(names) - count} more" if len(names) > count else ""
    return ", ".join(names[:count]) + more
