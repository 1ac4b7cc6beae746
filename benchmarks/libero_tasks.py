"""Every LIBERO task constructs, loads its initial states, steps and renders; how long that takes.

    python benchmarks/libero_tasks.py --assets DIR --out docs/results/libero/tasks.jsonl

One JSON line per task, appended as it is finished: a run goes on where it stopped. In each of
the shipped initial states one step is simulated, and must leave finite positions and a task
that is not solved yet.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from omega_qvla.envs.libero import NO_OP, LiberoEnv
from omega_qvla.envs.libero_files import initial_states, split_task, suite_tasks
from omega_qvla.envs.libero_protocol import SUITES

STEPS = 20


def check_task(task: str, assets: Path | None, substitutes: bool) -> dict[str, Any]:
    """Construct, reset, load every initial state, step, render. Times in wall seconds.

    Raises:
        RuntimeError: a state does not fit the scene, is solved at once, or is not finite.
    """
    start = time.perf_counter()
    env = LiberoEnv(task, assets=assets, substitutes=substitutes)
    constructed = time.perf_counter()
    env.reset_state(0)
    reset = time.perf_counter()
    states = check_states(env)
    stepping = time.perf_counter()
    for _ in range(STEPS):
        env.step(np.array(NO_OP))
    rendering = time.perf_counter()
    images = env.observe().images
    end = time.perf_counter()
    if not all(image.std() > 5 for image in images.values()):
        raise RuntimeError(f"{task}: an empty picture")
    env.close()
    return {
        "task": task,
        "states": states,
        "construct_s": round(constructed - start, 2),
        "reset_s": round(reset - constructed, 2),
        "step_ms": round(1000 * (rendering - stepping) / STEPS, 1),
        "render_ms": round(1000 * (end - rendering), 1),
        "camera_size": env.protocol.camera_size,
    }


def check_states(env: LiberoEnv) -> int:
    """Load each shipped initial state and simulate one step; returns how many there are."""
    sim = env.simulator.sim
    states = initial_states(*split_task(env.task))
    for index, state in enumerate(states):
        sim.set_state_from_flattened(state)
        sim.forward()
        if not np.array_equal(sim.get_state().flatten(), state):
            raise RuntimeError(f"{env.task}: initial state {index} does not fit the scene")
        solved = env.step(np.array(NO_OP)).success
        if solved or not np.isfinite(sim.get_state().flatten()).all():
            raise RuntimeError(f"{env.task}: initial state {index} is solved or not finite")
    return len(states)


def main(argv: list[str] | None = None) -> None:
    """Check the tasks that the file does not hold yet."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--assets", type=Path)
    parser.add_argument("--substitutes", action="store_true")
    parser.add_argument("--suites", nargs="+", choices=SUITES, default=list(SUITES[:4]))
    args = parser.parse_args(argv)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    done = set()
    if args.out.exists():
        done = {json.loads(line)["task"] for line in args.out.read_text().splitlines()}
    for task in tqdm([task for suite in args.suites for task in suite_tasks(suite)], unit="task"):
        if task not in done:
            line = json.dumps(check_task(task, args.assets, args.substitutes))
            with args.out.open("a") as file:
                file.write(line + "\n")


if __name__ == "__main__":
    main()
