"""LIBERO in the simulator: bit for bit its own loop's states and pictures, in any order."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from omega_qvla.envs.libero import CAMERAS, NO_OP, LiberoEnv
from omega_qvla.envs.libero_files import (
    has_substitutes,
    import_libero,
    initial_states,
    libero_root,
    split_task,
)
from omega_qvla.envs.libero_protocol import PROTOCOLS, LiberoProtocol, StepCaps
from omega_qvla.errors import EnvError

from .conftest import Make

pytestmark = [pytest.mark.sim, pytest.mark.libero]

MOVE = np.array([0.3, 0.0, -0.5, 0.0, 0.0, 0.2, 1.0])


@pytest.fixture(scope="module")
def env(assets: Path, quick: LiberoProtocol) -> Iterator[LiberoEnv]:
    """One environment for all tests: what an episode is must not depend on those before it."""
    flag = has_substitutes(assets)
    made = LiberoEnv("libero_object/0", protocol=quick, assets=assets, substitutes=flag)
    yield made
    made.close()


def state(env: LiberoEnv) -> np.ndarray:
    data = env.simulator.sim.data
    return np.concatenate([data.qpos, data.qvel])


def play(env: LiberoEnv, seed: int, steps: int = 5) -> np.ndarray:
    env.reset_state(seed)
    for _ in range(steps):
        env.step(MOVE)
    return state(env)


# libero_object has no fixtures; the other has a cabinet, a stove, and a drawer that is drawn open.
@pytest.mark.parametrize(("task", "trial"), [("libero_object/3", 1), ("libero_spatial/4", 3)])
def test_states_and_pictures_are_those_of_liberos_own_loop(
    task: str, trial: int, assets: Path, make: Make, quick: LiberoProtocol
) -> None:
    suite, name = split_task(task)
    own = import_libero(assets).OffScreenRenderEnv(
        bddl_file_name=str(libero_root() / "bddl_files" / suite / f"{name}.bddl"),
        camera_heights=quick.camera_size,
        camera_widths=quick.camera_size,
    )
    before = np.random.get_state()
    own.seed(quick.seed)
    for index in range(trial + 1):  # as openpi's script: reset once per trial
        own.reset()
        theirs = own.set_init_state(initial_states(suite, name)[index])
    np.random.set_state(before)
    for _ in range(quick.settle_steps):
        theirs, _, _, _ = own.step(list(NO_OP))
    env = make(task)
    env.reset_state(0)
    ours = env.reset(trial)
    for action in np.random.default_rng(0).uniform(-1, 1, (4, 7)):
        data = own.sim.data
        assert np.array_equal(state(env), np.concatenate([data.qpos, data.qvel]))
        for key, camera in CAMERAS.items():
            assert np.array_equal(ours.images[key], theirs[f"{camera}_image"][::-1, ::-1]), key
        hand = np.concatenate([theirs["robot0_eef_pos"], theirs["robot0_gripper_qpos"]])
        assert np.array_equal(ours.state[[0, 1, 2, 6, 7]], hand.astype(np.float32))
        theirs, _, solved, _ = own.step(action.tolist())
        assert env.step(action).success == solved
        ours = env.observe()
    own.close()


def test_an_episode_does_not_depend_on_the_one_before(env: LiberoEnv) -> None:
    first, other = play(env, 0), play(env, 3)
    assert not np.array_equal(first, other)
    assert np.array_equal(first, play(env, 0))


def test_numpys_generator_is_left_as_it_was(env: LiberoEnv) -> None:
    np.random.seed(1)
    before = np.random.get_state()[1]
    env.reset_state(0)
    assert np.array_equal(before, np.random.get_state()[1])


def test_nothing_is_rendered_until_somebody_asks(
    env: LiberoEnv, monkeypatch: pytest.MonkeyPatch
) -> None:
    rendered = []
    render = type(env.simulator.sim).render
    monkeypatch.setattr(
        type(env.simulator.sim), "render", lambda *a, **k: rendered.append(k) or render(*a, **k)
    )
    play(env, 0, steps=3)
    assert not rendered
    env.observe()
    assert [call["camera_name"] for call in rendered] == list(CAMERAS.values())


def test_observing_changes_no_state(env: LiberoEnv) -> None:
    undisturbed = play(env, 0, steps=4)
    env.reset(0)
    for _ in range(4):
        env.observe()
        env.step(MOVE)
    assert np.array_equal(undisturbed, state(env))


def test_two_environments_in_one_process_keep_their_pictures_apart(
    env: LiberoEnv, make: Make
) -> None:
    alone = env.reset(0).images
    other = make("libero_object/1")
    other.reset(0)
    assert all(np.array_equal(alone[key], env.observe().images[key]) for key in env.cameras)
    other.close()
    assert all(np.array_equal(alone[key], env.observe().images[key]) for key in env.cameras)


def test_observation_has_the_promised_shapes(env: LiberoEnv) -> None:
    observation = env.reset(0)
    assert tuple(observation.images) == env.cameras == ("base", "wrist")
    for image in observation.images.values():
        assert image.shape == (96, 96, 3) and image.dtype == np.uint8 and image.std() > 10
    assert observation.state.shape == (env.state_dim,) and observation.state.dtype == np.float32
    assert observation.prompt == "pick up the alphabet soup and place it in the basket"
    assert env.frame(64).shape == (64, 64, 3)
    # The policy's picture is the person's, mirrored.
    assert np.array_equal(env.frame(96)[:, ::-1], observation.images["base"])


def test_fast_rendering_is_another_picture_of_the_same_state(
    env: LiberoEnv, make: Make, quick: LiberoProtocol
) -> None:
    full, here = env.reset(0), state(env)
    fast = make(protocol=replace(quick, rendering="fast"))
    lean = fast.reset(0)
    assert np.array_equal(here, state(fast)) and np.array_equal(full.state, lean.state)
    for key in env.cameras:
        difference = np.abs(full.images[key].astype(int) - lean.images[key])
        assert 0 < difference.mean() < 40, key
    fast.reset(1)  # makes a new GL context
    again = fast.reset(0)
    assert all(np.array_equal(again.images[key], lean.images[key]) for key in env.cameras)


def test_unturned_pictures_lie_as_the_renderer_gives_them(
    env: LiberoEnv, make: Make, quick: LiberoProtocol
) -> None:
    turned = env.reset(0)
    plain = make(protocol=replace(quick, rotate=False), cameras={"front": "agentview"})
    raw = plain.reset(0)
    assert list(raw.images) == ["front"]
    assert np.array_equal(raw.images["front"][::-1, ::-1], turned.images["base"])


def test_one_opens_in_the_convention_of_open_01(env: LiberoEnv, quick: LiberoProtocol) -> None:
    def fingers(protocol: LiberoProtocol, gripper: float) -> np.ndarray:
        env.protocol = protocol
        env.reset_state(0)
        for _ in range(3):
            env.step(np.array([0, 0, 0, 0, 0, 0, gripper]))
        return state(env)

    other = replace(quick, gripper="open-01")
    try:
        for theirs, ours in ((0.8, -1.0), (0.0, 1.0)):
            assert np.array_equal(fingers(other, theirs), fingers(quick, ours))
    finally:
        env.protocol = quick


def test_the_protocol_ends_the_episode(make: Make, quick: LiberoProtocol) -> None:
    capped = make(protocol=replace(quick, caps=StepCaps(libero_object=3)))
    capped.reset_state(0)
    results = [capped.step(MOVE) for _ in range(3)]
    assert [result.done for result in results] == [False, False, True]
    assert not any(result.success for result in results)


@pytest.mark.parametrize(
    ("action", "message"),
    [
        (np.zeros(4), r"shape \(4,\), expected \(7,\)"),
        (np.zeros((1, 7)), r"shape \(1, 7\)"),
        (np.full(7, np.nan), "not finite"),
        (np.full(7, np.inf), "not finite"),
    ],
)
def test_a_bad_action_is_refused_and_moves_nothing(
    env: LiberoEnv, action: np.ndarray, message: str
) -> None:
    before = state(env)
    with pytest.raises(EnvError, match=message):
        env.step(action)
    assert np.array_equal(before, state(env))


def test_an_initial_state_that_is_not_there_is_named(env: LiberoEnv) -> None:
    with pytest.raises(EnvError, match="has 50 initial states; seed 50 with offset 0"):
        env.reset_state(50)


def test_a_wrong_camera_is_named(make: Make) -> None:
    with pytest.raises(EnvError, match=r"no camera .front.; it has: .*agentview"):
        make(cameras={"base": "front"})


def test_substitutes_must_be_asked_for(assets: Path) -> None:
    if not has_substitutes(assets):
        pytest.skip("these assets are LIBERO's own")
    with pytest.raises(EnvError, match="substitutes=True"):
        LiberoEnv("libero_object/0", assets=assets)


def test_the_fingerprint_says_what_was_played(assets: Path) -> None:
    flag = has_substitutes(assets)
    found = LiberoEnv.fingerprint(protocol="omega-paper", assets=assets, substitutes=flag)
    assert found["protocol"] == PROTOCOLS["omega-paper"].to_dict()
    assert found["assets"] == ("substitutes" if flag else "original")
