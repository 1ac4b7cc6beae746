"""A simulator and policies small enough to reason about; importable by worker processes."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

import numpy as np

from omega_qvla.envs.base import StepResult
from omega_qvla.errors import ActionError
from omega_qvla.evaluation.records import Arm
from omega_qvla.evaluation.scripted import OraclePolicy
from omega_qvla.policies.observation import Observation


class ReachEnv:
    """A point on a line, to be brought within 0.05 of a goal that the seed decides."""

    action_dim, state_dim, cameras, max_steps = 2, 2, ("base",), 40

    def __init__(self, task: str, log: str = "") -> None:
        self.task, self.log, self.observations = task, log, 0

    def reset(self, seed: int) -> Observation:
        self.position = np.zeros(2)
        self.goal = np.random.default_rng(seed).uniform(-1, 1, 2)
        self.steps = 0
        return self.observe()

    def observe(self) -> Observation:
        self.observations += 1
        picture = np.full((8, 8, 3), self.steps, np.uint8)
        state = np.concatenate([self.position, self.goal]).astype(np.float32)
        return Observation({"base": picture}, state, self.task)

    def step(self, action: np.ndarray) -> StepResult:
        self.position = self.position + 0.1 * np.asarray(action)
        self.steps += 1
        success = bool(np.abs(self.position - self.goal).max() < 0.05)
        return StepResult(success, success or self.steps >= self.max_steps)

    def frame(self, size: int) -> np.ndarray:
        return np.full((size, size, 3), self.steps, np.uint8)

    def close(self) -> None:
        pass


def make_env(task: str, log: str = "") -> ReachEnv:
    return ReachEnv(task, log)


class SlowEnv(ReachEnv):
    """Takes its time, so that there is something to interrupt."""

    def step(self, action: np.ndarray) -> StepResult:
        time.sleep(0.004)
        return super().step(action)


class DeadlyEnv(ReachEnv):
    """Kills its process at the first reset of the task "deadly"; the marker remembers."""

    def __init__(self, task: str, marker: str) -> None:
        super().__init__(task)
        self.marker = Path(marker)

    def reset(self, seed: int) -> Observation:
        if self.task == "deadly" and not self.marker.exists():
            self.marker.touch()
            os.kill(os.getpid(), signal.SIGKILL)
        return super().reset(seed)


class StateEnv(ReachEnv):
    """Resets without rendering, as the simulators do; has options that are no identity."""

    def __init__(self, task: str, where: str = "", flag: bool = False) -> None:
        super().__init__(task)
        self.calls: list[str] = []

    @classmethod
    def fingerprint(cls, where: str = "", flag: bool = False) -> dict[str, bool]:
        return {"flag": flag}

    def reset_state(self, seed: int) -> None:
        super().reset(seed)
        self.observations = 0
        self.calls.append("reset_state")

    def reset(self, seed: int) -> Observation:
        raise AssertionError("reset renders; reset_state is there")


class NanPolicy:
    """Not finite from its third prediction on, and says nothing of it."""

    def __init__(self) -> None:
        self.count = 0

    def infer(self, observation: Observation, *, seed: int = 0) -> np.ndarray:
        self.count += 1
        chunk = np.zeros((8, 2), np.float32)
        chunk[-1, 1] = np.nan if self.count > 2 else 0.0
        return chunk


class ReachOracle:
    """Goes straight to the goal; its first action of an episode tells a stale one."""

    def __init__(self, env: ReachEnv) -> None:
        self.env, self.fresh = env, False

    def begin(self) -> None:
        self.fresh = True

    def act(self) -> np.ndarray:
        assert self.fresh, "begin was not called"
        return np.clip(10 * (self.env.goal - self.env.position), -1, 1)


def load_oracle(arm: Arm) -> OraclePolicy:
    return OraclePolicy(ReachOracle)


class NoisyPolicy:
    """Steers to the goal; `gain` below 0 steers away. The noise seed moves its actions."""

    def __init__(self, gain: float = 1.0, horizon: int = 8) -> None:
        self.gain, self.horizon, self.seeds = gain, horizon, []

    def infer(self, observation: Observation, *, seed: int = 0) -> np.ndarray:
        self.seeds.append(seed)
        noise = 0.2 * np.random.default_rng(seed).standard_normal((self.horizon, 2))
        wish = observation.state[2:] - observation.state[:2]
        return (self.gain * 4 * wish + noise).astype(np.float32)


class FaultyPolicy(NoisyPolicy):
    """Non-finite from its third prediction on."""

    def infer(self, observation: Observation, *, seed: int = 0) -> np.ndarray:
        if len(self.seeds) >= 2:
            raise ActionError("action is not finite: nan in channel 1")
        return super().infer(observation, seed=seed)


class KillerPolicy(NoisyPolicy):
    """Kills its process at one seed: the first time only, or always ("always" in the file)."""

    def __init__(self, marker: Path) -> None:
        super().__init__()
        self.marker = marker

    def infer(self, observation: Observation, *, seed: int = 0) -> np.ndarray:
        if observation.prompt == "deadly":
            always = self.marker.read_text() == "always"
            if always or not self.marker.with_suffix(".done").exists():
                self.marker.with_suffix(".done").touch()
                os.kill(os.getpid(), signal.SIGKILL)
        if observation.prompt == "hanging":
            time.sleep(600)
        if observation.prompt == "raising":
            raise RuntimeError("boom")
        return super().infer(observation, seed=seed)


def load(arm: Arm) -> NoisyPolicy:
    """The checkpoint is a text file with the gain; loads are counted beside it."""
    text = Path(arm.checkpoint).read_text()
    with Path(f"{arm.checkpoint}.loads").open("a") as stream:
        stream.write(f"{arm.label} {os.getpid()}\n")
    return NoisyPolicy(float(text))


def load_stillborn(arm: Arm) -> NoisyPolicy:
    """As if out of memory: the process dies while it loads."""
    os.kill(os.getpid(), signal.SIGKILL)
    raise AssertionError("unreachable")


def load_killer(arm: Arm) -> KillerPolicy:
    return KillerPolicy(Path(arm.checkpoint))
