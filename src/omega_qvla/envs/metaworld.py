"""Six Meta-World tasks, rendered in software fast enough to train and evaluate on a CPU."""

from __future__ import annotations

import importlib
import pickle
import warnings
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

import numpy as np

from omega_qvla.envs.base import StepResult
from omega_qvla.envs.rendering import (
    CAMERAS,
    import_mujoco,
    lean_renderer,
    scene_options,
    set_up_scene,
)
from omega_qvla.errors import EnvError
from omega_qvla.policies.observation import Observation

#: Task name -> instruction. The simulator's own name is the task's with "-v3" after it.
TASKS: Mapping[str, str] = MappingProxyType(
    {
        "button-press-topdown": "press the button from above",
        "drawer-open": "open the drawer",
        "drawer-close": "close the drawer",
        "door-open": "open the door",
        "window-open": "slide the window open",
        "window-close": "slide the window closed",
    }
)

#: Training draws its seeds below TRAIN_SEED_END, evaluation from EVAL_SEED_START on.
TRAIN_SEED_END = 100_000
EVAL_SEED_START = 1_000_000

MAX_STEPS = 200
ACTION_DIM = 4
STATE_DIM = 4

#: raw observation float64 [39] -> action float32 [4].
Expert = Callable[[np.ndarray], np.ndarray]


def eval_seeds(count: int, start: int = 0) -> range:
    """`count` held-out seeds, disjoint from every training seed by construction."""
    return range(EVAL_SEED_START + start, EVAL_SEED_START + start + count)


def _check_task(task: str) -> None:
    if task not in TASKS:
        raise EnvError(f"unknown Meta-World task {task!r}; known: {', '.join(TASKS)}")


def _make_simulator(task: str) -> Any:
    try:
        import_mujoco()
        registry = importlib.import_module("metaworld.env_dict").ALL_V3_ENVIRONMENTS
    except ImportError as error:
        raise EnvError(f"Meta-World is not installed ({error}): pip install metaworld") from error
    return registry[f"{task}-v3"]()


def scripted_expert(task: str) -> Expert:
    """Meta-World's scripted policy: raw observation float [39] -> clipped action float32 [4]."""
    _check_task(task)
    import_mujoco()
    policies = importlib.import_module("metaworld.policies")
    policy = policies.ENV_POLICY_MAP[f"{task}-v3"]()

    def act(raw_observation: np.ndarray) -> np.ndarray:
        with warnings.catch_warnings():
            # Warns at nearly every step that its own gains exceed the action range.
            warnings.simplefilter("ignore")
            # A copy: some of the policies write into views of what they are given.
            action = policy.get_action(np.array(raw_observation, dtype=np.float64))
        clipped: np.ndarray = np.clip(action, -1.0, 1.0).astype(np.float32)
        return clipped

    return act


class MetaWorldEnv:
    """One Meta-World task behind the `Env` protocol.

    State float32 [4]: hand x, y, z in metres (world frame), gripper opening in [0, 1].
    Action [4]: hand displacement x, y, z in units of 1 cm, gripper effort (1 closes).
    """

    action_dim = ACTION_DIM
    state_dim = STATE_DIM
    cameras = tuple(CAMERAS)
    max_steps = MAX_STEPS

    def __init__(self, task: str, size: int = 80) -> None:
        """`size`: edge of both camera images in pixels."""
        _check_task(task)
        self.task = task
        self.prompt = TASKS[task]
        self.size = size
        self._sim = _make_simulator(task)
        self._renderers: dict[int, Any] = {}
        self._raw = np.zeros(39)
        self._steps = 0
        set_up_scene(self._sim.model)

    @property
    def raw_observation(self) -> np.ndarray:
        """Meta-World's own observation, float64 [39]: what `scripted_expert` acts on."""
        return self._raw.copy()

    def reset(self, seed: int) -> Observation:
        """Start the episode of `seed`, and render it."""
        self.reset_state(seed)
        return self.observe()

    def reset_state(self, seed: int) -> None:
        """Start the episode of `seed` without rendering.

        Object and goal are drawn as Meta-World draws them, uniformly from the task's
        reset box, but from a generator of their own instead of numpy's global one.
        """
        task_type = importlib.import_module("metaworld.types").Task
        box = self._sim._random_reset_space
        draw = np.random.default_rng(seed).uniform(box.low, box.high)
        spec = {"env_cls": type(self._sim), "rand_vec": draw, "partially_observable": True}
        self._sim.set_task(task_type(env_name=f"{self.task}-v3", data=pickle.dumps(spec)))
        self._raw, _ = self._sim.reset()
        self._refresh()
        self._steps = 0

    def step(self, action: np.ndarray) -> StepResult:
        """Execute one action [4], clipped to [-1, 1]; stepping on after success is allowed."""
        values = np.asarray(action, dtype=np.float64)
        if values.shape != (ACTION_DIM,):
            raise EnvError(f"action has shape {values.shape}, expected ({ACTION_DIM},)")
        if not np.isfinite(values).all():
            raise EnvError(f"action is not finite: {values.tolist()}")
        clipped = np.clip(values, -1.0, 1.0).astype(np.float32)
        self._raw, _, _, _, info = self._sim.step(clipped)
        self._steps += 1
        success = bool(info["success"])
        return StepResult(success=success, done=success or self._steps >= self.max_steps)

    def observe(self) -> Observation:
        """Render both cameras, uint8 [size, size, 3] each."""
        images = {name: self._render(name, self.size) for name in self.cameras}
        return Observation(images, self._raw[:STATE_DIM].astype(np.float32), self.prompt)

    def frame(self, size: int) -> np.ndarray:
        """The base camera at another resolution, uint8 [size, size, 3]."""
        return self._render("base", size)

    def close(self) -> None:
        """Free the renderers and the simulator."""
        for renderer in self._renderers.values():
            # Rendering makes its GL context current. Closed while another one is, mujoco
            # would delete that one's buffers, and a second environment's images with them.
            renderer.render()
            renderer.close()
        self._renderers.clear()
        self._sim.close()

    def _refresh(self) -> None:
        """Bring geometry and raw observation in line with the state set by a reset.

        Some tasks move the object last and leave the derived positions as they were:
        the first image and the first raw observation would show the episode before.
        """
        sim = self._sim
        import_mujoco().mj_forward(sim.model, sim.data)
        sim._prev_obs = sim._get_curr_obs_combined_no_goal()
        self._raw[:18] = self._raw[18:36] = sim._prev_obs

    def _render(self, camera: str, size: int) -> np.ndarray:
        renderer = self._renderers.get(size)
        if renderer is None:
            renderer = self._renderers[size] = lean_renderer(self._sim.model, size)
        renderer.update_scene(self._sim.data, CAMERAS[camera], scene_options())
        image: np.ndarray = renderer.render()
        return image
