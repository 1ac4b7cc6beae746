"""The demo's observations: scripted experts on seeds that nothing else uses."""

from __future__ import annotations

from pathlib import Path

from omega_qvla.calibration.samples import (
    ObservationSet,
    read_observations,
    select_samples,
    write_observations,
)
from omega_qvla.cli.console import Console
from omega_qvla.cli.demo.plan import DemoPlan
from omega_qvla.cli.sources import CALIBRATION_SEED, HELD_OUT_SEED, collect_episodes

FILES = {"calibration": CALIBRATION_SEED, "held-out": HELD_OUT_SEED}


def observation_file(plan: DemoPlan, kind: str) -> Path:
    """`calibration` or `held-out`; both families share them."""
    return plan.out / "observations" / f"{kind}.safetensors"


def load_observations(plan: DemoPlan, kind: str) -> ObservationSet:
    """What `collect_observations` wrote."""
    return read_observations(observation_file(plan, kind))


def collect_observations(plan: DemoPlan, console: Console) -> None:
    """Write both files, unless they are there; balanced over tasks, then episodes."""
    counts = {"calibration": plan.num_samples, "held-out": plan.held_out}
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
        chosen = select_samples(found.take(own), min(counts[kind], len(own)), plan.seed)
        path = observation_file(plan, kind)
        path.parent.mkdir(parents=True, exist_ok=True)
        own_seeds = sorted({meta.episode for meta in chosen.meta})
        source = f"{plan.collector}, seeds {own_seeds[0]} to {own_seeds[-1]}"
        write_observations(path, chosen.observations, chosen.meta, source)
        console.note(f"observations: {len(chosen)} for {kind}")
