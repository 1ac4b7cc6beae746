"""Meta-World: seeds decide everything, actions are checked, images show the episode."""

from __future__ import annotations

import hashlib
import importlib.util
import os
import subprocess
import sys
from collections.abc import Iterator

import numpy as np
import pytest

from omega_qvla.envs.metaworld import (
    EVAL_SEED_START,
    MAX_STEPS,
    TASKS,
    TRAIN_SEED_END,
    MetaWorldEnv,
    eval_seeds,
    scripted_expert,
)
from omega_qvla.errors import EnvError

_STATE_OF_SEED = """
import hashlib, sys
from omega_qvla.envs.metaworld import MetaWorldEnv
env = MetaWorldEnv("window-close", size=32)
image = env.reset(11).images["base"]
print(env.raw_observation.tobytes().hex(), hashlib.sha256(image.tobytes()).hexdigest())
"""


def _need_simulator() -> None:
    if importlib.util.find_spec("metaworld") is None:
        pytest.skip("metaworld is not installed")


@pytest.fixture
def env() -> Iterator[MetaWorldEnv]:
    """A small window: the task whose reset leaves stale geometry behind."""
    _need_simulator()
    made = MetaWorldEnv("window-close", size=32)
    yield made
    made.close()


def test_importing_the_module_imports_no_simulator() -> None:
    code = (
        "import os, sys; before = dict(os.environ); import omega_qvla.envs.metaworld;"
        "assert not {'mujoco', 'metaworld'} & set(sys.modules); assert before == dict(os.environ)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_evaluation_seeds_are_disjoint_from_training_seeds() -> None:
    assert TRAIN_SEED_END <= EVAL_SEED_START
    assert list(eval_seeds(3, start=2)) == [EVAL_SEED_START + i for i in (2, 3, 4)]


@pytest.mark.parametrize("make", [MetaWorldEnv, scripted_expert])
def test_an_unknown_task_is_named(make: type[MetaWorldEnv]) -> None:
    with pytest.raises(EnvError, match=r"juggle.*known: button-press"):
        make("juggle")


@pytest.mark.sim
def test_a_seed_gives_the_same_state_in_every_process(env: MetaWorldEnv) -> None:
    env.reset(5)
    for _ in range(20):
        env.step(np.array([0.3, 1.0, -0.5, 1.0]))
    image = env.reset(11).images["base"]
    here = f"{env.raw_observation.tobytes().hex()} {hashlib.sha256(image.tobytes()).hexdigest()}"
    fresh = subprocess.run(
        [sys.executable, "-c", _STATE_OF_SEED], check=True, capture_output=True, text=True
    )
    assert fresh.stdout.strip() == here


@pytest.mark.sim
def test_different_seeds_place_the_object_elsewhere(env: MetaWorldEnv) -> None:
    first, second = env.reset(1).images["base"], env.reset(2).images["base"]
    assert (first != second).any()


@pytest.mark.sim
def test_closing_one_environment_leaves_the_other_its_images(env: MetaWorldEnv) -> None:
    other = MetaWorldEnv("door-open", size=32)
    other.reset(0)
    before = env.reset(0).images
    other.close()
    after = env.observe().images
    assert all(np.array_equal(before[name], after[name]) for name in env.cameras)


@pytest.mark.sim
def test_mujoco_imported_beforehand_renders_all_the_same() -> None:
    _need_simulator()
    environment = {k: v for k, v in os.environ.items() if k not in ("MUJOCO_GL", "DISPLAY")}
    code = "import mujoco\n" + _STATE_OF_SEED
    subprocess.run([sys.executable, "-c", code], check=True, env=environment)


@pytest.mark.sim
def test_observation_has_the_promised_shapes(env: MetaWorldEnv) -> None:
    observation = env.reset(0)
    assert tuple(observation.images) == env.cameras == ("base", "wrist")
    for image in observation.images.values():
        assert image.shape == (32, 32, 3) and image.dtype == np.uint8 and image.std() > 10
    assert observation.state.shape == (env.state_dim,)
    assert observation.state.dtype == np.float32
    assert observation.prompt == TASKS["window-close"]
    assert env.frame(96).shape == (96, 96, 3)


@pytest.mark.sim
def test_the_first_image_shows_the_new_episode(env: MetaWorldEnv) -> None:
    env.reset(1)
    first = env.reset(2).images["base"]
    assert np.array_equal(first, env.observe().images["base"])
    raw = env.raw_observation
    assert np.allclose(raw[4:7], env._sim._get_pos_objects())


@pytest.mark.sim
@pytest.mark.parametrize(
    ("action", "message"),
    [
        (np.zeros(3), r"shape \(3,\), expected \(4,\)"),
        (np.zeros((1, 4)), r"shape \(1, 4\)"),
        (np.array([0.0, np.nan, 0.0, 0.0]), "not finite"),
    ],
)
def test_a_bad_action_is_refused(env: MetaWorldEnv, action: np.ndarray, message: str) -> None:
    env.reset(0)
    with pytest.raises(EnvError, match=message):
        env.step(action)


@pytest.mark.sim
def test_actions_are_clipped(env: MetaWorldEnv) -> None:
    ends = []
    for scale in (1.0, 50.0):
        env.reset(0)
        for _ in range(5):
            env.step(np.full(4, scale))
        ends.append(env.raw_observation)
    assert np.array_equal(ends[0], ends[1])


@pytest.mark.sim
def test_an_idle_episode_ends_unsolved(env: MetaWorldEnv) -> None:
    env.reset(0)
    results = [env.step(np.zeros(4)) for _ in range(MAX_STEPS)]
    assert not any(result.success for result in results)
    assert [result.done for result in results[-2:]] == [False, True]


@pytest.mark.sim
@pytest.mark.parametrize("task", TASKS)
def test_the_expert_solves_held_out_episodes(task: str) -> None:
    _need_simulator()
    env, expert = MetaWorldEnv(task), scripted_expert(task)
    for seed in eval_seeds(2):
        env.reset_state(seed)
        for _ in range(MAX_STEPS):
            action = expert(env.raw_observation)
            assert action.dtype == np.float32 and np.abs(action).max() <= 1
            if (result := env.step(action)).done:
                break
        assert result.success
    env.close()
