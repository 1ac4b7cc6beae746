"""Where observations come from: recordings, or scripted experts in a simulator."""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from concurrent.futures import as_completed
from pathlib import Path
from typing import TYPE_CHECKING, Any

from omega_qvla.calibration.samples import (
    ObservationSet,
    SampleMeta,
    select_samples,
    write_observations,
)
from omega_qvla.cli.console import Console
from omega_qvla.cli.libero_observations import from_libero
from omega_qvla.cli.processes import process_pool
from omega_qvla.cli.recordings import draw_checked, open_recordings
from omega_qvla.errors import CalibrationError, ConfigError
from omega_qvla.evaluation.plan import resolve
from omega_qvla.policies.observation import Observation

if TYPE_CHECKING:
    from omega_qvla.cli.checkpoints import Checkpoint

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
    args: argparse.Namespace, outline: Checkpoint, console: Console
) -> ObservationSet | None:
    """The samples that `parsing.add_calibration`'s options name; None where they name none.

    Raises:
        ConfigError: options that exclude or need each other.
        CalibrationError: something unreadable, or too few observations in it.
        ObservationError: the observations do not fit the policy.
    """
    check_options(args)
    if args.env:
        samples = from_simulator(args, outline.image_size, console, args.num_samples)
        if args.save_observations:
            path: Path = args.save_observations
            write_observations(path, samples.observations, samples.meta, samples.source)
            console.note(f"{len(samples)} observations in {path}")
        return select_samples(samples, args.num_samples, args.seed)
    source = open_recordings(args, outline.policy)
    if source is None:
        return None
    return draw_checked(args, source, "calibration", args.num_samples, outline.policy)


def check_options(args: argparse.Namespace) -> None:
    """Raise ConfigError where options of sources exclude or need each other."""
    if sum(map(bool, (args.observations, args.dataset, args.env))) > 1:
        raise ConfigError("give one of --observations, --dataset and --env, not both")
    if (args.tasks or args.save_observations) and not args.env:
        raise ConfigError("--tasks and --save-observations go with --env")
    if (args.protocol or args.assets or args.substitutes) and args.env in (None, "metaworld"):
        raise ConfigError("--protocol, --assets and --substitutes go with --env libero_...")
    if args.env and (args.camera or args.state_key or args.held_out is not None):
        raise ConfigError("--camera, --state-key and --held-out go with recordings, not --env")


def from_simulator(
    args: argparse.Namespace,
    size: int,
    console: Console,
    count: int,
    first_seed: int = CALIBRATION_SEED,
) -> ObservationSet:
    """At least `count` observations of scripted experts, from the seeds at `first_seed`.

    size: edge of Meta-World's images; LIBERO's is the protocol's.
    """
    if args.env == "metaworld":
        samples = _from_metaworld(args, size, console, count, first_seed)
    else:
        samples = from_libero(args, console, count, first_seed)
    if count > len(samples):
        raise CalibrationError(f"{count} observations wanted, {len(samples)} were collected")
    return samples


def _from_metaworld(
    args: argparse.Namespace, size: int, console: Console, count: int, first_seed: int
) -> ObservationSet:
    from omega_qvla.envs.metaworld import TASKS

    tasks = check_tasks(args.tasks or list(TASKS))
    per_task = max(1, -(-count // (5 * len(tasks))))
    seeds = [first_seed + i for i in range(per_task)]
    console.note(f"collecting {len(tasks) * per_task} expert episodes in the simulator")
    return collect_episodes(tasks, seeds, console, options={"size": size})


def check_tasks(tasks: Sequence[str]) -> list[str]:
    """The tasks, if Meta-World has them all. Raises ConfigError naming those there are."""
    from omega_qvla.envs.metaworld import TASKS

    for task in tasks:
        if task not in TASKS:
            raise ConfigError(f"unknown task {task!r}; one of {', '.join(TASKS)}")
    return list(dict.fromkeys(tasks))
