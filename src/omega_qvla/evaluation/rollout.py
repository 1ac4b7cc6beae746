"""Play one episode: predict a chunk, execute its beginning, look again."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

import numpy as np

from omega_qvla.errors import ActionError, EvaluationError
from omega_qvla.evaluation.records import Arm, Episode, EpisodeRecord, Protocol, Trace
from omega_qvla.evaluation.scripted import SimulatorPolicy
from omega_qvla.evaluation.smoothness import action_jerk, path_jerk

if TYPE_CHECKING:
    from omega_qvla.envs.base import Env
    from omega_qvla.policies.base import Policy
    from omega_qvla.policies.observation import Observation


def noise_seed(seed: int, replan: int) -> int:
    """Seed of the flow noise of the `replan`-th prediction in the episode of `seed`.

    It depends on nothing else, so every arm starts each denoising from the same noise,
    and what differs between arms is the policy.
    """
    return int(np.random.SeedSequence([seed, replan]).generate_state(1)[0])


def load_arm(arm: Arm) -> Policy:
    """The policy of an arm: its checkpoint, with its pack applied if it has one."""
    from omega_qvla.runtime.engine import Engine

    engine = Engine.load(
        arm.checkpoint,
        pack=arm.pack,
        backend=arm.backend,
        device=arm.device,
        act_bits=arm.act_bits,
        missing=arm.missing,
        settings=arm.settings,
        tokenizer=arm.tokenizer,
        offline=arm.offline,
    )
    policy: Policy = engine.policy
    return policy


class _Stopwatch:
    """Wall time by what it was spent on."""

    def __init__(self) -> None:
        self.spent = {"simulation": 0.0, "rendering": 0.0, "policy": 0.0}
        self._last = time.perf_counter()

    def lap(self, kind: str | None) -> None:
        """Book the time since the last lap under `kind` (None: under nothing)."""
        now = time.perf_counter()
        if kind is not None:
            self.spent[kind] += now - self._last
        self._last = now


class _Recorder:
    """Collects what the record needs, and frames if wanted."""

    def __init__(self, env: Env, protocol: Protocol, frames: bool) -> None:
        self._env, self._protocol, self._wanted = env, protocol, frames
        self.actions: list[np.ndarray] = []
        self.replans: list[int] = []
        self.frames: list[np.ndarray] = []
        self.frame_steps: list[int] = []

    def frame(self, last: bool = False) -> None:
        """Take a picture if one is due now (or it is the last moment to)."""
        step = len(self.actions)
        due = last or step % self._protocol.frame_every == 0
        if self._wanted and due and step not in self.frame_steps:
            self.frames.append(self._env.frame(self._protocol.frame_size).copy())
            self.frame_steps.append(step)

    def stacked(self) -> np.ndarray:
        """float32 [steps, action_dim]."""
        if not self.actions:
            return np.zeros((0, self._env.action_dim), np.float32)
        return np.stack(self.actions).astype(np.float32)

    def trace(self, success: bool) -> Trace:
        size = self._protocol.frame_size
        frames = np.stack(self.frames) if self.frames else np.zeros((0, size, size, 3), np.uint8)
        return Trace(
            actions=self.stacked(),
            replans=np.array(self.replans, np.int64),
            frames=frames,
            frame_steps=np.array(self.frame_steps, np.int64),
            success=success,
        )


def run_episode(
    policy: Policy | SimulatorPolicy,
    env: Env,
    arm: Arm,
    episode: Episode,
    protocol: Protocol,
    *,
    record_frames: bool = False,
) -> tuple[EpisodeRecord, Trace]:
    """Play `episode` and say how it went.

    The environment renders at the start and whenever a new chunk is needed, not at every
    step; for a `SimulatorPolicy` never. An action that is not finite, and an `ActionError`
    of the policy, end the episode as failed with the reason in the record, since that is
    where a robot stops; nothing of that chunk is executed. Every other error is raised.

    Returns the record and the trace (with frames only if `record_frames`).

    Raises:
        EvaluationError: the policy's chunk is shorter than `protocol.execute` or of
            another width than the environment's actions.
    """
    watch = _Stopwatch()
    recorder = _Recorder(env, protocol, record_frames)
    observation = _start(policy, env, episode.seed, watch)
    success, done, error = False, False, None
    while not done:
        try:
            seed = noise_seed(episode.seed, len(recorder.replans))
            chunk = _predict(policy, observation, seed, protocol.denoising_steps)
            _check_chunk(chunk, env, 1 if observation is None else protocol.execute)
        except ActionError as problem:
            error = str(problem)
            break
        recorder.replans.append(len(recorder.actions))
        watch.lap("policy")
        for action in np.clip(chunk[: protocol.execute], -1.0, 1.0):
            recorder.frame()
            watch.lap(None)
            result = env.step(action)
            recorder.actions.append(np.asarray(action, np.float32))
            success = result.success
            done = result.done or result.success or len(recorder.actions) == protocol.max_steps
            watch.lap("simulation")
            if done:
                break
        if not done and observation is not None:
            observation = env.observe()
            watch.lap("rendering")
    recorder.frame(last=True)
    return _record(arm, episode, success, recorder, watch, error), recorder.trace(success)


def _start(
    policy: Policy | SimulatorPolicy, env: Env, seed: int, watch: _Stopwatch
) -> Observation | None:
    """Reset; the first observation, or None for a policy that needs none."""
    # An environment of the user's own may have `reset` only; its time cannot be split.
    reset_state = getattr(env, "reset_state", None)
    observation: Observation | None = None
    if reset_state is None:
        observation = env.reset(seed)
    else:
        reset_state(seed)
    watch.lap("simulation")
    if isinstance(policy, SimulatorPolicy):
        policy.begin(env, seed)
        watch.lap("policy")
        return None
    if observation is None:
        observation = env.observe()
        watch.lap("rendering")
    return observation


def _predict(
    policy: Policy | SimulatorPolicy, observation: Observation | None, seed: int, steps: int | None
) -> np.ndarray:
    """The next chunk [n, action_dim]; n = 1 for a policy that acts step by step."""
    if isinstance(policy, SimulatorPolicy):
        return np.asarray(policy.act())[None]
    assert observation is not None
    if steps is None:
        return policy.infer(observation, seed=seed)
    return policy.infer(observation, seed=seed, num_steps=steps)


def _check_chunk(chunk: np.ndarray, env: Env, execute: int) -> None:
    from omega_qvla.policies.base import check_actions  # brings torch

    if chunk.ndim != 2 or chunk.shape[1] != env.action_dim or len(chunk) < execute:
        raise EvaluationError(
            f"the policy predicts chunks of shape {chunk.shape}, the evaluation needs at least "
            f"({execute}, {env.action_dim}): check action_dim and Protocol.execute"
        )
    check_actions(chunk)


def _record(
    arm: Arm,
    episode: Episode,
    success: bool,
    recorder: _Recorder,
    watch: _Stopwatch,
    error: str | None,
) -> EpisodeRecord:
    actions = recorder.stacked()
    return EpisodeRecord(
        family=arm.family,
        variant=arm.variant,
        arm=arm.label,
        task=episode.task,
        seed=episode.seed,
        success=success,
        steps=len(actions),
        replans=len(recorder.replans),
        action_jerk=action_jerk(actions),
        path_jerk=path_jerk(actions),
        simulation_s=round(watch.spent["simulation"], 4),
        rendering_s=round(watch.spent["rendering"], 4),
        policy_s=round(watch.spent["policy"], 4),
        error=error,
    )
