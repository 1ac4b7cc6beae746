"""The scripted expert: where it takes hold of a thing, and that it solves a task."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest

from omega_qvla.envs.libero_grasp import Shape, plan_grasps
from omega_qvla.envs.libero_oracle import oracle
from omega_qvla.envs.libero_protocol import PROTOCOLS
from omega_qvla.errors import EnvError

from .conftest import Make


def box(center: tuple[float, float, float], size: tuple[float, float, float]) -> np.ndarray:
    """Corners float [8, 3]."""
    signs = np.array([[x, y, z] for x in (-1, 1) for y in (-1, 1) for z in (-1, 1)])
    corners: np.ndarray = np.array(center) + signs * np.array(size) / 2
    return corners


def ring(radius: float, height: float) -> Shape:
    """A bowl's wall of 24 small boxes around the origin."""
    angles = np.deg2rad(np.arange(0, 360, 15))
    places = [(radius * np.cos(a), radius * np.sin(a), height / 2) for a in angles]
    return Shape(np.array([box(place, (0.008, 0.008, height)) for place in places]))


def test_a_carton_is_taken_across_its_short_side() -> None:
    carton = Shape(np.array([box((0.1, -0.2, 0.01), (0.08, 0.04, 0.02))]))
    best = plan_grasps(carton, [])[0]
    assert np.allclose(best.point, [0.1, -0.2, 0.01], atol=1e-9)
    assert abs(np.sin(best.yaw)) > 0.999  # the fingers close along y


def test_a_tall_bottle_is_taken_below_its_top() -> None:
    bottle = Shape(np.array([box((0, 0, 0.07), (0.05, 0.05, 0.14))]))
    assert plan_grasps(bottle, [])[0].point[2] == pytest.approx(0.12)


def test_a_neighbour_is_kept_clear_of() -> None:
    can = Shape(np.array([box((0, 0, 0.04), (0.05, 0.05, 0.08))]))
    beside = Shape(np.array([box((0, 0.07, 0.07), (0.05, 0.05, 0.14))]))
    free, near = plan_grasps(can, [])[0], plan_grasps(can, [beside])[0]
    assert abs(np.sin(free.yaw)) > 0.999  # along y turns the wrist least
    assert abs(np.cos(near.yaw)) > 0.8  # but there a finger would meet the neighbour


def test_a_bowl_is_taken_by_its_rim() -> None:
    bowl = ring(0.055, 0.05)
    best = plan_grasps(bowl, [])[0]
    assert np.linalg.norm(best.point[:2]) == pytest.approx(0.055, abs=0.006)
    outward = best.point[:2] / np.linalg.norm(best.point[:2])
    assert abs(outward @ [np.cos(best.yaw), np.sin(best.yaw)]) > 0.99
    assert 0.03 < best.point[2] < 0.05


@pytest.mark.parametrize(
    "goal",
    [
        [["turnon", "flat_stove_1"]],
        [["in", "cup_1", "box_1"], ["in", "pot_1", "box_1"]],
        [["open", "drawer_1"]],
    ],
)
def test_a_task_without_a_script_is_named(goal: list[list[str]]) -> None:
    simulator = SimpleNamespace(
        parsed_problem={"goal_state": goal}, objects_dict={"cup_1": 0, "pot_1": 0}
    )
    with pytest.raises(EnvError, match="no script for libero_goal/x"):
        oracle(SimpleNamespace(simulator=simulator, task="libero_goal/x"))  # type: ignore[arg-type]


@pytest.mark.sim
@pytest.mark.libero
@pytest.mark.parametrize(
    ("task", "gripper"), [("libero_object/1", "libero"), ("libero_spatial/0", "open-01")]
)
def test_the_oracle_solves_a_task(task: str, gripper: str, make: Make) -> None:
    protocol = replace(PROTOCOLS["openpi"], name="mine", gripper=gripper)
    env = make(task, protocol=protocol)
    expert = oracle(env)
    for seed in (0, 7):
        env.reset_state(seed)
        expert.begin()
        done, steps = False, 0
        while not done:
            action = expert.act()
            assert action.shape == (7,) and np.abs(action).max() <= 1
            result = env.step(action)
            done, steps = result.done, steps + 1
        assert result.success and steps < 140  # 60 to 110 where the first grasp holds
