"""Where fixtures stand in LIBERO: drawn at each reset, so a matter of how many came before."""

from __future__ import annotations

from typing import Any

from omega_qvla.envs.rendering import import_mujoco


class Scenes:
    """Resets one LIBERO environment to the scene that any trial of a task has.

    The shipped initial states hold positions of joints. Fixtures (cabinets, stoves) have none:
    each reset draws their places from numpy's global generator. Scripts seed it once per task
    and reset once per trial, so the n-th trial plays the scene of the n-th reset. `reset` gives
    that scene at once, in any order and in any process.
    """

    def __init__(self, env: Any) -> None:
        """env: LIBERO's `OffScreenRenderEnv`, newly made."""
        self._env = env
        self._samplers = list(env.env.object_property_initializers)
        self._unplaced: tuple[Any, Any] | None = None

    def reset(self, trial: int) -> None:
        """The reset number `trial` + 1 of a new environment; numpy's generator is seeded.

        Only the last reset compiles the scene (0.9 s): without it, states would depend in
        their last bits on the episode before. Those before it just draw (some ms each).
        """
        simulator = self._env.env
        for earlier in range(trial):
            # The model as it is compiled: LIBERO samples with the fixtures where its XML has
            # them, and where an object fits decides how many numbers are drawn.
            body_pos, body_quat = self._unplaced = self._unplaced or self._compile()
            simulator.sim.model.body_pos[:] = body_pos
            simulator.sim.model.body_quat[:] = body_quat
            self._set_samplers(earlier + 2)
            simulator.hard_reset = False
            try:
                self._env.reset()
            finally:
                simulator.hard_reset = True
        self._set_samplers(trial + 1)
        self._env.reset()

    def _set_samplers(self, times: int) -> None:
        """LIBERO appends its samplers of joints again whenever it compiles, and draws from all.

        After construction they are there once, after the first reset twice, and so on.
        """
        self._env.env.object_property_initializers[:] = self._samplers * times

    def _compile(self) -> tuple[Any, Any]:
        """Places of all bodies as the scene's XML has them: float [bodies, 3], [bodies, 4]."""
        model = import_mujoco().MjModel.from_xml_string(self._env.env.model.get_xml())
        return model.body_pos.copy(), model.body_quat.copy()
