"""What there is to quantize in somebody else's module, and when each layer runs."""

from __future__ import annotations

import dataclasses
import hashlib
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from omega_qvla.config import Recipe, Scheme
from omega_qvla.errors import CalibrationError, RecipeError
from omega_qvla.modules.linear import QuantLinear
from omega_qvla.modules.step_context import current_step
from omega_qvla.pack.files import tensor_bytes
from omega_qvla.policies.base import PROTECTED, SIDES
from omega_qvla.policies.foreign import StepCounter, find_linear


@dataclass(frozen=True)
class Target:
    """One layer to quantize."""

    name: str
    side: str
    scheme: Scheme
    linear: nn.Linear


@dataclass
class Survey:
    """What one pass over the calibration inputs tells before anything is measured.

    seen: layer -> the steps it ran in, None for outside them. totals: of the caller's steps.
    inputs: of the first layer of each side, hashed in the order that they came.
    """

    inferences: int = 0
    num_steps: int | None = None
    seen: dict[str, set[int | None]] = field(default_factory=dict)
    totals: set[int] = field(default_factory=set)
    inputs: Any = field(default_factory=hashlib.sha256)


def with_regexes(
    recipe: Recipe, backbone: str | None, action_head: str | None, exclude: str | None
) -> Recipe:
    """The recipe with the given regexes; sides that nobody names are None."""
    sides: dict[str, Any] = {}
    for side, include in zip(SIDES, (backbone, action_head), strict=True):
        old = recipe.side(side)
        if old is None and include is not None:
            raise RecipeError(f"recipe {recipe.name!r} leaves the {side} as it is")
        include = include if include is not None or old is None else old.include
        if old is not None and include is not None:
            excluded = old.exclude if exclude is None else exclude
            sides[side] = dataclasses.replace(old, include=include, exclude=excluded)
    if not sides:
        raise RecipeError(
            "no layer is named: a foreign module has no default layers, give a regex as "
            "`backbone` or `action_head`, or `include` in the recipe"
        )
    return dataclasses.replace(
        recipe, backbone=sides.get("backbone"), action_head=sides.get("action_head")
    )


def targets_of(module: nn.Module, recipe: Recipe) -> list[Target]:
    """The layers that the recipe names. Raises RecipeError: none, protected, on both sides."""
    if any(isinstance(part, QuantLinear) for part in module.modules()):
        raise RecipeError("the module already has quantized layers; load its checkpoint again")
    linears = [name for name, part in module.named_modules() if isinstance(part, nn.Linear)]
    chosen: dict[str, Target] = {}
    for side in SIDES:
        side_recipe = recipe.side(side)
        if side_recipe is None or side_recipe.include is None:
            continue
        include, exclude = side_recipe.include, side_recipe.exclude
        names = [
            name
            for name in linears
            if re.search(include, name) and not (exclude and re.search(exclude, name))
        ]
        if not names:
            raise RecipeError(
                f"{side}: include {include!r} and exclude {exclude!r} leave none of the "
                f"{len(linears)} linear layers, for instance {', '.join(linears[:3])}"
            )
        for name in names:
            if name in chosen:
                raise RecipeError(f"{name} matches both sides; narrow one of the regexes")
            if re.search(PROTECTED, name) and not recipe.allow_protected:
                raise RecipeError(
                    f"{side}: {name} is a protected layer, which collapses at 4 bits. Narrow "
                    "the regex, or set `allow_protected: true` in the recipe"
                )
            scheme = side_recipe.scheme_for(name)
            if scheme.balance != "none":
                raise RecipeError(
                    f"{name}: `balance` runs one of our policies to measure its attention; a "
                    "module of others cannot have it"
                )
            chosen[name] = Target(name, side, scheme, find_linear(module, name))
    return list(chosen.values())


def look_over(
    module: nn.Module,
    calibrate: Callable[[], Any],
    targets: Sequence[Target],
    head: str | None,
    entry: str,
) -> Survey:
    """Run `calibrate` once; see how many inferences and steps there are and who runs in which."""
    counter = StepCounter(module, head, entry)
    survey = Survey(seen={target.name: set() for target in targets})
    first: dict[str, str] = {}  # side -> the layer that ran first

    def look(target: Target) -> Callable[..., None]:
        def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            survey.seen[target.name].add(counter.index())
            step = current_step()
            survey.totals |= set() if step is None else {step.total}
            if first.setdefault(target.side, target.name) == target.name:
                x = args[0] if args else kwargs["input"]
                survey.inputs.update(f"{target.name} {list(x.shape)}".encode())
                survey.inputs.update(tensor_bytes(x))

        return hook

    with installed(counter), ExitStack() as hooks:
        for target in targets:
            handle = target.linear.register_forward_pre_hook(look(target), with_kwargs=True)
            hooks.callback(handle.remove)
        run_once(calibrate)
    survey.inferences = len(counter.counts)
    if survey.inferences == 0:
        raise CalibrationError(
            f"calibrate() ran no inference: it has to call the module's {entry!r} (another "
            "method: name it as `entry`)"
        )
    survey.num_steps = _steps(counter, survey)
    _check_layers(survey)
    return survey


def _steps(counter: StepCounter, survey: Survey) -> int | None:
    """Denoising steps per inference, by the head's calls or by what the caller said."""
    if counter.head is None:
        if len(survey.totals) > 1:
            raise CalibrationError(
                f"trajectories of {sorted(survey.totals)} denoising steps: calibrate for one number"
            )
        return next(iter(survey.totals), None)
    first = counter.counts[0]
    for i, calls in enumerate(counter.counts):
        if calls != first:
            raise CalibrationError(
                f"{counter.head} was called {first} times in inference 0 and {calls} times in "
                f"inference {i}: the number of denoising steps has to be the same in all"
            )
    if first == 0:
        raise CalibrationError(
            f"{counter.head} was never called in {len(counter.counts)} inference(s); a hook does "
            "not see `module.forward(...)`: name a submodule that is called once per step, for "
            "instance the projection of the noisy actions"
        )
    return first


def _check_layers(survey: Survey) -> None:
    for name, seen in survey.seen.items():
        steps = {step for step in seen if step is not None}
        if not seen:
            raise CalibrationError(f"layer {name} never ran during calibration; exclude it")
        if steps and None in seen:
            raise CalibrationError(
                f"layer {name} runs both inside and outside the denoising steps; it cannot have "
                "one table of scales. Exclude it"
            )
        missing = sorted(set(range(survey.num_steps or 0)) - steps)
        if steps and missing:
            raise CalibrationError(
                f"layer {name} misses denoising step(s) {', '.join(map(str, missing))} of "
                f"{survey.num_steps}: they would never be calibrated. Exclude it"
            )


def run_once(calibrate: Callable[[], Any]) -> None:
    """One pass over the calibration inputs."""
    with torch.no_grad():
        calibrate()


@contextmanager
def installed(counter: StepCounter) -> Iterator[None]:
    """Steps are counted while the body runs."""
    counter.install()
    try:
        yield
    finally:
        counter.remove()
