"""A run that takes a few seconds, to be killed: python slow_run.py EXECUTOR FOLDER [ADDRESS]."""

from __future__ import annotations

import sys
from pathlib import Path

from omega_qvla.evaluation.cluster import RayCluster
from omega_qvla.evaluation.executor import InProcess, run_evaluation
from omega_qvla.evaluation.plan import Plan, episodes
from omega_qvla.evaluation.pool import ProcessPool
from omega_qvla.evaluation.records import Arm

EPISODES = 12


def main(kind: str, folder: Path, address: str | None = None) -> None:
    arms = tuple(Arm(label, str(folder / label), "toy") for label in ("full-precision", "omega"))
    plan = Plan(
        arms,
        episodes(["reach", "other"], range(EPISODES // 2)),
        env="tests.evaluation.fakes:SlowEnv",
        loader="tests.evaluation.fakes:load",
    )
    executor = {
        "process": InProcess(),
        "pool": ProcessPool(2),
        "ray": RayCluster(address=address, workers=2),
    }[kind]
    run_evaluation(plan, folder / "results.jsonl", executor=executor, progress=False)


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), *sys.argv[3:])
