"""Where a pack comes from, as its manifest has it and as unfinished work must agree with."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

import omega_qvla
from omega_qvla.calibration.collect import Calibration, provenance
from omega_qvla.calibration.samples import ObservationSet
from omega_qvla.config import Recipe
from omega_qvla.errors import CalibrationError
from omega_qvla.pack.manifest import Manifest, source_digest
from omega_qvla.policies.base import Policy
from omega_qvla.policies.weights import Weights
from omega_qvla.quantize.jobs import Job


@dataclass(frozen=True)
class Settings:
    """How a policy is run for calibration; the arguments of `collect` and `stream`."""

    num_steps: int
    token_cap: int
    seed: int


def software() -> dict[str, str]:
    """Versions of what computes a build."""
    return {
        "omega_qvla": omega_qvla.__version__,
        "torch": torch.__version__,
        "numpy": np.__version__,
    }


def origin_of(
    policy: Policy,
    weights: Weights,
    samples: ObservationSet | None,
    calibration: Calibration | None,
    settings: Settings,
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


def manifest_of(
    policy: Policy,
    recipe: Recipe,
    source: Mapping[str, str],
    calibration: Mapping[str, Any],
    num_steps: int,
) -> Manifest:
    """What the pack says about itself."""
    found, config = getattr(policy.module, "config", None), {}
    if dataclasses.is_dataclass(found) and not isinstance(found, type):
        config = dataclasses.asdict(found)
    return Manifest(
        family=policy.family,
        source=source,
        recipe=recipe.to_dict(),
        num_steps=num_steps,
        config=config,
        calibration=calibration,
        software=software(),
    )


def binding_of(
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
