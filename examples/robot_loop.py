"""Let a bundle (or a checkpoint with its pack) act, and record what it saw.

    python examples/robot_loop.py BUNDLE RECORDINGS
    python examples/robot_loop.py CHECKPOINT RECORDINGS PACK

The robot here is a stand-in: it shows noise and believes every action. The recordings serve the
next calibration: examples/build_pack.py reads them.
"""

from __future__ import annotations

import sys

import numpy as np

from omega_qvla import Engine, Observation, OmegaError, Recorder


class Robot:
    """Replace this with yours: two methods, raw units."""

    def __init__(self, cameras: tuple[str, ...], size: int, state_dim: int) -> None:
        self._rng, self._cameras, self._size = np.random.default_rng(0), cameras, size
        self._state = np.zeros(state_dim, np.float32)

    def observe(self) -> Observation:
        """Images uint8 [h, w, 3] by name, the state, and what to do."""
        shape = (self._size, self._size, 3)
        images = {c: self._rng.integers(0, 256, shape, dtype=np.uint8) for c in self._cameras}
        return Observation(images, self._state.copy(), "open the drawer")

    def act(self, action: np.ndarray) -> None:
        """One action [action_dim]."""
        self._state[: len(action)] += 0.01 * action[: len(self._state)]


def main(policy: str, recordings: str, pack: str | None = None) -> None:
    """Three episodes of ten looks, five actions after each."""
    engine = Engine.load(policy, pack)
    print(f"{engine.policy.family}, its quantized layers run by {engine.backend}")
    with Recorder(recordings) as engine.recorder:
        for _ in range(3):
            engine.recorder.begin()
            robot = Robot(engine.cameras, size=32, state_dim=4)
            for look in range(10):
                try:
                    chunk = engine.infer(robot.observe(), seed=look)
                except OmegaError as error:  # a bad observation or action: stop, do not guess
                    print(f"stopped: {error}")
                    break
                for action in chunk[:5]:
                    robot.act(action)
    report = engine.recorder.report()
    print(f"recorded {report.written} observations, lost {report.lost}")


if __name__ == "__main__":
    main(*sys.argv[1:])
