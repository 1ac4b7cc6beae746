"""The pictures that LIBERO's own loop returns, rendered only when somebody asks for them."""

from __future__ import annotations

import importlib
import weakref
from collections.abc import Callable, Iterable
from typing import Any, Literal

import numpy as np

from omega_qvla.envs.rendering import import_mujoco
from omega_qvla.errors import EnvError

#: Where everything is that a picture shows: all that MuJoCo reads of its data to draw a scene.
_PLACES = (
    *("xpos", "xquat", "xmat", "geom_xpos", "geom_xmat", "site_xpos", "site_xmat"),
    *("cam_xpos", "cam_xmat", "light_xpos", "light_xdir"),
)


class LazyPictures:
    """Renders the instant that robosuite last sampled.

    robosuite samples what it observes inside a control step, one or two physics steps (2 to
    4 ms) before its end, and LIBERO renders both cameras at that instant, in every step. Here
    only the places of things are kept then; rendered from those, a picture has LIBERO's own
    bits, and an execution of five actions renders once.
    """

    def __init__(self, simulator: Any, rendering: Literal["libero", "fast"]) -> None:
        """simulator: robosuite's environment, after its construction."""
        self._simulator, self._fast = simulator, rendering == "fast"
        self._mujoco = import_mujoco()
        self._instant: dict[str, np.ndarray] = {}
        # Weak: robosuite frees a context, while it is the current one, by dropping it.
        self._lean: Callable[[], Any] = lambda: None
        observables = importlib.import_module("robosuite.utils.observables")
        keep = observables.sensor(modality="instant")(lambda _cache: self._keep())
        simulator.add_observable(
            observables.Observable(
                name="instant", sensor=keep, sampling_rate=simulator.control_freq, active=False
            )
        )

    def check_cameras(self, names: Iterable[str]) -> None:
        """Raise EnvError where the scene lacks a camera."""
        known = self._simulator.sim.model.camera_names
        for name in names:
            if name not in known:
                raise EnvError(f"the scene has no camera {name!r}; it has: {', '.join(known)}")

    def render(self, camera: str, size: int) -> np.ndarray:
        """The renderer's own picture, uint8 [size, size, 3]: upside down."""
        sim = self._simulator.sim
        self.make_current()
        context = sim._render_context_offscreen
        if self._fast and context is not self._lean():
            self._leave_out(context)
        now = self._places()
        self._put(self._instant)
        try:
            image: np.ndarray = sim.render(size, size, camera_name=camera)
        finally:
            self._put(now)
        return image

    def make_current(self) -> None:
        """Make this simulator's GL context the current one.

        robosuite does so once, when it makes a context: with two simulators in one process it
        would draw into, and free, buffers of the wrong one.
        """
        context = self._simulator.sim._render_context_offscreen
        if context is not None:
            context.gl_ctx.make_current()

    def _keep(self) -> float:
        """Called by robosuite when it samples; a sensor must return something."""
        self._instant = self._places()
        return 0.0

    def _places(self) -> dict[str, np.ndarray]:
        data = self._simulator.sim.data._data
        return {name: getattr(data, name).copy() for name in _PLACES}

    def _put(self, places: dict[str, np.ndarray]) -> None:
        for name, values in places.items():
            getattr(self._simulator.sim.data._data, name)[:] = values

    def _leave_out(self, context: Any) -> None:
        """Turn off shadows, reflections and multisampling of a context, once."""
        context.model.vis.quality.offsamples = 0
        context.model.vis.quality.shadowsize = 0
        context.con.free()  # the buffers are made anew with these settings
        context._set_mujoco_context_and_buffers()
        for flag in ("SHADOW", "REFLECTION"):
            context.scn.flags[getattr(self._mujoco.mjtRndFlag, f"mjRND_{flag}")] = 0
        self._lean = weakref.ref(context)
