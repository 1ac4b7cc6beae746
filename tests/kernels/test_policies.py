"""Whole policies: the bundled ones act the same to the last bit, emulated or native."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from omega_qvla.calibration.samples import ObservationSet, SampleMeta
from omega_qvla.config.presets import resolve_recipe
from omega_qvla.kernels.cpu import isa_names
from omega_qvla.policies.observation import Observation
from omega_qvla.policies.registry import load_policy
from omega_qvla.quantize import quantize_policy
from omega_qvla.runtime.engine import Engine

ASSETS = Path(__file__).resolve().parents[2] / "assets"
CHECKPOINTS = ("pi05-metaworld", "groot-n15-metaworld")
INSTRUCTIONS = ("open the drawer", "push the red button", "close the window")
RECIPES = ("omega", "omega+unsigned", "omega+signed-weights+weight-group-64")
SLOW = pytest.param(60, marks=pytest.mark.slow)

pytestmark = pytest.mark.skipif(not isa_names(), reason="the native kernels are not built here")


def observations(count: int) -> list[Observation]:
    """Smooth random images, so that the vision tower sees something like a picture."""
    rng = np.random.default_rng(1)
    made = []
    for i in range(count):
        coarse = rng.integers(0, 256, (2, 5, 5, 3), dtype=np.uint8)
        images = coarse.repeat(16, axis=1).repeat(16, axis=2)
        state = rng.normal(0.0, 0.3, 4).astype(np.float32)
        views = dict(zip(("base", "wrist"), images, strict=True))
        made.append(Observation(views, state, INSTRUCTIONS[i % 3]))
    return made


@pytest.fixture(scope="module")
def packs(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, str], Path]:
    """The recipes, unsigned and signed, of each bundled policy, from four observations."""
    few = observations(4)
    source = ObservationSet(tuple(few), tuple(SampleMeta(i, 0) for i in range(4)), "random")
    made = {}
    for name in CHECKPOINTS:
        policy, folder = load_policy(ASSETS / name), tmp_path_factory.mktemp(name)
        for recipe in RECIPES:
            out = made[name, recipe] = folder / f"{recipe}.safetensors"
            quantize_policy(policy, resolve_recipe(recipe), source, out=out)
    return made


@pytest.mark.parametrize("count", [3, SLOW])
@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("name", CHECKPOINTS)
def test_actions_are_the_same_bits(
    name: str, recipe: str, threads: int, count: int, packs: dict[tuple[str, str], Path]
) -> None:
    pack = packs[name, recipe]
    emulated = Engine.load(ASSETS / name, pack, backend="emulated")
    native = Engine.load(ASSETS / name, pack, backend="native")
    torch.set_num_threads(threads)
    try:
        for seed, observation in enumerate(observations(count)):
            expected = emulated.infer(observation, seed=seed)
            np.testing.assert_array_equal(native.infer(observation, seed=seed), expected)
    finally:
        torch.set_num_threads(1)
