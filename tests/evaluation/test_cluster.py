import os
import signal
import time
from pathlib import Path

import pytest

from omega_qvla.errors import BackendError, ConfigError, EvaluationError
from omega_qvla.evaluation import cluster
from omega_qvla.evaluation.cluster import RayCluster
from omega_qvla.evaluation.executor import load_trace
from omega_qvla.evaluation.records import Arm, Episode
from omega_qvla.evaluation.results import read_results

from .test_executor import EPISODES, arms, importable_from_workers, outcomes, plan, run

__all__ = ["arms", "importable_from_workers"]  # fixtures


@pytest.fixture(scope="module")
def ray():
    """Ray on this machine, once for all tests: starting it takes seconds."""
    found = pytest.importorskip("ray", reason="Ray is not installed: pip install '.[cluster]'")
    root = str(Path(__file__).resolve().parents[2])
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    found.init(
        address="local",
        num_cpus=8,
        include_dashboard=False,
        log_to_driver=False,
        runtime_env={"env_vars": {"PYTHONPATH": f"{root}:{os.environ.get('PYTHONPATH', '')}"}},
    )
    yield found
    found.shutdown()


@pytest.mark.ray
def test_the_same_records_as_in_one_process(ray, arms, tmp_path):
    inline = run(plan(arms), tmp_path / "a.jsonl", workers=0)
    spread = run(plan(arms), tmp_path / "b.jsonl", executor=RayCluster(workers=2))
    assert outcomes(spread) == outcomes(inline)
    for arm in arms:  # by one policy actor, however many simulators ask it
        assert len(Path(f"{arm.checkpoint}.loads").read_text().splitlines()) == 2
