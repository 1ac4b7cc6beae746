"""Collect demonstrations of LIBERO's scripted expert: noisy visits, clean labels, resumable.

    python training/collect_libero.py --out DIR --suite libero_object --episodes 50 \
        --assets DIR --substitutes

Episodes begin where the task's definition places things, never at a shipped initial state:
those are for evaluation. In two of three, noise is added to the hand's motion that is executed,
while the recorded label stays the expert's action at the state visited (DART). One file per
episode, written atomically and skipped when present; blocks interleave the tasks, so that
training can start on what is there.

Pictures are rendered as the published protocols have it, and stored as the policy's own
preprocessing shrinks them: what is trained on equals what an evaluation shows to the network.

A file `<suite>-<task>-<episode>.npz` has the arrays of a shard of `collect.py` with one episode,
and is read by `data.py`. What differs (n rendered steps, T steps):
    rendered int64            edge of the pictures before they were shrunk to IMAGE_SIZE
    state    float32 [n, 8]   hand position, rotation as axis times angle, both fingers
    raw      float32 [n, 7]   hand position, opening between the fingers, the object's position
    actions  float32 [T, 7]   labels;  executed  float32 [T, 7]
    first    int64            number of the episode within its task
    seed, attempts            the start that was played; starts tried up to then
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from configs import IMAGE_SIZE
from omega_qvla.envs.libero import LiberoEnv
from omega_qvla.envs.libero_files import suite_tasks
from omega_qvla.envs.libero_oracle import PickAndPlace, oracle
from omega_qvla.envs.libero_protocol import SUITES, libero_protocol
from omega_qvla.evaluation.environment import versions
from omega_qvla.files import atomic_file, write_text
from omega_qvla.policies.images import resize_with_pad

#: Starts reserved per episode: failures use some up without shifting other episodes.
STARTS = 10
BLOCK = 5
#: Actions; the expert's own motions saturate at 1.
NOISE = (0.1, 0.4)
ABOUT = ("first", "seed", "attempts", "prompt", "rendered")
PROTOCOL = Path(__file__).with_name("libero.yaml")


@dataclass(frozen=True)
class Job:
    """Episodes of one task that are still to be written, by their numbers.

    number: of the task within its suite;  options: those of LiberoEnv.
    """

    task: str
    number: int
    episodes: tuple[int, ...]
    every: int
    options: dict[str, Any]
    out: Path

    def path(self, episode: int) -> Path:
        """Where an episode lies."""
        suite = self.task.partition("/")[0]
        return self.out / f"{suite}-{self.number}-{episode:04d}.npz"


def disturbance(rng: np.random.Generator, kind: int, steps: int) -> np.ndarray:
    """float64 [steps, 7]: none (0), independent (1), or held for 1-8 steps in bursts (2)."""
    std = rng.uniform(*NOISE)
    noise = np.zeros((steps, 7))
    if kind == 1:
        noise[:, :6] = rng.normal(0.0, std, (steps, 6))
    elif kind == 2:
        values = rng.normal(0.0, std, (steps, 6)) * (rng.random((steps, 1)) < 0.5)
        noise[:, :6] = np.repeat(values, rng.integers(1, 9, steps), axis=0)[:steps]
    noise[:, 3:6] *= 0.3
    return noise


def shrunk(image: np.ndarray) -> np.ndarray:
    """uint8 [size, size, 3] -> [IMAGE_SIZE, IMAGE_SIZE, 3], as pi0.5's processor does it."""
    small: np.ndarray = resize_with_pad(torch.from_numpy(image.copy()), IMAGE_SIZE).numpy()
    return small


def run_episode(
    env: LiberoEnv, expert: PickAndPlace, seed: int, kind: int, every: int
) -> dict[str, Any] | None:
    """Play one start, rendering step 0 and every `every`-th; None if it was not solved."""
    rng = np.random.default_rng([seed, 1])
    phase = int(rng.integers(every))
    noise = disturbance(rng, kind, env.max_steps)
    env.sample_state(seed)
    expert.begin()
    target = env.simulator.obj_of_interest[0]
    found: dict[str, list[Any]] = {k: [] for k in ("base", "wrist", "state", "raw", "step")}
    found |= {"labels": [], "executed": []}
    for step in range(env.max_steps):
        if step == 0 or step % every == phase:
            observation = env.observe()
            raw = env.raw_observation
            opening = [np.ptp(raw["robot0_gripper_qpos"])]
            for camera in ("base", "wrist"):
                found[camera].append(shrunk(observation.images[camera]))
            found["state"].append(observation.state)
            found["raw"].append(
                np.concatenate([raw["robot0_eef_pos"], opening, raw[f"{target}_pos"]])
            )
            found["step"].append(step)
        label = expert.act()
        action = np.clip(label + noise[step], -1.0, 1.0)
        found["labels"].append(label)
        found["executed"].append(action)
        if env.step(action).success:
            return found
    return None


