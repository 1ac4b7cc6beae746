"""A build: calibrate, quantize layer by layer, write one pack; resumable at every layer."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from omega_qvla.calibration.balance import balanced
from omega_qvla.calibration.collect import DEFAULT_TOKEN_CAP, Calibration
from omega_qvla.calibration.samples import ObservationSet
from omega_qvla.calibration.streaming import stream
from omega_qvla.config import Recipe
from omega_qvla.errors import CalibrationError, RecipeError
from omega_qvla.modules.linear import quantized_linears
from omega_qvla.numerics.layer import QuantizedLayer
from omega_qvla.numerics.phases import Stopwatch, phase
from omega_qvla.numerics.quantize_layer import needs_stats, quantize_layer
from omega_qvla.numerics.stats import LayerStats
from omega_qvla.pack.files import check_replaceable
from omega_qvla.pack.lock import output_lock
from omega_qvla.pack.partial import PartialBuild
from omega_qvla.pack.writer import FORMAT_NAME, write_pack
from omega_qvla.policies.base import SIDES, Policy
from omega_qvla.policies.weights import ResidentWeights, Weights
from omega_qvla.quantize.jobs import (
    Job,
    by_side,
    linear_of,
    plan,
    readers_of,
    restrict,
    site_profiles,
)
from omega_qvla.quantize.origin import Settings, binding_of, manifest_of, origin_of
from omega_qvla.quantize.progress import BuildReport, Progress, Teller, silent


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
    cascade: bool = False,
    weights: Weights | None = None,
    on_report: Callable[[BuildReport], None] | None = None,
) -> Path:
    """Quantize `policy` by `recipe` and write the pack `out`. The policy is left as it was.

    The network is calibrated and quantized stage by stage (`calibration.streaming`): no more
    is held than one stage's weights (of a policy without its own) and one block's statistics.
    Finished layers wait in `<out>.partial/`, so a killed build resumes where it was; equal
    arguments give equal bytes, interrupted or not.

    Args:
        samples: every one is used; None if `calibration` is given or the recipe needs none.
        sides: which sides of the recipe to build.
        num_steps: denoising steps to calibrate for; the policy's own by default.
        token_cap, seed: of the calibration, see `calibration.collect`.
        calibration: collected before from this checkpoint; several recipes can share one.
        resume: False starts anew and discards what an earlier build left.
        cascade: calibrate the action head on what the quantized backbone tells it, as it will
            be at run time. Takes `samples`, also where a calibration is given (which then
            serves the backbone alone).
        weights: of a policy that is without them, from `policies.weights.open_policy`; they
            are loaded one part of the network at a time. None: the policy has them.
        on_report: is told at the end where time and memory went.

    Raises:
        RecipeError: nothing to quantize, or a protected layer caught; nothing to cascade.
        CalibrationError: statistics missing, unusable, or of another checkpoint.
        PackError: unfinished work of another build lies in the way; another build is writing
            `out`; a file can't be written, or what is at `out` is no pack.
    """
    out, watch = Path(out), Stopwatch()
    check_replaceable(out, FORMAT_NAME)  # before hours of work, not after them
    steps = policy.num_steps if num_steps is None else num_steps
    recipe = restrict(recipe, sides)
    jobs = plan(policy, recipe, steps)
    weights = ResidentWeights(policy.module) if weights is None else weights
    settings = Settings(steps, token_cap, seed)
    with watch.running():
        source = weights.hashes()
    needed = any(needs_stats(job.scheme) for job in jobs)
    origin: dict[str, Any] = {}
    if needed:
        origin = origin_of(policy, weights, samples, calibration, settings, source)
    if cascade:
        _check_cascade(recipe, jobs, samples)
        origin["cascade"] = True
    manifest = manifest_of(policy, recipe, source, origin, steps)
    binding = binding_of(manifest, jobs, calibration if needed else None)
    with watch.running(), output_lock(out):
        build = PartialBuild(out, manifest, [job.name for job in jobs])
        build.open(binding, resume)
        todo = [job for job in jobs if not build.finished(job.name)]
        tell = Teller(jobs, todo, progress if progress is not None else silent)
        for group in by_side(todo) if cascade else [todo]:
            below: Mapping[str, QuantizedLayer] = {}
            if cascade and group and group[0].side == "action_head":
                below = build.layers([job.name for job in jobs if job.side == "backbone"])
            given = None if below else calibration
            with quantized_linears(policy.module, below, "emulated"):
                for ready, stats in _ready(policy, weights, group, given, samples, settings, tell):
                    _build(policy, jobs, ready, stats, build, tell)
                    del stats
        with phase("write"):
            write_pack(out, manifest, balanced(policy, samples, build.layers(), seed))
            build.remove()
    if on_report is not None:
        on_report(BuildReport.of(watch, jobs, todo))
    return out


def _check_cascade(recipe: Recipe, jobs: Sequence[Job], samples: ObservationSet | None) -> None:
    """Raise RecipeError where a cascade would change nothing, CalibrationError without samples."""
    backbone, head = by_side(jobs)
    if not backbone or not any(needs_stats(job.scheme) for job in head):
        raise RecipeError(
            f"recipe {recipe.name!r} has nothing to cascade: it takes a quantized backbone and an "
            "action head that is calibrated; build both sides at once"
        )
    if samples is None:
        raise CalibrationError(
            "a cascade runs the quantized backbone on the observations: give samples, not only "
            "a calibration"
        )


def _ready(
    policy: Policy,
    weights: Weights,
    jobs: Sequence[Job],
    calibration: Calibration | None,
    samples: ObservationSet | None,
    settings: Settings,
    tell: Teller,
) -> Iterator[tuple[list[Job], dict[str, LayerStats]]]:
    """Jobs that can be done now, with the statistics they need, their weights being loaded."""
    streamed = []
    for job in jobs:
        if needs_stats(job.scheme) and calibration is None and samples is not None:
            streamed.append(job)
            continue
        given = calibration.stats if calibration is not None else {}
        with weights.loaded(readers_of(policy, job.name)):
            yield [job], {job.name: given[job.name]} if job.name in given else {}
    if not streamed or samples is None:
        return
    by_name = {job.name: job for job in streamed}
    for stats in stream(
        policy,
        weights,
        samples.observations,
        list(by_name),
        progress=tell.calibrating,
        **dataclasses.asdict(settings),
    ):
        yield [by_name[name] for name in stats], stats


def _build(
    policy: Policy,
    jobs: Sequence[Job],
    ready: Sequence[Job],
    stats: dict[str, LayerStats],
    build: PartialBuild,
    tell: Teller,
) -> None:
    """Quantize and keep the layers `ready`; each one's statistics are dropped after it."""
    sites = site_profiles(policy, jobs, [job.name for job in ready])
    streamed = tell.streaming
    for job in ready:
        found = stats.pop(job.name, None)
        last = streamed and not any(other is found for other in stats.values())
        layer = _quantize(policy.module, job, found, sites.get(job.name), consume=last)
        del found
        with phase("write"):
            build.save(layer)
        tell.quantized(job)


def _quantize(
    module: nn.Module,
    job: Job,
    found: LayerStats | None,
    site_profile: Tensor | None,
    *,
    consume: bool,
) -> QuantizedLayer:
    linear = linear_of(module, job.name)
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
        consume=consume,
    )
    return layer.to("cpu")
