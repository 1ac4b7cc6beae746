"""LIBERO in the simulator: an episode depends on its initial state and on nothing before it."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator

import numpy as np
import pytest

from omega_qvla.envs.libero import LiberoEnv
from omega_qvla.envs.libero_files import find_assets, has_substitutes
from omega_qvla.errors import EnvError

pytestmark = [pytest.mark.sim, pytest.mark.libero]


@pytest.fixture
def env(pytestconfig: pytest.Config) -> Iterator[LiberoEnv]:
    """A task of libero_object, on the assets of --libero-assets or those that are installed."""
    if importlib.util.find_spec("libero") is None:
        pytest.skip("hf-libero is not installed: pip install 'omega-qvla[libero]'")
    try:
        assets = find_assets(pytestconfig.getoption("--libero-assets"))
    except EnvError as error:
        pytest.skip(str(error))
    made = LiberoEnv("libero_object/0", assets=assets, substitutes=has_substitutes(assets))
    yield made
    made.close()


def play(env: LiberoEnv, seed: int) -> np.ndarray:
    """Where everything is after ten steps of closing the hand, float64 [n]."""
    env.reset_state(seed)
    for _ in range(10):
        env.step(np.array([0.3, 0.0, -0.5, 0.0, 0.0, 0.2, 1.0]))
    return np.concatenate([np.ravel(env.raw_observation[key]) for key in env.raw_observation])


def test_an_episode_does_not_depend_on_the_one_before(env: LiberoEnv) -> None:
    first, other = play(env, 0), play(env, 3)
    assert not np.array_equal(first, other)
    assert np.array_equal(first, play(env, 0))


def test_bad_actions_and_states_are_refused(env: LiberoEnv) -> None:
    with pytest.raises(EnvError, match=r"shape \(4,\), expected \(7,\)"):
        env.step(np.zeros(4))
    with pytest.raises(EnvError, match="not finite"):
        env.step(np.full(7, np.nan))
    with pytest.raises(EnvError, match="has 50 initial states"):
        env.reset_state(50)
