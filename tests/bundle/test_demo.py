"""The two trained policies that come with the repository, as bundles."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from omega_qvla.bundle import BundleOptions, write_bundle
from omega_qvla.calibration import ObservationSet
from omega_qvla.config import preset
from omega_qvla.envs.metaworld import TASKS
from omega_qvla.policies.observation import Observation
from omega_qvla.policies.registry import load_policy
from omega_qvla.quantize import quantize_policy
from omega_qvla.runtime.engine import Engine

ASSETS = Path(__file__).resolve().parents[2] / "assets"


@pytest.mark.parametrize("name", ["pi05-metaworld", "groot-n15-metaworld"])
def test_a_trained_policy_acts_the_same_from_its_bundle(name: str, tmp_path: Path) -> None:
    policy = load_policy(ASSETS / name)
    pack = tmp_path / "rtn.safetensors"  # needs no observations
    quantize_policy(policy, preset("rtn"), ObservationSet((), ()), out=pack)
    options = BundleOptions(bake_steps=policy.num_steps)
    manifest = write_bundle(ASSETS / name, pack, tmp_path / "bundle", options)
    assert manifest.total_bytes < 0.6 * (ASSETS / name / "model.safetensors").stat().st_size
    rng = np.random.default_rng(0)
    images = {c: rng.integers(0, 256, (80, 80, 3), dtype=np.uint8) for c in policy.cameras}
    state = np.array([0.0, 0.6, 0.2, 0.5], np.float32)
    observation = Observation(images, state, next(iter(TASKS.values())))
    expected = Engine.load(ASSETS / name, pack).infer(observation, seed=1)
    found = Engine.load(tmp_path / "bundle").infer(observation, seed=1)
    np.testing.assert_array_equal(found, expected)
