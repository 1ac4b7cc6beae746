"""A build: calibrate, quantize layer by layer, write one pack; resumable at every layer."""

from __future__ import annotations

import dataclasses
import os
import resource
import sys
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

import omega_qvla
from omega_qvla.calibration.balance import balanced
from omega_qvla.calibration.collect import (
    DEFAULT_TOKEN_CAP,
    Calibration,
    provenance,
)
from omega_qvla.calibration.samples import ObservationSet
from omega_qvla.calibration.streaming import stream
from omega_qvla.config import Recipe, Scheme
from omega_qvla.errors import CalibrationError, RecipeError
from omega_qvla.modules.linear import quantized_linears
from omega_qvla.numerics.layer import QuantizedLayer
from omega_qvla.numerics.phases import Spent, Stopwatch, phase
from omega_qvla.numerics.quantize_layer import needs_stats, quantize_layer
from omega_qvla.numerics.smoothing import weight_profile
from omega_qvla.numerics.stats import LayerStats
from omega_qvla.pack.files import check_replaceable
from omega_qvla.pack.lock import output_lock
from omega_qvla.pack.manifest import Manifest, source_digest
from omega_qvla.pack.partial import PartialBuild
from omega_qvla.pack.writer import FORMAT_NAME, write_pack
from omega_qvla.policies.base import SIDES, Policy
from omega_qvla.policies.targets import select_targets
from omega_qvla.policies.weights import ResidentWeights, Weights

#: Statistics that `quantize_` holds at once; a module that needs more is run several times.
DEFAULT_MEMORY = 8 << 30


@dataclass(frozen=True)
class Job:
    """One layer to quantize, of shape (out, in). num_steps is None where it runs outside the
    denoising steps."""

    name: str
    side: str
    scheme: Scheme
    num_steps: int | None
    shape: tuple[int, int]


@dataclass(frozen=True)
class Progress:
    """`done` of `total` observations times stages (calibrating) or layers (quantizing).

    layer: just done. share: estimated part of this call's work that is done, for an ETA.
    """

    stage: Literal["calibrating", "quantizing"]
    done: int
    total: int
    layer: str = ""
    share: float = 0.0


@dataclass(frozen=True)
class BuildReport:
    """Where the time of a build went, this call's share of it if it was resumed.

    phases: name -> seconds by the clock and of processors: `load` (reading and hashing
    weights), `collect` (running the policy), `hessian`, `scales` (choosing steps), `factorize`
    (transforming and factorizing Hessians), `round`, `write`, `other`.
    layers: in all; built: by this call. peak_memory: of the process so far, bytes resident.
    """

    phases: Mapping[str, Spent]
    layers: int
    built: int
    peak_memory: int

    @classmethod
    def of(cls, watch: Stopwatch, jobs: Sequence[Job], todo: Sequence[Job]) -> BuildReport:
        """The report of a build that `watch` has measured."""
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        unit = 1 if sys.platform == "darwin" else 1024
        return cls(dict(watch.phases), len(jobs), len(todo), peak * unit)

    def to_dict(self) -> dict[str, Any]:
        """As plain JSON values."""
        return dataclasses.asdict(self)


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
    recipe = _restrict(recipe, sides)
    jobs = plan(policy, recipe, steps)
    weights = ResidentWeights(policy.module) if weights is None else weights
    with watch.running():
        source = weights.hashes()
    needed = any(needs_stats(job.scheme) for job in jobs)
    settings = _Settings(steps, token_cap, seed)
    origin: dict[str, Any] = {}
    if needed:
        origin = _origin(policy, weights, samples, calibration, settings, source)
    if cascade:
        _check_cascade(recipe, jobs, samples)
        origin["cascade"] = True
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
    with watch.running(), output_lock(out):
        build = PartialBuild(out, manifest, [job.name for job in jobs])
        build.open(binding, resume)
        todo = [job for job in jobs if not build.finished(job.name)]
        tell = _Teller(jobs, todo, progress if progress is not None else _silent)
        for group in _by_side(todo) if cascade else [todo]:
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


def _by_side(jobs: Sequence[Job]) -> list[list[Job]]:
    return [[job for job in jobs if job.side == side] for side in SIDES]


