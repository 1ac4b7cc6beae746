"""LIBERO's tasks behind the `Env` protocol, played as a named protocol says."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np

from omega_qvla.envs.base import StepResult
from omega_qvla.envs.libero_files import (
    find_assets,
    has_substitutes,
    import_libero,
    initial_states,
    language,
    libero_root,
    split_task,
)
from omega_qvla.envs.libero_protocol import LiberoProtocol, libero_protocol
from omega_qvla.errors import EnvError
from omega_qvla.policies.observation import Observation

ACTION_DIM = 7
STATE_DIM = 8
#: Camera name -> the simulator's camera.
CAMERAS: Mapping[str, str] = MappingProxyType({"base": "agentview", "wrist": "robot0_eye_in_hand"})
#: Does nothing, with the gripper open.
NO_OP = (0.0, 0.0, 0.0, 0.0, 0.0, 0.0, -1.0)


@contextlib.contextmanager
def _numpy_seed(seed: int) -> Iterator[None]:
    """LIBERO draws from numpy's global generator: seed it, and put it back afterwards."""
    before = np.random.get_state()
    np.random.seed(seed)
    try:
        yield
    finally:
        np.random.set_state(before)


def axis_angle(quaternion: np.ndarray) -> np.ndarray:
    """Quaternion x, y, z, w -> axis times angle, angle in [0, 2 pi); zeros for no rotation."""
    w = float(np.clip(quaternion[3], -1.0, 1.0))
    sine = np.sqrt(1.0 - w * w)
    if np.isclose(sine, 0.0):
        return np.zeros(3)
    scaled: np.ndarray = np.asarray(quaternion[:3]) * (2.0 * np.arccos(w) / sine)
    return scaled


class LiberoEnv:
    """One LIBERO task.

    State float32 [8]: hand x, y, z (metres), hand rotation as axis times angle (radians),
    both fingers' positions (metres).
    Action [7]: hand displacement (1 = 5 cm), rotation (1 = 0.5 rad), gripper as the protocol
    says. `reset(seed)` plays initial state `protocol.offset + seed`.
    """

    action_dim = ACTION_DIM
    state_dim = STATE_DIM
    cameras = tuple(CAMERAS)

    def __init__(
        self,
        task: str,
        protocol: str | Mapping[str, Any] | LiberoProtocol = "openpi",
        assets: str | Path | None = None,
        substitutes: bool = False,
        states: str | Path | None = None,
    ) -> None:
        """
        Args:
            task: "suite/name" or "suite/index".
            assets: folder of the assets; None looks where hf-libero puts them.
            substitutes: assets that are partly not LIBERO's own are accepted. Results store
                this option, and so carry the flag.
            states: folder of converted initial states; None reads the package's own.

        Raises:
            EnvError: unknown task, missing package or assets, or unexpected substitutes.
        """
        suite, name = split_task(task)
        self.protocol = libero_protocol(protocol)
        self.task, self.prompt = f"{suite}/{name}", language(name)
        self.max_steps: int = getattr(self.protocol.caps, suite)
        folder = find_assets(assets)
        if has_substitutes(folder) and not substitutes:
            raise EnvError(
                f"{folder} holds substitutes for LIBERO's own files: pass substitutes=True, and "
                "say so with every result, or get the original assets"
            )
        self._states = initial_states(suite, name, states)
        libero = import_libero(folder)
        with _numpy_seed(self.protocol.seed):
            self._env = libero.OffScreenRenderEnv(
                bddl_file_name=str(libero_root() / "bddl_files" / suite / f"{name}.bddl"),
                use_camera_obs=False,  # else both cameras are rendered at every step
                hard_reset=False,  # else every reset compiles the scene again
                ignore_done=True,  # the protocol's cap counts, not robosuite's horizon
            )
        self._raw: Mapping[str, np.ndarray] = {}
        self._steps = 0

    @property
    def raw_observation(self) -> Mapping[str, np.ndarray]:
        """LIBERO's own observation, without images: what a scripted expert acts on."""
        return self._raw

    def reset(self, seed: int) -> Observation:
        """Start from initial state `offset + seed`, settle, and render."""
        self.reset_state(seed)
        return self.observe()

    def reset_state(self, seed: int) -> None:
        """`reset` without rendering.

        Raises:
            EnvError: the task has no such initial state.
        """
        index = self.protocol.offset + seed
        if seed < 0 or index >= len(self._states):
            raise EnvError(
                f"{self.task} has {len(self._states)} initial states; seed {seed} with offset "
                f"{self.protocol.offset} is none of them"
            )
        with _numpy_seed(self.protocol.seed):
            self._env.reset()
        # Left over from the episode before, where the scene is not compiled anew.
        gripper = self._env.robots[0].gripper
        gripper.current_action = np.zeros(gripper.dof)
        self._env.sim.data.qacc_warmstart[:] = 0.0
        self._raw = self._env.set_init_state(self._states[index])
        for _ in range(self.protocol.settle_steps):
            self._raw, _, _, _ = self._env.step(np.array(NO_OP))
        self._steps = 0

    def step(self, action: np.ndarray) -> StepResult:
        """Execute one action [7], clipped to [-1, 1].

        Raises:
            EnvError: wrong shape, or not finite.
        """
        values = np.asarray(action, dtype=np.float64)
        if values.shape != (ACTION_DIM,):
            raise EnvError(f"action has shape {values.shape}, expected ({ACTION_DIM},)")
        if not np.isfinite(values).all():
            raise EnvError(f"action is not finite: {values.tolist()}")
        values = np.clip(values, -1.0, 1.0)
        if self.protocol.gripper == "open-01":
            values[-1] = np.sign(1.0 - 2.0 * values[-1])
        self._raw, _, success, _ = self._env.step(values)
        self._steps += 1
        return StepResult(bool(success), bool(success) or self._steps >= self.max_steps)

    def observe(self) -> Observation:
        """Render both cameras, uint8 [size, size, 3] each."""
        size = self.protocol.camera_size
        images = {name: self._render(name, size, self.protocol.rotate) for name in self.cameras}
        raw = self._raw
        parts = [raw["robot0_eef_pos"], axis_angle(raw["robot0_eef_quat"])]
        state = np.concatenate([*parts, raw["robot0_gripper_qpos"]]).astype(np.float32)
        return Observation(images, state, self.prompt)

    def frame(self, size: int) -> np.ndarray:
        """The base camera as people see it: upright and not mirrored."""
        return np.ascontiguousarray(self._render("base", size, False)[::-1])

    def close(self) -> None:
        """Free the simulator and its renderer."""
        self._env.close()

    def _render(self, camera: str, size: int, rotate: bool) -> np.ndarray:
        image = self._env.sim.render(size, size, camera_name=CAMERAS[camera])
        return np.ascontiguousarray(image[::-1, ::-1] if rotate else image)
