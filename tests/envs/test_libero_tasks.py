"""Every task of the four suites: constructs, takes its 50 initial states, steps and renders."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest

from omega_qvla.envs.libero_files import has_substitutes
from omega_qvla.envs.libero_protocol import SUITES

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "libero_tasks.py"


@pytest.fixture(scope="module")
def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("libero_tasks", SCRIPT)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.sim
@pytest.mark.libero
@pytest.mark.slow
@pytest.mark.parametrize("number", range(10))
@pytest.mark.parametrize("suite", SUITES[:4])
def test_a_task_takes_its_initial_states(
    suite: str, number: int, script: ModuleType, assets: Path
) -> None:
    found = script.check_task(f"{suite}/{number}", assets, has_substitutes(assets))
    assert found["states"] == 50
    assert found["task"].startswith(suite)
