"""Collect scripted Meta-World demonstrations: noisy visits, clean labels, one shard per block.

    python training/collect.py --out DIR --episodes 150 --workers 2 --every 3

In two of three episodes noise is added to what is executed, while the recorded label
stays the expert's clean action at the state visited (DART): the policy learns its way
back from its own mistakes. Shards are written atomically and skipped when present, so
a run that was cut off goes on where it stopped; blocks interleave the tasks, so that
training can start on what is there.

Arrays of a shard `<task>-<block>.npz` (E episodes, n rendered steps, T steps in all):
    images_base, images_wrist  uint8 [n, H, W, 3]
    state        float32 [n, 4]    hand xyz in metres, gripper opening
    raw          float32 [n, 39]   the simulator's own observation
    step         int32 [n]         the rendered step within its episode, before its action
    episode      int32 [n]         0..E-1
    actions      float32 [T, 4]    labels: clean expert actions, every step of every episode
    executed     float32 [T, 4]    what the simulator was given
    offsets      int64 [E + 1]     episode e owns rows offsets[e]:offsets[e + 1]
    success_step int32 [E]         the first step after whose action the task was solved
    seeds        int64 [E];  noise_std float32 [E];  noise_held bool [E]
    attempts     int64 [3]         episodes tried: no noise, white noise, held noise
    successes    int64 [3]         those that succeeded
    task, prompt str
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import platform
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from omega_qvla.envs.metaworld import (
    ACTION_DIM,
    TASKS,
    TRAIN_SEED_END,
    Expert,
    MetaWorldEnv,
    scripted_expert,
)
from omega_qvla.files import atomic_file, write_text

BLOCK_EPISODES = 25
#: Seeds reserved per block: failed episodes use some up without shifting other blocks.
BLOCK_SEEDS = 100
TAIL_STEPS = 8
NOISE_KINDS = ("none", "white", "held")


@dataclass(frozen=True)
class Job:
    """One shard to write."""

    task: str
    block: int
    episodes: int
    every: int
    size: int
    path: Path


@dataclass(frozen=True)
class Noise:
    """The disturbance of one episode. kind: index into NOISE_KINDS; std in action units."""

    kind: int
    std: float

    def draw(self, rng: np.random.Generator, steps: int) -> np.ndarray:
        """float64 [steps, 4]: zero, independent per step, or held for 1-8 steps in bursts."""
        if self.kind == 0:
            return np.zeros((steps, ACTION_DIM))
        if self.kind == 1:
            return rng.normal(0.0, self.std, (steps, ACTION_DIM))
        lengths = rng.integers(1, 9, steps)
        active = rng.random((steps, 1)) < 0.5
        values = rng.normal(0.0, self.std, (steps, ACTION_DIM)) * active
        held: np.ndarray = np.repeat(values, lengths, axis=0)[:steps]
        return held


def run_episode(
    env: MetaWorldEnv, expert: Expert, seed: int, noise: Noise, every: int
) -> dict[str, Any] | None:
    """Play one episode, rendering step 0 and every `every`-th; None if it did not succeed."""
    rng = np.random.default_rng([seed, 1])
    phase = int(rng.integers(every))
    disturbance = noise.draw(rng, env.max_steps + TAIL_STEPS)
    env.reset_state(seed)
    rendered: dict[str, list[Any]] = {k: [] for k in ("base", "wrist", "state", "raw", "step")}
    labels, executed = [], []
    success_step = -1
    for step in range(env.max_steps + TAIL_STEPS):
        if success_step < 0 and step >= env.max_steps:
            return None
        if success_step >= 0 and step > success_step + TAIL_STEPS:
            break
        if step == 0 or step % every == phase:
            observation = env.observe()
            rendered["base"].append(observation.images["base"])
            rendered["wrist"].append(observation.images["wrist"])
            rendered["state"].append(observation.state)
            rendered["raw"].append(env.raw_observation.astype(np.float32))
            rendered["step"].append(step)
        label = expert(env.raw_observation)
        action = np.clip(label + disturbance[step], -1.0, 1.0).astype(np.float32)
        result = env.step(action)
        labels.append(label)
        executed.append(action)
        if result.success and success_step < 0:
            success_step = step
    return {**rendered, "labels": labels, "executed": executed, "success_step": success_step}


def collect_block(job: Job) -> Path:
    """Fill one shard with successful episodes and write it."""
    env = MetaWorldEnv(job.task, size=job.size)
    expert = scripted_expert(job.task)
    kept: list[tuple[int, Noise, dict[str, Any]]] = []
    tried = np.zeros((2, len(NOISE_KINDS)), dtype=np.int64)
    for index in range(BLOCK_SEEDS):
        if len(kept) == job.episodes:
            break
        seed = job.block * BLOCK_SEEDS + index
        kind = index % len(NOISE_KINDS)
        std = np.random.default_rng([seed, 2]).uniform(0.2, 1.0) if kind else 0.0
        noise = Noise(kind, float(std))
        episode = run_episode(env, expert, seed, noise, job.every)
        tried[:, kind] += (1, episode is not None)
        if episode is not None:
            kept.append((seed, noise, episode))
    env.close()
    if len(kept) < job.episodes:
        raise RuntimeError(f"{job.path.name}: the expert succeeded in too few episodes: {tried}")
    _write(job, kept, tried)
    return job.path


def _write(job: Job, kept: list[tuple[int, Noise, dict[str, Any]]], tried: np.ndarray) -> None:
    episodes = [episode for _, _, episode in kept]

    def joined(key: str, dtype: type) -> np.ndarray:
        return np.concatenate([np.asarray(episode[key], dtype=dtype) for episode in episodes])

    arrays = {
        "images_base": joined("base", np.uint8),
        "images_wrist": joined("wrist", np.uint8),
        "state": joined("state", np.float32),
        "raw": joined("raw", np.float32),
        "step": joined("step", np.int32),
        "episode": np.repeat(
            np.arange(len(episodes), dtype=np.int32), [len(e["step"]) for e in episodes]
        ),
        "actions": joined("labels", np.float32),
        "executed": joined("executed", np.float32),
        "offsets": np.cumsum([0, *(len(e["labels"]) for e in episodes)], dtype=np.int64),
        "success_step": np.array([e["success_step"] for e in episodes], dtype=np.int32),
        "seeds": np.array([seed for seed, _, _ in kept], dtype=np.int64),
        "noise_std": np.array([noise.std for _, noise, _ in kept], dtype=np.float32),
        "noise_held": np.array([NOISE_KINDS[noise.kind] == "held" for _, noise, _ in kept]),
        "attempts": tried[0],
        "successes": tried[1],
        "task": np.array(job.task),
        "prompt": np.array(TASKS[job.task]),
    }
    with atomic_file(job.path) as file:
        np.savez(file, **arrays)


def plan(args: argparse.Namespace) -> Iterator[Job]:
    """The shards of a run, the first block of every task before the second of any."""
    for first in range(0, args.episodes, BLOCK_EPISODES):
        block, count = first // BLOCK_EPISODES, min(BLOCK_EPISODES, args.episodes - first)
        for task in args.tasks:
            path = args.out / f"{task}-{block:03d}.npz"
            yield Job(task, block, count, args.every, args.size, path)


def write_manifest(args: argparse.Namespace, jobs: list[Job]) -> None:
    """Describe the shards written so far in `manifest.json`."""
    tasks: dict[str, dict[str, Any]] = {}
    shards = [job for job in jobs if job.path.exists()]
    for job in shards:
        entry = tasks.setdefault(
            job.task,
            {"prompt": TASKS[job.task], "shards": [], "episodes": 0, "steps": 0, "images": 0,
             "attempts": [0, 0, 0], "successes": [0, 0, 0]},
        )  # fmt: skip
        with np.load(job.path) as shard:
            entry["shards"].append(job.path.name)
            entry["episodes"] += len(shard["seeds"])
            entry["steps"] += len(shard["actions"])
            entry["images"] += len(shard["step"])
            for key in ("attempts", "successes"):
                entry[key] = [a + int(b) for a, b in zip(entry[key], shard[key], strict=True)]
    manifest = {
        "size": args.size,
        "every": args.every,
        "complete": len(shards) == len(jobs),
        "noise_kinds": NOISE_KINDS,
        "versions": {name: version(name) for name in ("metaworld", "mujoco", "numpy")}
        | {"python": platform.python_version()},
        "tasks": tasks,
    }
    write_text(args.out / "manifest.json", json.dumps(manifest, indent=2) + "\n")


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """Command line of a collection run."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--episodes", type=int, default=150, help="successful ones per task")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--every", type=int, default=3, help="render every n-th step")
    parser.add_argument("--size", type=int, default=80, help="edge of an image in pixels")
    parser.add_argument("--tasks", nargs="+", choices=list(TASKS), default=list(TASKS))
    args = parser.parse_args(argv)
    if args.episodes // BLOCK_EPISODES * BLOCK_SEEDS >= TRAIN_SEED_END:
        parser.error("more episodes than training seeds")
    return args


def main(argv: list[str] | None = None) -> None:
    """Write the missing shards, `--workers` at a time."""
    args = parse_args(argv)
    args.out.mkdir(parents=True, exist_ok=True)
    jobs = list(plan(args))
    missing = [job for job in jobs if not job.path.exists()]
    context = multiprocessing.get_context("spawn")
    with context.Pool(args.workers) as pool:
        done = pool.imap_unordered(collect_block, missing)
        for _ in tqdm(done, total=len(jobs), initial=len(jobs) - len(missing), unit="shard"):
            write_manifest(args, jobs)
    write_manifest(args, jobs)


if __name__ == "__main__":
    main()
