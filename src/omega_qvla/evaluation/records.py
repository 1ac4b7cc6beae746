"""What an evaluation is asked to do, and what it writes down per episode."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np

from omega_qvla.errors import ConfigError, EvaluationError

#: The label of the arm that every other arm is compared with.
REFERENCE = "full-precision"


class ArmKey(NamedTuple):
    """Identity of an arm in records and summaries."""

    family: str
    variant: str
    arm: str

    def __str__(self) -> str:
        return "/".join(self)


@dataclass(frozen=True)
class Arm:
    """One thing to evaluate: a checkpoint, in full precision or with a pack on top.

    label:      name of the arm ("full-precision", "rtn", "omega", ...).
    checkpoint: directory of a policy checkpoint. A variant (outlier channels) is a
                checkpoint directory of its own, saved after the rescaling, because packs
                are bound to the exact weights they were built from. For a served policy
                its address, "ws://host:port"; for a scripted one "".
    pack:       pack file, or None for full precision.
    backend:    kernel backend for the pack.
    device:     torch device.
    policy:     None: the checkpoint's. Else what acts instead: "random", "oracle",
                "served", or "module:function", see `omega_qvla.evaluation.policies`.
    act_bits, missing: of the pack (or bundle), as of `Engine.load`.
    settings, tokenizer, offline: of the checkpoint, as of `Engine.load`.
    """

    label: str
    checkpoint: str
    family: str
    variant: str = "plain"
    pack: str | None = None
    backend: str = "auto"
    device: str = "cpu"
    policy: str | None = None
    act_bits: int | None = None
    missing: Literal["error", "fallback"] = "fallback"
    settings: Mapping[str, Any] | None = None
    tokenizer: str | None = None
    offline: bool = False

    @property
    def key(self) -> ArmKey:
        """Identity within an evaluation."""
        return ArmKey(self.family, self.variant, self.label)


class Episode(NamedTuple):
    """One task from one initial state, the same for every arm."""

    task: str
    seed: int


@dataclass(frozen=True)
class Protocol:
    """How an episode is played, identically for every arm.

    execute:     actions executed of each predicted chunk before the next prediction.
    max_steps:   control steps after which the episode has failed; None leaves it to the
                 environment, whose cap may differ by task.
    denoising_steps: of every prediction; None leaves it to the policy.
    frame_size:  edge of recorded frames in pixels (recorded episodes only).
    frame_every: control steps between recorded frames.
    """

    execute: int = 5
    max_steps: int | None = 200
    denoising_steps: int | None = None
    frame_size: int = 160
    frame_every: int = 3

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if value is None and field.name in ("max_steps", "denoising_steps"):
                continue
            if value < 1:
                raise ConfigError(f"Protocol.{field.name} must be at least 1")


@dataclass(frozen=True)
class EpisodeRecord:
    """The outcome of one episode under one arm; one JSON line of a results file.

    success:      the environment reported success within the step limit.
    steps:        control steps executed;  replans: chunks predicted.
    action_jerk:  rms third difference of the executed actions; None below 4 steps.
    path_jerk:    same of their running sum (the commanded path).
    *_s:          wall time in seconds spent in physics (the reset included), in
                  rendering what the policy sees, in the policy. No part of the outcome.
    error:        None, or why the policy's action was not executed (the episode then
                  counts as failed: the robot has stopped).
    """

    family: str
    variant: str
    arm: str
    task: str
    seed: int
    success: bool
    steps: int
    replans: int
    action_jerk: float | None
    path_jerk: float | None
    simulation_s: float
    rendering_s: float
    policy_s: float
    error: str | None = None

    @property
    def key(self) -> ArmKey:
        """The arm that played."""
        return ArmKey(self.family, self.variant, self.arm)

    @property
    def episode(self) -> Episode:
        """The episode that was played."""
        return Episode(self.task, self.seed)

    def outcome(self) -> dict[str, Any]:
        """Everything but wall times: equal between repeated runs."""
        return {k: v for k, v in asdict(self).items() if not k.endswith("_s")}

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        return asdict(self)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> EpisodeRecord:
        """Inverse of `to_dict`.

        Raises:
            EvaluationError: a field is missing or unknown.
        """
        known = {field.name for field in fields(cls)}
        wrong = known.symmetric_difference(data)
        if wrong:
            raise EvaluationError(f"not an episode record: fields {sorted(wrong)} do not match")
        return cls(**data)


@dataclass(frozen=True)
class Trace:
    """What happened in one episode, for people to look at.

    actions: float32 [steps, action_dim], as executed (clipped).
    replans: int64 [replans], step at which each chunk was predicted.
    frames:  uint8 [n, size, size, 3] or [0, ...];  frame_steps: int64 [n].
    success: the outcome.
    """

    actions: np.ndarray
    replans: np.ndarray
    frames: np.ndarray
    frame_steps: np.ndarray
    success: bool

    def save(self, path: Path) -> None:
        """Write as a compressed .npz, atomically."""
        from omega_qvla.files import atomic_file

        arrays: dict[str, Any] = {name: np.asarray(v) for name, v in asdict(self).items()}
        with atomic_file(path, parents=True) as stream:
            np.savez_compressed(stream, **arrays)

    @classmethod
    def load(cls, path: Path) -> Trace:
        """Read what `save` wrote.

        Raises:
            EvaluationError: the file is missing or no trace.
        """
        try:
            with np.load(path, allow_pickle=False) as data:
                arrays = {field.name: data[field.name] for field in fields(cls)}
        except (OSError, KeyError, ValueError) as error:
            raise EvaluationError(f"cannot read the trace {path}: {error}") from error
        success = bool(arrays.pop("success"))
        return cls(success=success, **arrays)
