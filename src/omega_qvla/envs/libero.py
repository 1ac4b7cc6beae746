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
from omega_qvla.envs.libero_pictures import LazyPictures
from omega_qvla.envs.libero_protocol import LiberoProtocol, libero_protocol
from omega_qvla.envs.libero_scenes import Scenes
from omega_qvla.errors import EnvError
from omega_qvla.policies.observation import Observation

ACTION_DIM = 7
STATE_DIM = 8
#: Camera name -> the simulator's camera.
CAMERAS: Mapping[str, str] = MappingProxyType({"base": "agentview", "wrist": "robot0_eye_in_hand"})
#: Does nothing, with the gripper open.
NO_OP = (0.0, 0.0, 0.0, 0.0, 0.0, 0.0, -1.0)

#: Keeps the seeds of sampled starts apart from the protocols' own.
_SAMPLED, _JOINT_NOISE = 0x53414D50, 0.02


@contextlib.contextmanager
def _numpy_seed(*seed: int) -> Iterator[None]:
    """LIBERO draws from numpy's global generator: seed it, and put it back afterwards."""
    before = np.random.get_state()
    np.random.seed(seed[0] if len(seed) == 1 else seed)
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

    States and pictures are, bit for bit, those of LIBERO's own `OffScreenRenderEnv`, newly
    made, seeded with the protocol's seed and then reset once per trial up to this one (or once:
    the protocol's `scene`); whatever was played before, and without playing what comes before.
    """

    action_dim = ACTION_DIM
    state_dim = STATE_DIM
    cameras: tuple[str, ...] = tuple(CAMERAS)

    def __init__(
        self,
        task: str,
        protocol: str | Path | Mapping[str, Any] | LiberoProtocol = "openpi",
        assets: str | Path | None = None,
        substitutes: bool = False,
        states: str | Path | None = None,
        cameras: Mapping[str, str] = CAMERAS,
    ) -> None:
        """
        Args:
            task: "suite/name" or "suite/index".
            protocol: what `libero_protocol` takes.
            assets: folder of the assets; None looks where hf-libero puts them.
            substitutes: assets that are partly not LIBERO's own are accepted. Results carry
                the flag, see `fingerprint`.
            states: folder of converted initial states; None reads the package's own.
            cameras: key of the observation's image -> camera of the scene.

        Raises:
            EnvError: unknown task or camera, missing package or assets, or substitutes that
                were not asked for.
            ConfigError: no such protocol.
        """
        suite, name = split_task(task)
        self.protocol = libero_protocol(protocol)
        self.task, self.prompt = f"{suite}/{name}", language(name)
        self.max_steps: int = getattr(self.protocol.caps, suite)
        self._states = initial_states(suite, name, states)
        self._cameras, self.cameras = dict(cameras), tuple(cameras)
        libero = import_libero(_accepted_assets(assets, substitutes))
        with _numpy_seed(self.protocol.seed):
            self._env: Any = libero.OffScreenRenderEnv(
                bddl_file_name=str(libero_root() / "bddl_files" / suite / f"{name}.bddl"),
                use_camera_obs=False,  # else both cameras are rendered at every step
                ignore_done=True,  # the protocol's cap counts, not robosuite's horizon
            )
        self._pictures = LazyPictures(self._env.env, self.protocol.rendering)
        self._pictures.check_cameras(self._cameras.values())
        self._scenes = Scenes(self._env)
        self._raw: Mapping[str, np.ndarray] = {}
        self._steps = 0

    @classmethod
    def fingerprint(
        cls,
        protocol: str | Path | Mapping[str, Any] | LiberoProtocol = "openpi",
        assets: str | Path | None = None,
        substitutes: bool = False,
        states: str | Path | None = None,
        cameras: Mapping[str, str] = CAMERAS,
    ) -> dict[str, Any]:
        """What the results of an environment with these options depend on, JSON-ready.

        No simulator is made. Keys: protocol (in full), assets ("original" or "substitutes"),
        cameras. `states` is left out: conversion changes no bit. Versions are recorded by the
        evaluation.

        Raises:
            EnvError, ConfigError: as the constructor does.
        """
        folder = _accepted_assets(assets, substitutes)
        return {
            "protocol": libero_protocol(protocol).to_dict(),
            "assets": "substitutes" if has_substitutes(folder) else "original",
            "cameras": dict(cameras),
        }

    @property
    def raw_observation(self) -> Mapping[str, np.ndarray]:
        """LIBERO's own observation, without images: what a scripted expert acts on."""
        return self._raw

    @property
    def simulator(self) -> Any:
        """robosuite's environment below: scene, goal and `sim`, for scripted experts to read."""
        return self._env.env

    def reset(self, seed: int) -> Observation:
        """Start from initial state `offset + seed`, settle, and render."""
        self.reset_state(seed)
        return self.observe()

    def reset_state(self, seed: int) -> None:
        """`reset` without rendering.

        The scene is compiled anew, as LIBERO does by default: 0.9 s, without which states
        would depend in their last bits on the episode before.

        Raises:
            EnvError: the task has no such initial state.
        """
        index = self.protocol.offset + seed
        if seed < 0 or index >= len(self._states):
            raise EnvError(
                f"{self.task} has {len(self._states)} initial states; seed {seed} with offset "
                f"{self.protocol.offset} is none of them"
            )
        self._pictures.make_current()
        with _numpy_seed(self.protocol.seed):
            self._scenes.reset(seed if self.protocol.scene == "trial" else 0)
        self._begin(self._states[index])

    def sample_state(self, seed: int) -> None:
        """Start from a state that is none of the shipped ones, and settle; nothing is rendered.

        Objects are placed as the task's definition has it, and the arm's joints are disturbed
        as in LIBERO's recordings (normal, 0.02 rad). For calibration and training: what is
        evaluated stays unseen.
        """
        self._pictures.make_current()
        with _numpy_seed(_SAMPLED, seed):
            self._scenes.reset(0)
            state = self.simulator.sim.get_state().flatten()
            joints = self.simulator.robots[0]._ref_joint_pos_indexes
            state[1 + np.array(joints)] += np.random.normal(0.0, _JOINT_NOISE, len(joints))
        self._begin(state)

    def _begin(self, state: np.ndarray) -> None:
        self._raw = self._env.set_init_state(state)
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
        """Render the cameras, uint8 [size, size, 3] each.

        Pictures and state are of the instant that LIBERO's own observation shows, 2 to 4 ms
        before the end of the last control step.
        """
        size = self.protocol.camera_size
        images = {key: self._render(name, size) for key, name in self._cameras.items()}
        raw = self._raw
        parts = [raw["robot0_eef_pos"], axis_angle(raw["robot0_eef_quat"])]
        state = np.concatenate([*parts, raw["robot0_gripper_qpos"]]).astype(np.float32)
        return Observation(images, state, self.prompt)

    def frame(self, size: int) -> np.ndarray:
        """The front camera as people see it: upright and not mirrored."""
        return np.ascontiguousarray(self._pictures.render(CAMERAS["base"], size)[::-1])

    def close(self) -> None:
        """Free the simulator and its renderer. Closing twice is allowed."""
        if self._env is not None:
            self._pictures.make_current()
            self._env.close()
            self._env = None

    def _render(self, camera: str, size: int) -> np.ndarray:
        image = self._pictures.render(camera, size)
        return np.ascontiguousarray(image[::-1, ::-1] if self.protocol.rotate else image)


def _accepted_assets(assets: str | Path | None, substitutes: bool) -> Path:
    folder = find_assets(assets)
    if has_substitutes(folder) and not substitutes:
        raise EnvError(
            f"{folder} holds substitutes for LIBERO's own files: pass substitutes=True, and "
            "say so with every result, or get the original assets"
        )
    return folder
