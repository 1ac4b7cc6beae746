"""A build: calibrate, quantize layer by layer, write one pack; resumable at every layer."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

import omega_qvla
from omega_qvla.calibration.collect import (
    DEFAULT_TOKEN_CAP,
    Calibration,
    collect,
    provenance,
)
from omega_qvla.calibration.samples import ObservationSet
from omega_qvla.config import Recipe, Scheme
from omega_qvla.errors import CalibrationError, RecipeError
from omega_qvla.numerics.layer import QuantizedLayer
from omega_qvla.numerics.quantize_layer import needs_stats, quantize_layer
from omega_qvla.numerics.smoothing import weight_profile
from omega_qvla.numerics.stats import LayerStats
from omega_qvla.pack.lock import output_lock
from omega_qvla.pack.manifest import Manifest, source_digest
from omega_qvla.pack.partial import PartialBuild
from omega_qvla.pack.writer import write_pack
from omega_qvla.policies.base import SIDES, Policy
from omega_qvla.policies.registry import source_hashes
from omega_qvla.policies.targets import select_targets

#: Statistics held at once; a policy that needs more is calibrated in several passes.
DEFAULT_MEMORY = 8 << 30


@dataclass(frozen=True)
class Job:
    """One layer to quantize. num_steps is None where it runs outside the denoising steps."""

    name: str
    side: str
    scheme: Scheme
    num_steps: int | None


@dataclass(frozen=True)
class Progress:
    """`done` of `total` observations (calibrating) or layers (quantizing); `layer` just done."""

    stage: Literal["calibrating", "quantizing"]
    done: int
    total: int
    layer: str = ""


def quantize_policy(
    policy: Policy,
    recipe: Recipe,
    samples: ObservationSet | None,
    *,
    out: str | os.PathLike[str],
    sides: Sequence[str] = SIDES,
    num_steps: int | None = None,
    token_cap: int = DEFAULT_TOKEN_CAP,
    seed: int = 0,
    calibration: Calibration | None = None,
    resume: bool = True,
    progress: Callable[[Progress], None] | None = None,
    memory: int = DEFAULT_MEMORY,
) -> Path:
    """Quantize `policy` by `recipe` and write the pack `out`. The policy is left as it was.

    Finished layers wait in `<out>.partial/`, so a killed build resumes where it was; equal
    arguments give equal bytes, interrupted or not.

    Args:
        samples: every one is used; None if `calibration` is given or the recipe needs none.
        sides: which sides of the recipe to build.
        num_steps: denoising steps to calibrate for; the policy's own by default.
        token_cap, seed: of the calibration, see `calibration.collect`.
        calibration: collected before from this checkpoint; several recipes can share one.
        resume: False starts anew and discards what an earlier build left.
        memory: bytes of statistics to hold at once.

    Raises:
        RecipeError: nothing to quantize, or a protected layer caught.
        CalibrationError: statistics missing, unusable, or of another checkpoint.
        PackError: unfinished work of another build lies in the way; another build is writing
            `out`; a file can't be written.
    """
    out = Path(out)
    steps = policy.num_steps if num_steps is None else num_steps
    recipe = _restrict(recipe, sides)
    jobs = plan(policy, recipe, steps)
    source = source_hashes(policy)
    needed = any(needs_stats(job.scheme) for job in jobs)
    origin: dict[str, Any] = {}
    if needed:
        origin = _origin(policy, samples, calibration, steps, token_cap, seed, source)
    manifest = Manifest(
        family=policy.family,
        source=source,
        recipe=recipe.to_dict(),
        num_steps=steps,
        config=_config(policy.module),
        calibration=origin,
        software=software(),
    )
    binding = _binding(manifest, jobs, calibration if needed else None)
    with output_lock(out):
        build = PartialBuild(out, manifest, [job.name for job in jobs])
        build.open(binding, resume)
        todo = [job for job in jobs if not build.finished(job.name)]
        report = progress if progress is not None else _silent
        sites = site_profiles(policy, jobs)
        for chunk in _chunks(policy.module, todo, token_cap * steps, memory):
            names = [job.name for job in chunk if needs_stats(job.scheme)]
            stats: Mapping[str, LayerStats] = {}
            if names and calibration is not None:
                stats = calibration.stats
            elif names and samples is not None:
                stats = _collect(policy, samples, names, steps, token_cap, seed, report)
            for job in chunk:
                build.save(_quantize(policy.module, job, stats, sites.get(job.name)))
                finished = sum(build.finished(other.name) for other in jobs)
                report(Progress("quantizing", finished, len(jobs), job.name))
        write_pack(out, manifest, build.layers())
        build.remove()
    return out


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
            jobs.append(Job(name, side, scheme, num_steps if inside else None))
    return jobs


def site_profiles(policy: Policy, jobs: Sequence[Job]) -> dict[str, Tensor]:
    """Layer name -> weight profile [in] over the layers that read the same input.

    Only layers with one and the same smoothing share: their divisors come out equal, so one
    smoothed, rotated and quantized input serves all of them.
    """
    smoothing = {job.name: job.scheme.smoothing for job in jobs if job.scheme.smoothing}
    profiles: dict[str, Tensor] = {}
    for site in policy.sites():
        for name in site.consumers:
            if name not in smoothing or name in profiles:
                continue
            shared = [n for n in site.consumers if smoothing.get(n) == smoothing[name]]
            weights = [_linear(policy.module, n).weight.detach() for n in shared]
            profiles |= dict.fromkeys(shared, weight_profile(weights))
    return profiles


def software() -> dict[str, str]:
    """Versions of what computes a build."""
    return {
        "omega_qvla": omega_qvla.__version__,
        "torch": torch.__version__,
        "numpy": np.__version__,
    }


def _restrict(recipe: Recipe, sides: Sequence[str]) -> Recipe:
    """The recipe without the sides that are not asked for."""
    for side in sides:
        if recipe.side(side) is None and len(sides) == 1:
            raise RecipeError(f"recipe {recipe.name!r} leaves the {side} as it is: nothing to do")
    kept = {side: recipe.side(side) if side in sides else None for side in SIDES}
    if all(side is None for side in kept.values()):
        raise RecipeError(f"recipe {recipe.name!r} has nothing to quantize in {tuple(sides)}")
    return dataclasses.replace(recipe, backbone=kept["backbone"], action_head=kept["action_head"])


def _origin(
    policy: Policy,
    samples: ObservationSet | None,
    calibration: Calibration | None,
    num_steps: int,
    token_cap: int,
    seed: int,
    source: Mapping[str, str],
) -> dict[str, Any]:
    """Provenance of the calibration that this build uses, checked to be of this policy."""
    if calibration is None:
        if samples is None:
            raise CalibrationError(
                "this recipe needs calibration: give samples, or a calibration of this checkpoint"
            )
        return provenance(
            policy, samples, num_steps=num_steps, token_cap=token_cap, seed=seed, source=source
        )
    origin = dict(calibration.provenance)
    if origin.get("checkpoint_sha256") != source_digest(source):
        raise CalibrationError(
            "the calibration was collected from another checkpoint; collect it from this one"
        )
    if origin.get("num_steps") != num_steps:
        raise CalibrationError(
            f"the calibration is for {origin.get('num_steps')} denoising steps, the build for "
            f"{num_steps}"
        )
    if samples is not None and origin.get("observations_sha256") != samples.digest():
        raise CalibrationError(
            "the calibration was collected from other samples than those given; give one of them"
        )
    return origin


def _config(module: nn.Module) -> dict[str, Any]:
    config = getattr(module, "config", None)
    if dataclasses.is_dataclass(config) and not isinstance(config, type):
        return dataclasses.asdict(config)
    return {}


def _binding(
    manifest: Manifest, jobs: Sequence[Job], calibration: Calibration | None
) -> dict[str, Any]:
    """What unfinished work must agree with to be gone on with."""
    return {
        "recipe": dict(manifest.recipe),
        "checkpoint": source_digest(manifest.source),
        "calibration": dict(manifest.calibration),
        "statistics": None if calibration is None else calibration.digest(),
        "num_steps": manifest.num_steps,
        "layers": [job.name for job in jobs],
        "software": dict(manifest.software),
    }


def _chunks(
    module: nn.Module, jobs: Sequence[Job], tokens: int, memory: int
) -> Iterator[list[Job]]:
    """Consecutive jobs whose statistics together stay under `memory` bytes (one job may not)."""
    chunk: list[Job] = []
    used = 0
    for job in jobs:
        width = int(getattr(module.get_submodule(job.name), "in_features"))  # noqa: B009
        cost = 4 * width * (width + tokens)
        if chunk and used + cost > memory:
            yield chunk
            chunk, used = [], 0
        chunk.append(job)
        used += cost
    if chunk:
        yield chunk


def _quantize(
    module: nn.Module, job: Job, stats: Mapping[str, LayerStats], site_profile: Tensor | None
) -> QuantizedLayer:
    linear = _linear(module, job.name)
    found = stats.get(job.name)
    if found is None and needs_stats(job.scheme):
        raise CalibrationError(
            f"layer {job.name}: its scheme needs calibration (Hessian, profile or tokens) and "
            "the calibration given has none of it; calibrate with this recipe's layers"
        )
    bias = None if linear.bias is None else linear.bias.detach()
    used = found if needs_stats(job.scheme) else None
    layer = quantize_layer(
        job.name,
        job.side,
        linear.weight.detach(),
        bias,
        job.scheme,
        used,
        job.num_steps,
        site_profile,
    )
    return layer.to("cpu")


def _linear(module: nn.Module, name: str) -> nn.Linear:
    linear = module.get_submodule(name)
    assert isinstance(linear, nn.Linear)  # select_targets chose it
    return linear


def _collect(
    policy: Policy,
    samples: ObservationSet,
    names: Sequence[str],
    num_steps: int,
    token_cap: int,
    seed: int,
    report: Callable[[Progress], None],
) -> dict[str, LayerStats]:
    def tick(done: int, total: int) -> None:
        report(Progress("calibrating", done, total))

    return collect(
        policy,
        samples,
        names,
        num_steps=num_steps,
        token_cap=token_cap,
        seed=seed,
        progress=tick,
    )


def _silent(progress: Progress) -> None:
    """Report to nobody."""
