"""Where observations come from: a file, or scripted experts in a simulator."""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from concurrent.futures import as_completed
from pathlib import Path
from typing import Any

from omega_qvla.calibration.samples import (
    ObservationSet,
    SampleMeta,
    read_observations,
    select_samples,
    write_observations,
)
from omega_qvla.cli.console import Console
from omega_qvla.cli.processes import process_pool
from omega_qvla.errors import CalibrationError, ConfigError
from omega_qvla.evaluation.plan import resolve
from omega_qvla.policies.observation import Observation

#: Seeds of calibration and of held-out observations; training and evaluation use others.
CALIBRATION_SEED, HELD_OUT_SEED = 200_000, 300_000
#: Collects one episode; see `expert_episode`.
EXPERT = "omega_qvla.cli.sources:expert_episode"
STRIDE = 5

Found = list[tuple[int, Observation]]


def expert_episode(task: str, seed: int, size: int = 80, stride: int = STRIDE) -> Found:
    """(step, observation) every `stride` steps while Meta-World's scripted expert acts.

    A policy that executes five actions of each chunk looks at every fifth step as well.
    """
    from omega_qvla.envs.metaworld import MetaWorldEnv, scripted_expert

    env, expert = MetaWorldEnv(task, size=size), scripted_expert(task)
    try:
        env.reset_state(seed)
        found, done, step = [], False, 0
        while not done:
            if step % stride == 0:
                found.append((step, env.observe()))
            done = env.step(expert(env.raw_observation)).done
            step += 1
        return found
    finally:
        env.close()


def collect_episodes(
    tasks: Sequence[str],
    seeds: Sequence[int],
    console: Console,
    *,
    collector: str = EXPERT,
    options: Mapping[str, Any] | None = None,
    workers: int = 2,
) -> ObservationSet:
    """Every task from every seed, in parallel processes; ordered by task and seed."""
    jobs = [(task, seed) for task in tasks for seed in seeds]
    found: dict[tuple[str, int], Found] = {}
    with console.bar("collecting observations") as tick, process_pool(workers) as pool:
        futures = {
            pool.submit(_collect, collector, task, seed, dict(options or {})): (task, seed)
            for task, seed in jobs
        }
        for future in as_completed(futures):
            found[futures[future]] = future.result()
            tick(len(found), len(jobs), futures[future][0])
    observations = [o for job in jobs for _, o in found[job]]
    meta = [SampleMeta(seed, step, task) for task, seed in jobs for step, _ in found[task, seed]]
    source = f"{collector}, seeds {min(seeds)} to {max(seeds)}"
    return ObservationSet(tuple(observations), tuple(meta), source)


def _collect(collector: str, task: str, seed: int, options: dict[str, Any]) -> Found:
    found: Found = resolve(collector)(task, seed, **options)
    return found


def given_observations(
    args: argparse.Namespace, image_size: int, console: Console
) -> ObservationSet | None:
    """The samples that `parsing.add_calibration`'s options name; None where they name none.

    Raises:
        ConfigError: options that exclude or need each other.
        CalibrationError: an unreadable file, or too few observations in it.
    """
    if args.observations and args.env:
        raise ConfigError("give --observations or --env, not both")
    if (args.tasks or args.save_observations) and not args.env:
        raise ConfigError("--tasks and --save-observations go with --env")
    if args.env:
        samples = _from_simulator(args, image_size, console)
    elif args.observations:
        samples = read_observations(args.observations)
    else:
        return None
    if args.num_samples > len(samples):
        raise CalibrationError(
            f"--num-samples {args.num_samples}, but there are only {len(samples)} observations"
        )
    return select_samples(samples, args.num_samples, args.seed)


def _from_simulator(args: argparse.Namespace, size: int, console: Console) -> ObservationSet:
    from omega_qvla.envs.metaworld import TASKS

    tasks = check_tasks(args.tasks or list(TASKS))
    per_task = max(1, -(-args.num_samples // (5 * len(tasks))))
    seeds = [CALIBRATION_SEED + i for i in range(per_task)]
    console.note(f"collecting {len(tasks) * per_task} expert episodes in the simulator")
    samples = collect_episodes(tasks, seeds, console, options={"size": size})
    if args.save_observations:
        path: Path = args.save_observations
        write_observations(path, samples.observations, samples.meta, samples.source)
        console.note(f"{len(samples)} observations in {path}")
    return samples


def check_tasks(tasks: Sequence[str]) -> list[str]:
    """The tasks, if Meta-World has them all. Raises ConfigError naming those there are."""
    from omega_qvla.envs.metaworld import TASKS

    for task in tasks:
        if task not in TASKS:
            raise ConfigError(f"unknown task {task!r}; one of {', '.join(TASKS)}")
    return list(dict.fromkeys(tasks))