def _check_cascade(recipe: Recipe, jobs: Sequence[Job], samples: ObservationSet | None) -> None:
    """Raise RecipeError where a cascade would change nothing, CalibrationError without samples."""
    backbone, head = _by_side(jobs)
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
            rows, width = _linear(policy.module, name).weight.shape
            steps = num_steps if inside else None
            jobs.append(Job(name, side, scheme, steps, (rows, width)))
    return jobs


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
            weights = [_linear(policy.module, n).weight.detach() for n in shared]
            profiles |= dict.fromkeys(shared, weight_profile(weights, smoothing[name].profile))
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
    weights: Weights,
    samples: ObservationSet | None,
    calibration: Calibration | None,
    settings: _Settings,
    source: Mapping[str, str],
) -> dict[str, Any]:
    """Provenance of the calibration that this build uses, checked to be of this policy."""
    if calibration is None:
        if samples is None:
            raise CalibrationError(
                "this recipe needs calibration: give samples, or a calibration of this checkpoint"
            )
        return provenance(
            policy, samples, source=source, dtype=weights.dtype, **dataclasses.asdict(settings)
        )
    origin = dict(calibration.provenance)
    if origin.get("checkpoint_sha256") != source_digest(source):
        raise CalibrationError(
            "the calibration was collected from another checkpoint; collect it from this one"
        )
    if origin.get("num_steps") != settings.num_steps:
        raise CalibrationError(
            f"the calibration is for {origin.get('num_steps')} denoising steps, the build for "
            f"{settings.num_steps}"
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


def _ready(
    policy: Policy,
    weights: Weights,
    jobs: Sequence[Job],
    calibration: Calibration | None,
    samples: ObservationSet | None,
    settings: _Settings,
    tell: _Teller,
) -> Iterator[tuple[list[Job], dict[str, LayerStats]]]:
    """Jobs that can be done now, with the statistics they need, their weights being loaded."""
    streamed = []
    for job in jobs:
        if needs_stats(job.scheme) and calibration is None and samples is not None:
            streamed.append(job)
            continue
        given = calibration.stats if calibration is not None else {}
        with weights.loaded(_readers(policy, job.name)):
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


def _readers(policy: Policy, name: str) -> tuple[str, ...]:
    """The layers whose weights decide about layer `name`: itself, and who shares its input."""
    return (name, *(n for site in policy.sites() if name in site.consumers for n in site.consumers))


def _build(
    policy: Policy,
    jobs: Sequence[Job],
    ready: Sequence[Job],
    stats: dict[str, LayerStats],
    build: PartialBuild,
    tell: _Teller,
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
    linear = _linear(module, job.name)
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


def _linear(module: nn.Module, name: str) -> nn.Linear:
    linear = module.get_submodule(name)
    assert isinstance(linear, nn.Linear)  # select_targets chose it
    return linear


@dataclass(frozen=True)
class _Settings:
    """How a policy is run for calibration; the arguments of `collect` and `stream`."""

    num_steps: int
    token_cap: int
    seed: int


class _Teller:
    """Tells the progress of a build, with the share of the work that is done.

    The work of a layer is estimated as that of GPTQ: factorizing [in, in], correcting
    [out, in], and the products of calibration, as if there were as many tokens as inputs.
    """

    def __init__(
        self, jobs: Sequence[Job], todo: Sequence[Job], report: Callable[[Progress], None]
    ) -> None:
        self._report, self._total = report, len(jobs)
        self._finished = len(jobs) - len(todo)
        self._all, self._done = sum(map(_work, todo)), 0.0
        self.streaming = False

    def calibrating(self, done: int, total: int) -> None:
        self.streaming = True
        self._report(Progress("calibrating", done, total, share=self._share))

    def quantized(self, job: Job) -> None:
        self._finished += 1
        self._done += _work(job)
        self._report(
            Progress("quantizing", self._finished, self._total, job.name, share=self._share)
        )

    @property
    def _share(self) -> float:
        return self._done / self._all if self._all else 1.0


def _work(job: Job) -> float:
    rows, width = job.shape
    return float(width**3 + width**2 * rows)


def _silent(progress: Progress) -> None:
    """Report to nobody."""
