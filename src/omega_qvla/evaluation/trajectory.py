"""Open loop along a recorded episode: what each arm would have commanded, joint by joint.

The policies see what was recorded, not what their own actions would have led to. Of every
predicted chunk the actions up to the next look are taken, which together are one commanded
trajectory per arm, as in a replay on a robot.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from omega_qvla.errors import EvaluationError
from omega_qvla.evaluation.open_loop import predict_chunks
from omega_qvla.evaluation.smoothness import jerk
from omega_qvla.policies.observation import Observation

if TYPE_CHECKING:
    from omega_qvla.policies.base import Policy


@dataclass(frozen=True)
class JointFigures:
    """One column of a trajectory, in the action's units.

    error, worst_error: rms and largest distance from the reference arm's column.
    recorded_error: rms distance from the recorded actions; None where there are none.
    jerk: rms third difference; delta: mean size of a step (first difference). Both None for a
        trajectory too short to have one.
    """

    error: float
    worst_error: float
    recorded_error: float | None
    jerk: float | None
    delta: float | None


@dataclass(frozen=True)
class TrajectoryFigures:
    """One arm's trajectory.

    error: rms over time of the Euclidean distance from the reference arm.
    recorded_error: the same from the recorded actions.
    jerk, delta_norm: of the whole action vector (Euclidean norm over the joints).
    gripper_switches: per hundred steps, how often the gripper's command crosses its middle.
    """

    steps: int
    error: float
    recorded_error: float | None
    jerk: float | None
    delta_norm: float | None
    gripper_switches: float | None
    joints: tuple[JointFigures, ...]

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        return asdict(self)


def predict_trajectory(
    policy: Policy, observations: Sequence[Observation], steps: Sequence[int], seeds: Sequence[int]
) -> np.ndarray:
    """The actions that a policy commands along an episode it is shown.

    Args:
        observations: at `steps` of the episode, ascending.
        seeds: of the noise, one per observation.

    Returns:
        float64 [T, action_dim]: from each chunk the actions up to the next observation; the last
        chunk gives as many as the one before it.

    Raises:
        EvaluationError: fewer than two observations, or a gap longer than a chunk.
    """
    gaps = np.diff(np.asarray(steps))
    if len(gaps) == 0 or len(steps) != len(observations):
        raise EvaluationError(
            f"a trajectory takes two observations or more with their steps, got "
            f"{len(observations)} and {len(steps)}"
        )
    if gaps.min() < 1 or gaps.max() > policy.action_horizon:
        raise EvaluationError(
            f"observations {int(gaps.min())} to {int(gaps.max())} steps apart cannot be joined by "
            f"chunks of {policy.action_horizon} actions; look more often"
        )
    chunks = predict_chunks(policy, observations, seeds)
    taken = [*gaps.tolist(), int(gaps[-1])]
    pieces = [chunk[:count] for chunk, count in zip(chunks, taken, strict=True)]
    return np.concatenate(pieces).astype(np.float64)


def trajectory_figures(
    trajectory: np.ndarray,
    reference: np.ndarray,
    recorded: np.ndarray | None = None,
    gripper: int | None = -1,
    middle: float = 0.0,
) -> TrajectoryFigures:
    """Compare a trajectory [T, A] with the reference arm's and, where known, the recorded one.

    Args:
        recorded: [T', A]; the part that both have is compared.
        gripper: its column; None: the robot has none.  middle: see `gripper_middle`.

    Raises:
        EvaluationError: the shapes do not fit.
    """
    if trajectory.ndim != 2 or trajectory.shape != reference.shape:
        raise EvaluationError(
            f"trajectories of shapes {trajectory.shape} and {reference.shape} do not compare"
        )
    if recorded is not None and (recorded.ndim != 2 or recorded.shape[1] != trajectory.shape[1]):
        raise EvaluationError(
            f"recorded actions of {recorded.shape[-1]} columns, the policy's have "
            f"{trajectory.shape[1]}: choose columns with --action-key"
        )
    off = trajectory - reference
    common = 0 if recorded is None else min(len(recorded), len(trajectory))
    missed = None if recorded is None else trajectory[:common] - recorded[:common]
    moves = np.diff(trajectory, axis=0)
    joints = tuple(
        JointFigures(
            error=_rms(off[:, [joint]]),
            worst_error=float(np.abs(off[:, joint]).max()),
            recorded_error=None if missed is None else _rms(missed[:, [joint]]),
            jerk=jerk(trajectory[:, [joint]]),
            delta=float(np.abs(moves[:, joint]).mean()) if len(moves) else None,
        )
        for joint in range(trajectory.shape[1])
    )
    return TrajectoryFigures(
        steps=len(trajectory),
        error=_rms(off),
        recorded_error=None if missed is None else _rms(missed),
        jerk=jerk(trajectory),
        delta_norm=float(np.linalg.norm(moves, axis=1).mean()) if len(moves) else None,
        gripper_switches=None if gripper is None else switch_rate(trajectory[:, gripper], middle),
        joints=joints,
    )


def switch_rate(command: np.ndarray, middle: float = 0.0) -> float:
    """How often per hundred steps a gripper's command [T] crosses `middle`."""
    if len(command) < 2:
        return 0.0
    closed = command > middle
    return float(100 * np.mean(closed[1:] != closed[:-1]))


def gripper_middle(policy: Policy, observation: Observation, gripper: int = -1) -> float:
    """The middle of the gripper's range as the policy's normalization knows it.

    It is what a normalized action of zero means. An episode's own range would not do: a gripper
    that is never told to move flutters about the middle of a range of nothing.
    """
    inputs = policy.prepare([observation])
    actions = policy.finish(policy.draw_noise(1, 0) * 0, inputs)
    return float(actions[0, 0, gripper])


def compare_trajectories(
    trajectories: Mapping[str, np.ndarray],
    reference: str,
    recorded: np.ndarray | None = None,
    gripper: int | None = -1,
    middle: float = 0.0,
) -> dict[str, TrajectoryFigures]:
    """`trajectory_figures` of every arm against the one called `reference`."""
    return {
        arm: trajectory_figures(trajectory, trajectories[reference], recorded, gripper, middle)
        for arm, trajectory in trajectories.items()
    }


def _rms(values: np.ndarray) -> float:
    return float(np.sqrt(np.mean(np.sum(values**2, axis=1))))
