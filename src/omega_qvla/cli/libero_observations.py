"""Observations of LIBERO's scripted expert: calibration without a dataset."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from omega_qvla.cli.console import Console
from omega_qvla.errors import CalibrationError

if TYPE_CHECKING:
    from omega_qvla.calibration.samples import ObservationSet
    from omega_qvla.policies.observation import Observation

#: Collects one episode; see `expert_episode`.
EXPERT = "omega_qvla.cli.libero_observations:expert_episode"
STRIDE = 5
#: An episode of the expert has 60 to 110 steps; each gives at least this many observations.
_LEAST = 10


def expert_episode(
    task: str, seed: int, stride: int = STRIDE, **options: Any
) -> list[tuple[int, Observation]]:
    """(step, observation) every `stride` steps while the expert acts, from a sampled start.

    Sampled starts are none of the shipped initial states: those are for evaluation.

    Args:
        options: those of `LiberoEnv`.

    Raises:
        EnvError: the expert has no script for the task, or a part of LIBERO is missing.
        CalibrationError: the expert failed, so that what it saw is no demonstration.
    """
    from omega_qvla.envs.libero import LiberoEnv
    from omega_qvla.envs.libero_oracle import oracle

    env = LiberoEnv(task, **options)
    try:
        expert = oracle(env)
        env.sample_state(seed)
        expert.begin()
        found, step = [], 0
        while True:
            if step % stride == 0:
                found.append((step, env.observe()))
            result = env.step(expert.act())
            step += 1
            if result.done:
                break
    finally:
        env.close()
    if not result.success:
        raise CalibrationError(f"the expert did not solve {task} from the start of seed {seed}")
    return found


def libero_options(args: argparse.Namespace) -> dict[str, Any]:
    """The options of `LiberoEnv` that the arguments give, in JSON's types."""
    from omega_qvla.envs.libero_protocol import libero_protocol

    return {
        "protocol": libero_protocol(args.protocol or "openpi").to_dict(),
        "assets": None if args.assets is None else str(args.assets),
        "substitutes": args.substitutes,
    }


def libero_tasks(suite: str, chosen: Sequence[str] | None) -> list[str]:
    """Tasks as "suite/name" of names or numbers within the suite; all by default.

    Raises:
        EnvError: a task is unknown, or LIBERO is not installed.
    """
    from omega_qvla.envs.libero_files import split_task, suite_tasks

    if not chosen:
        return list(suite_tasks(suite))
    names = ["/".join(split_task(f"{suite}/{task}")) for task in chosen]
    return list(dict.fromkeys(names))


def from_libero(
    args: argparse.Namespace, console: Console, count: int, first_seed: int
) -> ObservationSet:
    """At least `count` observations, from the seeds at `first_seed`."""
    from omega_qvla.cli.sources import collect_episodes

    options = libero_options(args)
    tasks = libero_tasks(args.env, args.tasks)
    per_task = max(1, -(-count // (_LEAST * len(tasks))))
    seeds = [first_seed + i for i in range(per_task)]
    console.note(f"collecting {len(tasks) * per_task} expert episodes in the simulator")
    return collect_episodes(tasks, seeds, console, collector=EXPERT, options=options)
