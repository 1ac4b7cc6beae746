"""Evaluate on two Ray nodes and kill one: python lost_node.py FOLDER; prints what happened."""

from __future__ import annotations

import json
import os
import sys
import threading
import time
from pathlib import Path

os.environ.setdefault("RAY_raylet_start_wait_time_s", "180")  # read by Ray when it is imported

import ray
from ray.cluster_utils import Cluster

from omega_qvla.evaluation.cluster import RayCluster
from omega_qvla.evaluation.executor import run_evaluation
from omega_qvla.evaluation.plan import Plan, episodes
from omega_qvla.evaluation.records import Arm


def lines(out: Path) -> int:
    return out.read_bytes().count(b"\n") - 1 if out.exists() else 0


def alive() -> int:
    return sum(node["Alive"] for node in ray.nodes())


def main(folder: Path) -> None:
    # One CPU on the first node, two on the second: simulators must be on the one to be lost.
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1})
    doomed = cluster.add_node(num_cpus=2)
    ray.init(address=cluster.address, log_to_driver=False)
    plan = Plan(
        (Arm("full-precision", str(folder / "full-precision"), "toy"),),
        episodes(["reach", "other"], range(12)),
        env="tests.evaluation.fakes:SlowEnv",
        loader="tests.evaluation.fakes:load",
    )
    out = folder / "ray.jsonl"
    told = {"nodes_before": alive()}

    def lose() -> None:
        while lines(out) < 4:
            time.sleep(0.005)
        free = ray._private.state.available_resources_per_node()[doomed.node_id]
        told["on_lost_node"] = 2 - int(free.get("CPU", 0))
        told["done_before"] = lines(out)
        cluster.remove_node(doomed, allow_graceful=False)

    thread = threading.Thread(target=lose, daemon=True)
    thread.start()
    executor = RayCluster(address=cluster.address, workers=3, startup_s=120)
    records = run_evaluation(plan, out, executor=executor, progress=False)
    thread.join(60)
    deadline = time.monotonic() + 60  # the head may hear of the death after the last episode
    while alive() > 1 and time.monotonic() < deadline:
        time.sleep(0.1)
    told |= {
        "records": len(records),
        "nodes_after": alive(),
        "same": [r.outcome() for r in records]
        == [
            r.outcome()
            for r in run_evaluation(plan, folder / "inline.jsonl", workers=0, progress=False)
        ],
    }
    ray.shutdown()
    cluster.shutdown()
    print(json.dumps(told))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