def collect(job: Job) -> int:
    """Write the job's episodes; returns how many.

    Raises:
        RuntimeError: the expert failed from every start that an episode has.
    """
    torch.set_num_threads(1)
    env = LiberoEnv(job.task, **job.options)
    expert = oracle(env)
    for episode in job.episodes:
        for attempt in range(STARTS):
            seed = episode * STARTS + attempt
            found = run_episode(env, expert, seed, episode % 3, job.every)
            if found is not None:
                break
        else:
            raise RuntimeError(f"{job.path(episode).name}: failed from {STARTS} starts")
        found |= {"first": episode, "seed": seed, "attempts": attempt + 1, "prompt": env.prompt}
        found["rendered"] = env.protocol.camera_size
        _write(job.path(episode), job.task, found)
    env.close()
    return len(job.episodes)


def _write(path: Path, task: str, found: dict[str, Any]) -> None:
    arrays = {
        "images_base": np.array(found["base"], np.uint8),
        "images_wrist": np.array(found["wrist"], np.uint8),
        "state": np.array(found["state"], np.float32),
        "raw": np.array(found["raw"], np.float32),
        "step": np.array(found["step"], np.int32),
        "episode": np.zeros(len(found["step"]), np.int32),
        "actions": np.array(found["labels"], np.float32),
        "executed": np.array(found["executed"], np.float32),
        "offsets": np.array([0, len(found["labels"])], np.int64),
        **{key: np.array(found[key]) for key in ABOUT},
        "task": np.array(task),
    }
    with atomic_file(path) as file:
        np.savez_compressed(file, **arrays)


def plan(args: argparse.Namespace) -> Iterator[Job]:
    """What is missing, in blocks: the first block of every task before the second of any."""
    options = {
        "protocol": libero_protocol(args.protocol).to_dict(),
        "assets": args.assets and str(args.assets),
        "substitutes": args.substitutes,
    }
    names = suite_tasks(args.suite)
    for first in range(0, args.episodes, BLOCK):
        block = tuple(range(first, min(first + BLOCK, args.episodes)))
        for number in args.tasks or range(len(names)):
            job = Job(names[number], number, block, args.every, options, args.out)
            missing = tuple(episode for episode in block if not job.path(episode).exists())
            yield replace(job, episodes=missing)


def write_manifest(out: Path, options: dict[str, Any]) -> None:
    """Describe what is there in `manifest.json`: protocol, assets, versions, counts by task."""
    tasks: dict[str, dict[str, int]] = {}
    for path in sorted(out.glob("*.npz")):
        with np.load(path) as file:
            entry = tasks.setdefault(
                str(file["task"]), {"episodes": 0, "attempts": 0, "steps": 0, "images": 0}
            )
            entry["episodes"] += 1
            entry["attempts"] += int(file["attempts"])
            entry["steps"] += len(file["actions"])
            entry["images"] += len(file["step"])
    manifest = LiberoEnv.fingerprint(**options) | {"versions": versions("libero"), "tasks": tasks}
    write_text(out / "manifest.json", json.dumps(manifest, indent=2) + "\n")


def main(argv: list[str] | None = None) -> None:
    """Write the missing episodes, `--workers` at a time."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--suite", choices=SUITES, default="libero_object")
    parser.add_argument("--tasks", type=int, nargs="+", help="numbers within the suite")
    parser.add_argument("--episodes", type=int, default=50, help="per task")
    parser.add_argument("--every", type=int, default=3, help="render every n-th step")
    parser.add_argument("--protocol", default=str(PROTOCOL), help="name, or a YAML file")
    parser.add_argument("--assets", type=Path)
    parser.add_argument("--substitutes", action="store_true")
    parser.add_argument("--workers", type=int, default=2)
    args = parser.parse_args(argv)
    args.out.mkdir(parents=True, exist_ok=True)
    jobs = list(plan(args))
    missing = [job for job in jobs if job.episodes]
    total = args.episodes * len(args.tasks or suite_tasks(args.suite))
    there = total - sum(len(job.episodes) for job in missing)
    with (
        multiprocessing.get_context("spawn").Pool(args.workers) as pool,
        tqdm(total=total, initial=there, unit="episode") as bar,
    ):
        for written in pool.imap_unordered(collect, missing):
            bar.update(written)
    write_manifest(args.out, jobs[0].options)


if __name__ == "__main__":
    main()
