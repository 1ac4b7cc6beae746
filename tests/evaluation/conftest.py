"""Ray, for the tests that need it."""

import os
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="session")
def ray():
    """Ray on this machine, once for all tests: starting it takes seconds."""
    found = pytest.importorskip("ray", reason="Ray is not installed: pip install '.[cluster]'")
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    path = f"{ROOT}:{os.environ.get('PYTHONPATH', '')}"
    found.init(
        address="local",
        num_cpus=4,
        include_dashboard=False,
        log_to_driver=False,
        runtime_env={"env_vars": {"PYTHONPATH": path}},
    )
    yield found
    found.shutdown()
