"""A scripted expert for LIBERO's tasks of one object: grasp from above, carry, release.

It reads the simulator, acts with the same actions as a policy, and so shows that success is
reachable and counted; it gives calibration observations and demonstrations without a dataset.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from omega_qvla.envs.libero_grasp import Grasp, Shape, object_shape, plan_grasps
from omega_qvla.errors import EnvError

if TYPE_CHECKING:
    from omega_qvla.envs.libero import LiberoEnv

#: An action of 1 is this far: metres, radians. See robosuite's OSC_POSE.
_POSITION_UNIT, _ROTATION_UNIT = 0.05, 0.5
#: The controller closes this share of its distance in one control step or so: command more.
_GAIN = 2.0
#: (open, close) as the last entry of an action, by the protocol's convention.
_GRIPPER = {"libero": (-1.0, 1.0), "open-01": (1.0, 0.0)}
#: Metres; height per metre of way; radians.
_HOVER, _CLEARANCE, _REACHED, _CENTRED, _LOST = 0.06, 0.03, 0.012, 0.018, 0.05
_ARC, _TURNED = 0.6, 0.15
#: Control steps.
_CLOSING, _RELEASING, _PATIENCE = 10, 25, 60


def oracle(env: LiberoEnv) -> PickAndPlace:
    """The expert for the task of `env`.

    Raises:
        EnvError: the task is none of those that it can do.
    """
    return PickAndPlace(env)


class PickAndPlace:
    """Picks one object and puts it into, or on, another. One per environment.

    `begin` after each reset, then one `act` per control step.
    """

    def __init__(self, env: LiberoEnv) -> None:
        """
        Raises:
            EnvError: the task's goal is not one object in or on another.
        """
        self._env = env
        goal = env.simulator.parsed_problem["goal_state"]
        known = env.simulator.objects_dict
        if len(goal) != 1 or goal[0][0].lower() not in ("in", "on") or goal[0][1] not in known:
            raise EnvError(f"the oracle has no script for {env.task}, whose goal is {goal}")
        self._object, self._place = goal[0][1], goal[0][2]
        self._attempt = 0
        self.begin()

    def begin(self) -> None:
        """Forget the episode before; the environment has been reset."""
        self._attempt = 0
        self._plan()

    def act(self) -> np.ndarray:
        """The next action float64 [7], from the simulator's state."""
        target, closed = getattr(self, f"_{self._phase}")()
        self._waited += 1
        action = np.zeros(7)
        action[:3] = _GAIN * (target - self._hand()) / _POSITION_UNIT
        action[3:6] = _GAIN * self._turn() / _ROTATION_UNIT
        action[6] = _GRIPPER[self._env.protocol.gripper][closed]
        clipped: np.ndarray = np.clip(action, -1.0, 1.0)
        return clipped

    # Phases: each returns (where the grip point is to go, fingers closed), and may start the next.

    def _approach(self) -> tuple[np.ndarray, bool]:
        """Go above the grasp, the higher the longer the way: other objects stand between."""
        way = float(np.linalg.norm(self._grasp.point[:2] - self._hand()[:2]))
        above = self._grasp.point + _up(_HOVER + _ARC * way)
        if self._near(above, 2 * _REACHED) and np.linalg.norm(self._turn()) < _TURNED:
            self._enter("descend")
        elif self._waited > 2 * _PATIENCE:
            self._retry()
        return above, False

    def _descend(self) -> tuple[np.ndarray, bool]:
        if self._near(self._grasp.point, _REACHED) or self._waited > _PATIENCE:
            self._enter("close")
        return self._grasp.point, False

    def _close(self) -> tuple[np.ndarray, bool]:
        if self._waited >= _CLOSING:
            self._held = self._position() - self._hand()
            self._enter("lift")
        return self._grasp.point, True

    def _lift(self) -> tuple[np.ndarray, bool]:
        """Straight up, until the object clears what it is carried over."""
        up = np.append(self._grasp.point[:2], self._carry_height())
        if self._hand()[2] > up[2] - 2 * _REACHED or self._waited > _PATIENCE:
            self._enter("carry")
        return up, True

    def _carry(self) -> tuple[np.ndarray, bool]:
        """Bring the object, not the hand, over its place: it may have slipped a little."""
        away = self._goal()[:2] - self._position()[:2]
        if np.linalg.norm(self._position() - self._hand() - self._held) > _LOST:
            self._retry()
        elif np.linalg.norm(away) < _CENTRED or self._waited > _PATIENCE:
            self._enter("lower")
        return np.append(self._hand()[:2] + away, self._carry_height()), True

    def _lower(self) -> tuple[np.ndarray, bool]:
        away = self._goal()[:2] - self._position()[:2]
        height = self._release_height()
        if self._hand()[2] < height + _REACHED or self._waited > _PATIENCE:
            self._enter("release")
        return np.append(self._hand()[:2] + away, height), True

    def _release(self) -> tuple[np.ndarray, bool]:
        """Open, and if that was no success, begin anew."""
        target = self._hand() + _up(0.01 if self._waited > 5 else 0.0)
        if self._waited > _RELEASING:
            self._retry()
        return target, False

    def _enter(self, phase: str) -> None:
        self._phase, self._waited = phase, 0

    def _retry(self) -> None:
        self._attempt += 1
        self._plan()

    def _plan(self) -> None:
        """Choose the grasp: the best one, or after a failure the next."""
        env = self._env.simulator
        shapes = {name: object_shape(env.sim, body) for name, body in env.obj_body_id.items()}
        others = [shape for name, shape in shapes.items() if name != self._object]
        grasps = plan_grasps(shapes[self._object], others)
        self._grasp: Grasp = grasps[self._attempt % min(len(grasps), 3)]
        self._shape: Shape = shapes[self._object]
        self._place_top = self._top_of_place(shapes)
        self._held = np.zeros(3)
        self._enter("approach")

    def _top_of_place(self, shapes: dict[str, Shape]) -> float:
        env = self._env.simulator
        if self._place in shapes:
            return shapes[self._place].top
        site = env.object_sites_dict.get(self._place)
        parent = getattr(site, "parent_name", None)
        return shapes[parent].top if parent in shapes else float(self._goal()[2])

    def _carry_height(self) -> float:
        foot = max(self._place_top + _CLEARANCE, self._shape.bottom + _HOVER)
        return foot + float(self._grasp.point[2]) - self._shape.bottom

    def _release_height(self) -> float:
        """The object's foot at the place's upper edge, or just above its surface."""
        return self._place_top + 0.005 + float(self._grasp.point[2]) - self._shape.bottom

    def _hand(self) -> np.ndarray:
        robot = self._env.simulator.robots[0]
        position: np.ndarray = np.array(self._env.simulator.sim.data.site_xpos[robot.eef_site_id])
        return position

    def _position(self) -> np.ndarray:
        env = self._env.simulator
        position: np.ndarray = np.array(env.sim.data.body_xpos[env.obj_body_id[self._object]])
        return position

    def _goal(self) -> np.ndarray:
        env = self._env.simulator
        if self._place in env.obj_body_id:
            return np.array(env.sim.data.body_xpos[env.obj_body_id[self._place]])
        return np.array(env.sim.data.get_site_xpos(self._place))

    def _near(self, target: np.ndarray, tolerance: float) -> bool:
        return bool(np.linalg.norm(target - self._hand()) < tolerance)

    def _turn(self) -> np.ndarray:
        """Rotation vector [3], radians, from the hand as it is to fingers down at the yaw."""
        data: Any = self._env.simulator.sim.data
        matrix = data.get_body_xmat("gripper0_leftfinger").reshape(3, 3)
        closing, down = matrix[:, 1], matrix[:, 2]
        wanted = np.array([np.cos(self._grasp.yaw), np.sin(self._grasp.yaw), 0.0])
        wanted *= 1.0 if wanted @ closing >= 0 else -1.0  # the fingers are alike
        now = np.stack([closing, np.cross(down, closing), down], axis=1)
        floor = np.array([0.0, 0.0, -1.0])
        then = np.stack([wanted, np.cross(floor, wanted), floor], axis=1)
        return _rotation_vector(then @ now.T)


def _up(height: float) -> np.ndarray:
    return np.array([0.0, 0.0, height])


def _rotation_vector(matrix: np.ndarray) -> np.ndarray:
    """Rotation matrix [3, 3] -> axis times angle [3], for angles below pi."""
    axis = np.array(
        [matrix[2, 1] - matrix[1, 2], matrix[0, 2] - matrix[2, 0], matrix[1, 0] - matrix[0, 1]]
    )
    sine = float(np.linalg.norm(axis)) / 2
    if sine < 1e-9:
        return np.zeros(3)
    angle = np.arctan2(sine, (np.trace(matrix) - 1) / 2)
    vector: np.ndarray = axis / (2 * sine) * angle
    return vector
