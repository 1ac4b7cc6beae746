"""The observations of a comparison: scripted experts on seeds of their own, or recordings."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from omega_qvla.calibration.samples import (
    ObservationSet,
    read_observations,
    select_samples,
    write_observations,
)
from omega_qvla.cli.comparison.plan import Comparison
from omega_qvla.cli.console import Console
from omega_qvla.cli.sources import CALIBRATION_SEED, HELD_OUT_SEED, collect_episodes
from omega_qvla.errors import ConfigError

FILES = {"calibration": CALIBRATION_SEED, "held-out": HELD_OUT_SEED}


def observation_file(plan: Comparison, kind: str) -> Path:
    """`calibration` or `held-out`; all checkpoints share them."""
    return plan.work_dir / "observations" / f"{kind}.safetensors"


def load_observations(plan: Comparison, kind: str) -> ObservationSet:
    """What `collect_observations` or `keep_recordings` wrote."""
    return read_observations(observation_file(plan, kind))


def calibration_set(plan: Comparison, samples: int | None) -> ObservationSet:
    """The observations that an arm is calibrated on; a smaller set lies within a larger one.

    Raises:
        CalibrationError: an arm wants more of them than there are.
    """
    pool = load_observations(plan, "calibration")
    return select_samples(pool, samples or min(plan.num_samples, len(pool)), plan.seed)


def collect_observations(plan: Comparison, console: Console) -> None:
    """Write both files, unless they are there.

    All that was seen in the episodes for calibration, since arms differ in how many they take;
    of the others so many as drift is measured on, balanced over tasks, then episodes.
    """
    missing = [kind for kind in FILES if not observation_file(plan, kind).exists()]
    if not missing:
        console.note("observations: there already")
        return
    # One pool for both: starting simulators costs more than running them.
    seeds = [FILES[kind] + i for kind in missing for i in range(plan.collect_episodes)]
    console.note(f"observations: {len(seeds) * len(plan.tasks)} episodes of scripted experts")
    found = collect_episodes(
        plan.tasks,
        seeds,
        console,
        collector=plan.collector,
        options=plan.env_options,
        workers=plan.workers,
    )
    for kind in missing:
        low = FILES[kind]
        own = [i for i, m in enumerate(found.meta) if low <= m.episode < low + 100_000]
        chosen = found.take(own)
        if kind == "held-out":
            chosen = select_samples(chosen, min(plan.held_out, len(own)), plan.seed)
        own_seeds = sorted({meta.episode for meta in chosen.meta})
        _keep(plan, kind, chosen, f"{plan.collector}, seeds {own_seeds[0]} to {own_seeds[-1]}")
        console.note(f"observations: {len(chosen)} for {kind}")


def keep_recordings(plan: Comparison, recorded: Mapping[str, ObservationSet]) -> None:
    """Keep observations that were read elsewhere as the comparison's own.

    Raises:
        ConfigError: others are there already.
    """
    for kind, samples in recorded.items():
        path = observation_file(plan, kind)
        if not path.exists():
            _keep(plan, kind, samples, samples.source)
        elif read_observations(path).digest() != samples.digest():
            raise ConfigError(f"{path} holds other observations; give another --out, or delete it")


def _keep(plan: Comparison, kind: str, samples: ObservationSet, source: str) -> None:
    path = observation_file(plan, kind)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_observations(path, samples.observations, samples.meta, source)
