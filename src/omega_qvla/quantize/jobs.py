"""What a build has to do: the layers of a recipe, and who shares an input with whom."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Sequence
from dataclasses import dataclass

from torch import Tensor, nn

from omega_qvla.config import Recipe, Scheme
from omega_qvla.errors import RecipeError
from omega_qvla.numerics.smoothing import weight_profile
from omega_qvla.policies.base import SIDES, Policy
from omega_qvla.policies.targets import select_targets


@dataclass(frozen=True)
class Job:
    """One layer to quantize, of shape (out, in). num_steps is None where it runs outside the
    denoising steps."""

    name: str
    side: str
    scheme: Scheme
    num_steps: int | None
    shape: tuple[int, int]


def by_side(jobs: Sequence[Job]) -> list[list[Job]]:
    """The jobs of each of SIDES, in order."""
    return [[job for job in jobs if job.side == side] for side in SIDES]


def plan(policy: Policy, recipe: Recipe, num_steps: int) -> list[Job]:
    """The layers that `recipe` quantizes, backbone first. Raises RecipeError."""
    outside = set(policy.step_independent_linears())
    jobs = []
    for side in SIDES:
        side_recipe = recipe.side(side)
        if side_recipe is None:
            continue
        for name, scheme in select_targets(policy, side_recipe, side, recipe.allow_protected):
            inside = side == "action_head" and name not in outside
            rows, width = linear_of(policy.module, name).weight.shape
            steps = num_steps if inside else None
            jobs.append(Job(name, side, scheme, steps, (rows, width)))
    return jobs


def restrict(recipe: Recipe, sides: Sequence[str]) -> Recipe:
    """The recipe without the sides that are not asked for."""
    for side in sides:
        if recipe.side(side) is None and len(sides) == 1:
            raise RecipeError(f"recipe {recipe.name!r} leaves the {side} as it is: nothing to do")
    kept = {side: recipe.side(side) if side in sides else None for side in SIDES}
    if all(side is None for side in kept.values()):
        raise RecipeError(f"recipe {recipe.name!r} has nothing to quantize in {tuple(sides)}")
    return dataclasses.replace(recipe, backbone=kept["backbone"], action_head=kept["action_head"])


def site_profiles(
    policy: Policy, jobs: Sequence[Job], names: Collection[str] | None = None
) -> dict[str, Tensor]:
    """Layer name -> weight profile [in] over the layers that read the same input.

    Only layers with one and the same smoothing share: their divisors come out equal, so one
    smoothed, rotated and quantized input serves all of them. names: of which layers (default:
    of all jobs); the weights of all that share their inputs are looked at.
    """
    smoothing = {job.name: job.scheme.smoothing for job in jobs if job.scheme.smoothing}
    profiles: dict[str, Tensor] = {}
    for site in policy.sites():
        for name in site.consumers:
            if name not in smoothing or name in profiles or not (names is None or name in names):
                continue
            shared = [n for n in site.consumers if smoothing.get(n) == smoothing[name]]
            weights = [linear_of(policy.module, n).weight.detach() for n in shared]
            profiles |= dict.fromkeys(shared, weight_profile(weights, smoothing[name].profile))
    return profiles


def readers_of(policy: Policy, name: str) -> tuple[str, ...]:
    """The layers whose weights decide about layer `name`: itself, and who shares its input."""
    return (name, *(n for site in policy.sites() if name in site.consumers for n in site.consumers))


def linear_of(module: nn.Module, name: str) -> nn.Linear:
    """The layer `name` of a job."""
    linear = module.get_submodule(name)
    assert isinstance(linear, nn.Linear)  # select_targets chose it
    return linear
